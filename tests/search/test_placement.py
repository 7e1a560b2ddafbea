"""Specification of the placement study's tables: interactions, regret, agreement, and what cannot be looked up."""

from itertools import combinations

import numpy as np
import pytest
import torch

from jetlab.config import PlacementStudy
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import Score
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.search import placement
from jetlab.search import supernet as supernets
from jetlab.search.placement import Live, PlacementRun, Scored, agreement, calibration_rows, transfer
from jetlab.search.selectors import all_placements, select
from jetlab.tasks import SCORED, SUB_AXES
from jetlab.train.paths import placement_kinds

N_LAYERS = 4
TESTED = (*SCORED, *SUB_AXES)
WORTH = {0: 0.05, 1: 0.1, 2: 0.3, 3: 0.0}


def table(shift=0.0, n_contexts=6):
    """Accuracy is the sum of what layers are worth, and layers 0 and 1 together bring 0.2 more."""
    noise = np.linspace(-0.01, 0.01, n_contexts)
    found = {}
    for full in all_placements(N_LAYERS, 2):
        value = 0.3 + shift + sum(WORTH[layer] for layer in full) + 0.2 * (full == (0, 1))
        found[full] = {
            name: Score(name, "accuracy", 0.1, value + noise, 1 - value - noise, n_contexts) for name in TESTED
        }
    return found


def run(name="t0", teacher="a", order=1, choices=()):
    full = {task: Score(task, "accuracy", 0.1, np.ones(6), np.zeros(6), 6) for task in TESTED}
    tables = {split: table(shift) for split, shift in (("search", 0.0), ("select", 0.0), ("test", 0.01))}
    divergence = {(): 1.0} | {(layer,): 1 - order * 0.1 * layer for layer in range(N_LAYERS)}
    splits = {split: dict(full) for split in tables}
    return PlacementRun(
        name, teacher, N_LAYERS, 2, 2, tables, splits, divergence, {}, dict.fromkeys(SCORED, 5), list(choices)
    )


def test_a_pair_is_worth_its_parts_unless_its_layers_need_each_other():
    rows = {(r["task"], r["first"], r["second"]): r for r in run().pairs()}
    assert len(rows) == len(SCORED) * 6
    for (_, a, b), row in rows.items():
        assert row["interaction"] == pytest.approx(0.2 if (a, b) == (0, 1) else 0.0, abs=1e-12)
        assert row["interaction_se"] == pytest.approx(0.0, abs=1e-12)  # the noise of a context is in all four terms


def test_regret_is_what_the_exhaustive_choice_scores_more_on_test():
    choices = [
        {"task": "math", "budget": 2, "selector": "beam", "layers": (0, 1), "placements": 4, "tokens": 20},
        {"task": "math", "budget": 1, "selector": "uniform", "layers": (3,), "placements": 0, "tokens": 0},
        {"task": "math", "budget": 1, "selector": "random", "layers": (1,), "placements": 0, "tokens": 0},
    ]
    beam, uniform, random = run(choices=choices).selectors()
    assert beam["regret"] == pytest.approx(0.4 - 0.35)  # the best pair is (1, 2)
    assert uniform["regret"] == pytest.approx(0.3) and uniform["layers"] == "3"
    worth = list(WORTH.values())
    assert random["regret"] == pytest.approx(0.3 - np.mean(worth)) and random["spread"] == pytest.approx(np.std(worth))


def test_above_the_exhaustive_budgets_random_is_the_mean_of_a_sample_and_its_error_says_so(monkeypatch):
    """Budget 3 of 4 layers, 3 of its 4 placements; accuracies as if all gains added up, the same in every context."""
    monkeypatch.setattr(placement, "N_DRAWS", 3)
    chosen = (0, 1, 2)
    choices = [
        {"task": task, "budget": 3, "selector": "beam", "layers": chosen, "placements": 9, "tokens": 45}
        for task in SCORED
    ]
    one = run(choices=choices)
    for full in combinations(range(N_LAYERS), 3):
        value = 0.3 + sum(WORTH[layer] for layer in full)
        one.tables["test"][full] = {t: Score(t, "accuracy", 0.1, np.full(6, value), np.full(6, 0.5), 6) for t in SCORED}
    found = {key: (value, se) for key, value, se, _ in one.estimates()}
    drawn = [0.3 + sum(WORTH[layer] for layer in full) for full in one.pool(3)]
    assert len(drawn) == 3
    error = np.std(drawn, ddof=1) / 3**0.5 * (1 / 4) ** 0.5
    assert found["math_k3_random"] == pytest.approx((np.mean(drawn), error))
    assert found["math_k3_found"] == pytest.approx((0.75, 0.0))
    assert found["math_k3_found_minus_random"] == pytest.approx((0.75 - np.mean(drawn), error))
    assert "math_k3_exhaustive" not in found and "recency_k3_random" not in found
    assert one.pool(2) == list(combinations(range(N_LAYERS), 2))


def test_each_split_does_its_own_job():
    """Every split has another best layer: a search takes that of `search`, the kept one is of `select`, values of `test`."""
    worth = {"search": (0.1, 0.3, 0.2, 0.0), "select": (0.3, 0.1, 0.2, 0.0), "test": (0.05, 0.1, 0.2, 0.3)}
    ceilings = {"search": 0.9, "select": 0.8, "test": 1.0}
    choices = [
        {"task": "math", "budget": 1, "selector": name, "layers": layers, "placements": 4, "tokens": 20}
        for name, layers in (("beam", (1,)), ("single_layer", (3,)), ("exhaustive", (1,)))
    ]
    one = run(choices=choices)
    for split, by_layer in worth.items():
        one.full[split] = {t: Score(t, "accuracy", 0.1, np.full(6, ceilings[split]), np.zeros(6), 6) for t in TESTED}
        for full, scores in one.tables[split].items():
            value = 0.3 + sum(by_layer[layer] for layer in full) + np.linspace(-0.01, 0.01, 6) * (1 + sum(full))
            for task in scores:
                scores[task] = Score(task, "accuracy", 0.1, value, 1 - value, 6)
    assert one.found("code", 1) == (1,) and one.common(1) == (0,)
    assert one.layer_map("math") == pytest.approx([0.4, 0.6, 0.5, 0.3])
    assert one.on("select").ceilings["math"] == pytest.approx(0.8)
    found = {key: (value, se) for key, value, se, _ in one.estimates()}
    noise = np.std(np.linspace(-0.01, 0.01, 6), ddof=1) / 6**0.5
    for task in SCORED:
        assert found[f"{task}_k1_found"] == found[f"{task}_k1_exhaustive"] == pytest.approx((0.4, 2 * noise))
        assert found[f"{task}_k1_uniform"] == pytest.approx((0.5, 3 * noise))
        assert found[f"{task}_k1_found_minus_uniform"] == pytest.approx((-0.1, noise))
        assert found[f"{task}_k1_random"] == pytest.approx((0.4625, 2.5 * noise))
        assert found[f"{task}_k1_found_minus_random"] == pytest.approx((-0.0625, 0.5 * noise))
        assert found[f"{task}_k1_all_linear"][0] == pytest.approx(0.3) and found[f"{task}_k1_teacher"][0] == 1.0
        assert found[f"{task}_k2_exhaustive"][0] == pytest.approx(0.6)  # {1, 2}
    assert found["recency_k1_common"][0] == pytest.approx(0.35) and "recency_k1_found" not in found
    beam, single, exhaustive = one.selectors()
    assert beam["regret"] == exhaustive["regret"] == 0.0 and beam["value"] == pytest.approx(0.4)
    assert single["regret"] == pytest.approx(-0.2), "what is better on other examples only"


def test_two_supernets_agree_as_far_as_their_maps_rank_layers_alike():
    rows = agreement([run("t0", "a"), run("t1", "b"), run("t0_s1", "a", order=-1)])
    found = {(r["a"], r["b"], r["task"]): r for r in rows}
    assert len(rows) == 3 * (len(SCORED) + 1)
    assert (
        found["t0", "t1", "math"]["spearman"] == pytest.approx(1.0) and found["t0", "t1", "math"]["same_teacher"] == 0
    )
    assert (
        found["t0", "t0_s1", "kl"]["spearman"] == pytest.approx(-1.0)
        and found["t0", "t0_s1", "kl"]["same_teacher"] == 1
    )


def test_what_was_not_evaluated_cannot_be_looked_up():
    seen = Scored(N_LAYERS, table(), {}, {}, {(1, 2, 3): 0.5}, {})
    with pytest.raises(ValueError, match=r"placement \(0, 1, 2\) is not among those evaluated; raise"):
        seen.scores([(0, 1, 2)], "math")
    with pytest.raises(ValueError, match=r"placement \(0, 1\) is not among those evaluated; divergence is of single"):
        seen.scores([(0, 1)], "kl")
    assert seen.scores([(1, 2, 3)], "logit_error") == {(1, 2, 3): -0.5}
    with pytest.raises(
        ValueError, match=r"\(0, 1\) is not among those evaluated; selector logit_error evaluates its own"
    ):
        seen.scores([(1, 2, 3), (0, 1)], "logit_error")
    with pytest.raises(ValueError, match="leave out selector gates"):
        seen.gates(1, "math")


def study_of(supernet, **changed):
    given = {
        "budget": 1, "max_budget": 1, "select_budget": 1, "selectors": ["logit_error"], "beam_width": 2, "gate_steps": 1,
        "gate_learning_rate": 0.1,
    }  # fmt: skip
    return PlacementStudy.from_params(
        common=supernet.common, tasks=supernet.tasks, supernet=supernet, **given | changed
    )


@pytest.fixture(scope="module")
def live(base):
    """A supernet whose linear paths are random, with three rows to read."""
    study = study_of(base)
    model, tokenizer = supernets.build(base, str(ROOT / "assets/teacher/0"), 0)
    rows = calibration_rows(study, tokenizer, 0)
    rows.append(rows[0][:9])
    tokens = {"logit_error": sum(map(len, rows))}
    return Live(8, {}, {}, {}, {}, tokens, model, tokenizer, study, None, 0, rows)


@torch.no_grad()
def error(live, full):
    """The mean over rows of the mean squared error of their logits, one row and one architecture at a time, in fp64."""

    def logits(full, row):
        surgery.activate(live.model, placement_kinds(8, full, "gated_deltanet"))
        return live.model.eval()(torch.tensor([row])).logits.double()

    return np.mean([float((logits(range(8), row) - logits(full, row)).square().mean()) for row in live.calibration])


def test_logit_error_gives_up_the_layer_that_changes_the_logits_of_training_rows_least(live, monkeypatch):
    # what a task would score the choice is not asked here, so it needs no exam
    monkeypatch.setattr(placement, "evaluate", lambda model, block, paper, placements, label: dict.fromkeys(placements))
    monkeypatch.setattr(placement, "objective", lambda scores, task, ceilings: 0.25)
    choice = select(live, 6, "math", selector="logit_error")
    left = tuple(range(8))
    for n in (7, 6):
        errors = {full: error(live, full) for full in combinations(left, n)}
        for full, value in errors.items():
            assert live.logit_errors[full] == pytest.approx(value, rel=1e-4)  # fp32 sums over width and vocabulary
        left = min(errors, key=errors.get)
    assert choice.placement == left and choice.value == 0.25
    assert choice.n_evaluated == len(live.logit_errors) == 8 + 7
    assert choice.n_tokens == 15 * sum(map(len, live.calibration))

    def again(*_):
        raise AssertionError("errors that are known are not evaluated twice")

    monkeypatch.setattr(placement, "logit_error", again)
    assert select(live, 6, "all", selector="logit_error") == choice


def test_calibration_reads_whole_steps_of_the_mixture_without_padding_and_not_what_the_supernet_trained_on(
    base, tasks, tokenizer
):
    rows = {"retrieval": 2, "text": 1}
    mixed = base.model_copy(update={"training": base.training.model_copy(update={"rows": rows})})
    contexts = mixed.tasks.model_copy(update={"n_contexts": {**mixed.tasks.n_contexts, "search": 4}})
    study = study_of(mixed).model_copy(update={"tasks": contexts})
    found = calibration_rows(study, tokenizer, 7)
    assert len(found) == 6 and found == calibration_rows(study, tokenizer, 7)  # two steps of three rows hold four
    assert all(0 < len(row) <= 40 and tokenizer.pad_token_id not in row for row in found)
    for seed, same in ((8, True), (7, False)):
        mixture = Mixture(tasks, rows, tokenizer, 40, seed)
        ids = [row.tolist() for step in range(2) for row in mixture.batch(step).ids]
        assert all((row == whole[: len(row)]) == same for row, whole in zip(found, ids, strict=True))


@pytest.mark.parametrize("name", ["gates", "logit_error"])
def test_a_selector_that_reads_training_rows_is_refused_where_the_supernet_trains_on_none(name, base):
    on_text = base.model_copy(update={"training": base.training.model_copy(update={"rows": {}})})
    with pytest.raises(
        ValueError, match=f"{name} among selectors need rows of tasks in supernet.training, which are none"
    ):
        study_of(on_text, selectors=["beam", name])


def test_a_choice_is_tested_on_the_other_supernet_against_its_own():
    """On b layer 3 is worth most for math; a knows nothing of it."""
    a, b = run("t0"), run("t1", "b")
    for table_ in b.tables.values():
        for full, scores in table_.items():
            gain = 0.4 * (3 in full)
            old = scores["math"]
            scores["math"] = Score("math", "accuracy", 0.1, old.correct + gain, old.loss - gain, old.n_questions)
    rows = {(r["task"], r["found_on"], r["tested_on"]): r for r in transfer([a, b], 1)}
    assert len(rows) == 2 * len(SCORED)
    there, back = rows["math", "t0", "t1"], rows["math", "t1", "t0"]
    assert there["difference"] == pytest.approx(-0.1) and there["own"] == pytest.approx(0.71)  # {2} for {3} on b
    assert back["difference"] == pytest.approx(-0.3) and back["accuracy"] == pytest.approx(0.31)  # {3} for {2} on a
    assert rows["code", "t0", "t1"]["difference"] == 0.0 and not there["same_teacher"]


def test_supernets_of_one_teacher_are_told_apart_from_those_of_another():
    rows = transfer([run("t0"), run("t0_s1"), run("t1", "b")], 1)
    same = {(r["found_on"], r["tested_on"]) for r in rows if r["same_teacher"]}
    assert same == {("t0", "t0_s1"), ("t0_s1", "t0")}
