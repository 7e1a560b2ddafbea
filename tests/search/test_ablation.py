"""Specification of comparing supernets: one change at a time, the same everything else, and tables of known scores."""

import numpy as np
import pytest

from jetlab.config import AblationStudy, ConfigError
from jetlab.evaluate.suite import Score
from jetlab.search import ablation
from jetlab.search.ablation import AblationRun, ablate, best, compare, over_teachers, variant
from jetlab.search.selectors import all_placements
from jetlab.tasks import SCORED


def study(base, *variants, teachers=("assets/teacher/0",), budget=1):
    given = base.model_dump(include={"common", "tasks"})
    return AblationStudy.from_params(
        **given, supernet=base, teachers=list(teachers), variants=["up_to_k", *variants], budget=budget
    )


def differences(a, b, prefix=""):
    """The keys in which two studies differ."""
    a, b = ((x if isinstance(x, dict) else x.model_dump()) for x in (a, b))
    found = {}
    for key in a:
        if isinstance(a[key], dict):
            found |= differences(a[key], b[key], f"{prefix}{key}.")
        elif a[key] != b[key]:
            found[f"{prefix}{key}"] = b[key]
    return found


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("up_to_k", {}),
        ("coin", {"law": "coin"}),
        ("sandwich", {"law": "sandwich"}),
        ("no_features", {"training.feature_weight": 0.0}),
        ("no_logits", {"training.logit_weight": 0.0}),
        ("no_local", {"training.n_local": 0, "training.n_steps": 8}),
        ("no_local_no_growth", {"training.n_local": 0, "training.n_steps": 8, "training.growth": 0.0}),
        ("another_seed", {}),
    ],
)
def test_a_variant_changes_one_thing_and_is_measured_at_its_end_only(base, name, changes):
    assert differences(base, variant(base, name)) == {"n_checks": 0} | changes


def test_a_variant_without_any_loss_is_refused(base):
    no_features = variant(base, "no_features")
    with pytest.raises(ConfigError, match="both 0"):
        variant(no_features, "no_logits")
    with pytest.raises(ValueError, match=r"must be one of coin, .*, got 'no_heads'"):
        variant(base, "no_heads")


def test_the_base_comes_first_and_each_variant_once(base):
    with pytest.raises(ConfigError, match="must begin with the base, its law 'up_to_k'"):
        AblationStudy.from_params(**study(base).model_dump() | {"variants": ["coin", "up_to_k"]})
    with pytest.raises(ConfigError, match="got coin more than once"):
        study(base, "coin", "coin")


def test_variants_train_on_the_same_data_from_the_same_weights_and_another_seed_does_not(base, tmp_path, monkeypatch):
    asked = []

    def train(changed, name, teacher, weights, seed):
        asked.append((name, seed))
        raise StopIteration

    monkeypatch.setattr(ablation.supernets, "train", train)
    for name in ("coin", "another_seed"):
        only = study(base, name).model_copy(update={"variants": [name]})
        with pytest.raises(StopIteration):
            ablate(only, tmp_path)
    assert asked == [("coin t0", 0), ("another_seed t0", 100)]


def test_every_placement_of_the_budget_is_scored_on_both_splits(base, tmp_path):
    runs = ablate(study(base, "no_local"), tmp_path)
    assert [(run.variant, run.teacher, run.n_tokens) for run in runs] == [
        ("up_to_k", "t0", 320),
        ("no_local", "t0", 320),
    ]
    for run in runs:
        assert set(run.tables) == {"search", "test"}
        assert all(set(table) == set(all_placements(8, 1)) for table in run.tables.values())
    a, b = (run.tables["test"][()]["retrieval"].loss for run in runs)
    assert not np.array_equal(a, b)  # another training gives other paths


def table(worth, floor=0.3, n_contexts=5):
    """Four layers; accuracy is the floor and what the layers are worth, the loss its complement."""
    noise = np.linspace(-0.02, 0.02, n_contexts)
    found = {}
    for full in all_placements(4, 2):
        value = floor + sum(worth[layer] for layer in full) + noise
        found[full] = {t: Score(t, "accuracy", 0.1, value, 1 - value, n_contexts) for t in SCORED}
    return found


def run(name, worth, teacher="t0", floor=0.3, on_test=None):
    return AblationRun(name, teacher, 4, 100, {"search": table(worth, floor), "test": table(on_test or worth, floor)})


BASE = (0.0, 0.1, 0.4, 0.2)
OTHER = (0.3, 0.0, 0.2, 0.1)  # ranks layer 0 first, which is worth nothing on the base


def test_a_low_floor_with_the_same_ranks_loses_nothing():
    rows = compare([run("up_to_k", BASE), run("fixed_k", BASE, floor=0.1)], 1)
    changed = next(row for row in rows if row["variant"] == "fixed_k" and row["task"] == "math")
    assert changed["all_linear_change"] == pytest.approx(-0.2) and changed["found_change"] == pytest.approx(-0.2)
    assert changed["regret"] == 0.0 and changed["spearman"] == pytest.approx(1.0) and changed["layers"] == "2"
    assert changed["all_linear_change_se"] == pytest.approx(0.0, abs=1e-12)  # the noise of a context is in both
    assert changed["mean"] == pytest.approx(0.1 + np.mean(BASE))


def test_regret_is_what_the_choice_loses_on_the_base_not_on_itself():
    rows = compare([run("up_to_k", BASE), run("coin", OTHER)], 1)
    changed = rows[-1]
    assert changed["layers"] == "0" and changed["regret"] == pytest.approx(0.4)
    assert changed["found"] == pytest.approx(0.6) and changed["found_change"] == pytest.approx(-0.1)
    assert changed["spearman"] == pytest.approx(-0.2)  # by hand: ranks 0 1 3 2 and 3 0 2 1


def test_choices_are_made_on_one_split_and_scored_on_the_other():
    """On `test` the base's layers are worth BASE in reverse, the variant's OTHER in reverse."""
    reverse = [run("up_to_k", BASE, on_test=BASE[::-1]), run("coin", OTHER, on_test=OTHER[::-1])]
    base, *_, changed = compare(reverse, 1)
    assert base["layers"] == "2" and base["found"] == pytest.approx(0.3 + 0.1) and base["regret"] == 0.0
    assert changed["layers"] == "0" and changed["found"] == pytest.approx(0.3 + 0.1)
    assert changed["regret"] == pytest.approx(0.1 - 0.2)  # layer 0 for layer 2, both as the base scores them on `test`
    assert changed["spearman"] == pytest.approx(-0.2)


def test_with_a_budget_of_two_pairs_are_chosen_and_ranked():
    rows = compare([run("up_to_k", BASE), run("coin", OTHER)], 2)
    assert {row["layers"] for row in rows if row["variant"] == "up_to_k"} == {"2 3"}
    assert rows[-1]["layers"] == "0 2" and rows[-1]["regret"] == pytest.approx(0.2)


def test_knowledge_is_chosen_by_the_loss_of_the_right_answer():
    scores = table(BASE)
    for full, by_task in scores.items():
        old = by_task["knowledge"]
        by_task["knowledge"] = Score("knowledge", "accuracy", 0.1, old.correct, np.full(5, 1.0 - (full == (1,))), 5)
    assert best(scores, 4, 1, "knowledge") == (1,) and best(scores, 4, 1, "math") == (2,)


def test_a_tie_goes_to_the_smaller_layer():
    assert best(table((0.1, 0.2, 0.2, 0.0)), 4, 1, "code") == (1,)


def test_each_teacher_is_compared_with_its_own_base_and_then_they_are_averaged():
    runs = [
        run("up_to_k", BASE), run("coin", BASE, floor=0.2),
        run("up_to_k", OTHER, "t1"), run("coin", BASE, "t1"),
    ]  # fmt: skip
    rows = over_teachers(compare(runs, 1))
    coin = next(row for row in rows if (row["variant"], row["task"]) == ("coin", "code"))
    assert (coin["n_same"], coin["n_teachers"]) == (1, 2)
    assert coin["all_linear_change"] == pytest.approx((-0.1 + 0.0) / 2)
    assert coin["regret"] == pytest.approx((0.0 + 0.1) / 2)  # on t1: layer 0 for layer 2
    assert coin["found_se"] == pytest.approx(np.std(np.linspace(-0.02, 0.02, 5), ddof=1) / np.sqrt(5))
    assert len(rows) == 2 * len(SCORED)


def test_rows_read_back_from_a_file_average_alike(tmp_path):
    import pandas as pd

    from jetlab.track import Results

    rows = compare([run("up_to_k", BASE), run("coin", OTHER)], 1)
    Results(tmp_path).curve("laws", rows)
    read = pd.read_csv(tmp_path / "laws.csv").to_dict("records")  # layers come back as whole numbers
    again, direct = over_teachers(read), over_teachers(rows)
    assert [row["n_same"] for row in again] == [row["n_same"] for row in direct]
    assert [row["regret"] for row in again] == pytest.approx([row["regret"] for row in direct], abs=1e-5)
