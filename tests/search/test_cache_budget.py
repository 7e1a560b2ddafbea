"""Specification of the search under a budget of bytes, on scores that are known in closed form."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from jetlab.config import CacheBudgetStudy
from jetlab.evaluate.suite import Score, standard_error
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.search.cache_budget import (
    CacheBudgetRun,
    Point,
    all_architectures,
    architecture_bytes,
    build,
    costs,
    estimate,
    grow,
    measure,
    pareto_front,
    search,
    spell,
    spread_law,
    unspell,
)
from jetlab.search.placement import OBJECTIVES
from jetlab.search.selectors import objective, select
from jetlab.tasks import SCORED

LINEAR, SLIDING, FULL = KINDS = ("gated_deltanet", "sliding_attention", "attention")
COST = {LINEAR: 2, SLIDING: 5, FULL: 20}
L4 = [COST] * 4


def random_score(n_layers, seed):
    """A score without any structure: one number for each architecture."""
    rng = np.random.default_rng(seed)
    return {kinds: float(rng.random()) for kinds in all_architectures(n_layers, KINDS)}


def additive(kinds):
    """Layer 2 gains most by attention, layer 0 by a window as much as by attention, layers 1 and 3 nothing."""
    gain = {FULL: (3, 0, 8, 0), SLIDING: (3, 0, 1, 0)}
    return float(sum(gain[kind][layer] for layer, kind in enumerate(kinds) if kind in gain))


def counted(score):
    asked = []

    def ask(kinds):
        asked.append(kinds)
        return score(kinds)

    return ask, asked


def test_three_kinds_in_eight_layers_are_6561_architectures():
    found = all_architectures(8, KINDS)
    assert len(found) == len(set(found)) == 6561
    assert found[:4] == [
        (LINEAR,) * 8,
        (LINEAR,) * 7 + (SLIDING,),
        (LINEAR,) * 7 + (FULL,),
        (LINEAR,) * 6 + (SLIDING, LINEAR),
    ]


@pytest.mark.parametrize("seq_len", [3, 16, 4096], ids=["within-the-window", "the-window", "long"])
def test_bytes_are_those_of_the_active_architecture(seq_len):
    config = Qwen2Config(
        vocab_size=11, hidden_size=24, intermediate_size=8, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    surgery.wrap(model, (LINEAR, SLIDING), BlockDims(24, 2, 8, 16), window=16)
    before = surgery.kinds_of(model)
    layer_bytes = surgery.path_bytes(model, seq_len, torch.bfloat16)
    assert surgery.kinds_of(model) == before
    counts = {}
    for kinds in all_architectures(3, KINDS):
        surgery.activate(model, kinds)
        counts[kinds] = surgery.state_bytes(model, seq_len, torch.bfloat16)
        assert architecture_bytes(layer_bytes, kinds) == counts[kinds]
    assert len(set(counts.values())) > 3


def point(n_bytes, value, kinds=("x",)):
    return Point(kinds, n_bytes, value)


@pytest.mark.parametrize(
    ("points", "front"),
    [
        pytest.param([(3, 1.0), (1, 0.5), (2, 0.7)], [(1, 0.5), (2, 0.7), (3, 1.0)], id="sorted-by-bytes"),
        pytest.param([(1, 0.5), (2, 0.5)], [(1, 0.5)], id="as-good-for-more-bytes"),
        pytest.param([(1, 0.4), (1, 0.5)], [(1, 0.5)], id="better-for-as-many-bytes"),
        pytest.param([(1, 0.9), (2, 0.1), (3, 0.95)], [(1, 0.9), (3, 0.95)], id="beaten-in-both"),
        pytest.param([], [], id="none"),
    ],
)
def test_the_front_holds_what_nothing_beats(points, front):
    assert [(p.n_bytes, p.value) for p in pareto_front(point(*p) for p in points)] == front


def test_equal_points_are_kept_once_whatever_their_order():
    twins = [point(1, 0.5, kinds) for kinds in ((SLIDING,), (FULL,), (LINEAR,))]
    assert pareto_front(twins) == pareto_front(twins[::-1]) == [point(1, 0.5, (FULL,))]


@pytest.mark.parametrize("seed", range(5))
def test_the_front_of_random_scores_equals_comparing_every_pair(seed):
    rng = np.random.default_rng(seed)
    points = [point(int(b), float(v), (f"a{i}",)) for i, (b, v) in enumerate(rng.integers(0, 12, (80, 2)))]

    def beats(a, b):
        return a.n_bytes <= b.n_bytes and a.value >= b.value and (a.n_bytes, a.value) != (b.n_bytes, b.value)

    expected = sorted({(p.n_bytes, p.value) for p in points if not any(beats(q, p) for q in points)})
    assert [(p.n_bytes, p.value) for p in pareto_front(points)] == expected


def test_the_front_of_an_additive_score_upgrades_what_gains_most_a_byte():
    front = pareto_front(measure(all_architectures(4, KINDS), additive, L4))
    assert [(p.n_bytes, p.value) for p in front] == [(8, 0), (11, 3), (14, 4), (26, 8), (29, 11)]
    assert front[-1].kinds == (SLIDING, LINEAR, FULL, LINEAR)


@pytest.mark.parametrize(
    ("budget", "kinds"),
    [
        pytest.param(8, (LINEAR,) * 4, id="nothing-to-spend"),
        pytest.param(13, (SLIDING, LINEAR, LINEAR, LINEAR), id="one-window"),
        pytest.param(26, (LINEAR, LINEAR, FULL, LINEAR), id="one-attention"),
        pytest.param(80, (SLIDING, LINEAR, FULL, LINEAR), id="all-that-gains"),
    ],
)
def test_a_beam_finds_the_best_of_an_additive_score_within_the_budget(budget, kinds):
    grown = grow(additive, L4, 4, KINDS, budget, width=3)
    assert grown.best == Point(kinds, architecture_bytes(L4, kinds), additive(kinds))


@pytest.mark.parametrize("budget", [8, 17, 29, 45, 80])
@pytest.mark.parametrize("seed", range(4))
def test_a_beam_that_drops_nothing_equals_brute_force_on_random_scores(seed, budget):
    score = random_score(4, seed)
    grown = grow(score.__getitem__, L4, 4, KINDS, budget, width=81)
    fitting = [kinds for kinds in score if architecture_bytes(L4, kinds) <= budget]
    assert grown.best.kinds == max(fitting, key=score.get) and grown.best.value == max(map(score.get, fitting))
    assert grown.n_evaluated == len(fitting)


@pytest.mark.parametrize("width", [1, 2, 4])
def test_a_beam_scores_nothing_twice_and_nothing_over_the_budget(width):
    ask, asked = counted(random_score(4, 9).__getitem__)
    grown = grow(ask, L4, 4, KINDS, 40, width)
    assert len(asked) == len(set(asked)) == grown.n_evaluated < 81
    assert all(architecture_bytes(L4, kinds) <= 40 for kinds in asked)
    assert grown.best.value == max(random_score(4, 9)[kinds] for kinds in asked)


def test_a_beam_of_width_one_looks_at_every_upgrade_of_what_it_keeps():
    # all linear, then 2 upgrades of each of 4 layers; attention in layer 2 leads, and 3 layers may still get a window
    assert grow(additive, L4, 4, KINDS, 29, width=1).n_evaluated == 1 + 8 + 3


def test_a_windowed_layer_may_still_get_attention():
    """Alone, layer 1 does better by a window than by attention; behind a window in layer 0 attention there is best."""
    best = (SLIDING, FULL, LINEAR, LINEAR)

    def score(kinds):
        return {LINEAR: 0.0, SLIDING: 2.0, FULL: 1.0}[kinds[1]] + 0.5 * (kinds[0] == SLIDING) + 9.0 * (kinds == best)

    assert grow(score, L4, 4, KINDS, 29, width=1).best.kinds == best


@pytest.mark.parametrize("budget", [1, 2, 3])
def test_with_two_kinds_it_is_the_beam_over_placements(budget):
    def value(full):
        return sum((2, 1.5, 1, 9, 0.5, 3, 5, 4)[layer] for layer in full) - 6 * ({3, 6} <= set(full))

    def score(kinds):
        return value(tuple(layer for layer, kind in enumerate(kinds) if kind == FULL))

    class Supernet:
        n_layers = 8

        def scores(self, placements, objective):
            return {full: value(full) for full in placements}

        def n_tokens(self, objective):
            return 1

    choice = select(Supernet(), budget, "math", selector="beam", width=2)
    grown = grow(score, [{LINEAR: 1, FULL: 10}] * 8, 8, (LINEAR, FULL), 8 + 9 * budget, width=2)
    assert grown.best.value == choice.value
    assert tuple(layer for layer, kind in enumerate(grown.best.kinds) if kind == FULL) == choice.placement
    assert grown.n_evaluated == choice.n_evaluated + 1  # and all linear


def test_ties_go_to_fewer_bytes_then_to_the_kinds_that_sort_first():
    assert grow(lambda kinds: 0.0, L4, 4, KINDS, 80, width=2).best.kinds == (LINEAR,) * 4
    at_least_one = grow(lambda kinds: float(SLIDING in kinds), L4, 4, KINDS, 80, width=2)
    assert at_least_one.best.kinds == (LINEAR,) * 3 + (SLIDING,)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"budget_bytes": 7}, "gated_deltanet in every layer, 8 bytes, got 7; raise it", id="budget"),
        pytest.param({"n_layers": 3}, "got 4 of 3, 1 and 3", id="layers"),
        pytest.param({"width": 0}, "a width ≥ 1", id="width"),
        pytest.param({"kinds": ()}, "at least one kind", id="kinds"),
    ],
)
def test_a_search_that_cannot_be_is_refused(changed, message):
    arguments = {"n_layers": 4, "kinds": KINDS, "budget_bytes": 80, "width": 1} | changed
    with pytest.raises(ValueError, match=message):
        grow(additive, L4, **arguments)


@pytest.mark.parametrize(("max_changed", "n"), [(0, 1), (1, 17), (2, 1 + 16 + 28 * 4), (8, 6561)])
def test_architectures_near_all_linear_are_those_with_few_other_layers(max_changed, n):
    found = all_architectures(8, KINDS, max_changed)
    assert len(found) == n and set(found) <= set(all_architectures(8, KINDS))
    assert max(sum(kind != LINEAR for kind in each) for each in found) == max_changed


@pytest.mark.parametrize("max_changed", [1, 2])
def test_a_beam_keeps_to_the_architectures_near_all_linear(max_changed):
    score = {each: random_score(4, 3)[each] for each in all_architectures(4, KINDS, max_changed)}
    grown = grow(score.__getitem__, L4, 4, KINDS, 80, 81, max_changed)
    assert grown.n_evaluated == len(score) and grown.best.value == max(score.values())


def scores(seed, n_contexts=6):
    rng = np.random.default_rng(seed)
    return {
        task: Score(task, "accuracy", 0.1, rng.random(n_contexts), rng.random(n_contexts), n_contexts)
        for task in SCORED
    }


CEILINGS = {"knowledge": 1.0, "math": 0.9, "retrieval": 1.0, "code": 0.8}


@pytest.mark.parametrize("task", OBJECTIVES)
def test_an_estimate_is_the_objective_and_its_error(task):
    one, other = scores(0), scores(1)
    value, se = estimate(one, task, CEILINGS)
    assert value == pytest.approx(objective(one, task, CEILINGS)) and se > 0
    difference, _ = estimate(one, task, CEILINGS, other)
    assert difference == pytest.approx(value - estimate(other, task, CEILINGS)[0])
    assert estimate(one, task, CEILINGS, one) == (0.0, 0.0)  # paired: what both share is no error


def test_the_error_of_a_loss_is_that_of_the_loss():
    one = scores(0)
    assert estimate(one, "knowledge", CEILINGS)[1] == pytest.approx(standard_error(one["knowledge"].loss))
    assert estimate(one, "math", CEILINGS)[1] == pytest.approx(one["math"].se)
    scaled = [one[task].se / (CEILINGS[task] - 0.1) / 4 for task in SCORED]
    assert estimate(one, "all", CEILINGS)[1] == pytest.approx(np.sqrt(np.square(scaled).sum()))


def test_the_law_draws_every_number_of_linear_layers_alike_but_none():
    law = spread_law(KINDS, 8, seed=0)
    drawn = [law(step) for step in range(4000)]
    assert law(7) == drawn[7] and len(set(drawn)) > 1000
    linear = np.bincount([kinds.count(LINEAR) for kinds in drawn], minlength=9)
    assert linear[0] == 0 and abs(linear[1:] - 500).max() < 4 * np.sqrt(500 * 7 / 8)  # four standard deviations
    for kind in (SLIDING, FULL):  # each of 8 layers in 3.5 / 8 / 2 of the steps
        share = np.mean([[each == kind for each in kinds] for kinds in drawn], axis=0)
        assert abs(share - 3.5 / 16).max() < 4 * np.sqrt(0.22 * 0.78 / 4000)


def test_letters_can_be_read_back():
    kinds = (FULL, LINEAR, SLIDING, LINEAR)
    assert spell(kinds) == "FLWL" and unspell("FLWL", LINEAR) == kinds


def searched(value, max_changed=4):
    """A run of four layers in which every objective is `value`, on both splits."""
    every = all_architectures(4, KINDS)
    values = {kinds: value(kinds) for kinds in all_architectures(4, KINDS, max_changed)}
    flat = np.linspace(-0.01, 0.01, 5)
    test = {
        kinds: {t: Score(t, "accuracy", 0.0, value(kinds) + flat, -value(kinds) - flat, 5) for t in SCORED}
        for kinds in every
    }
    budgets = {0.0: 8, 0.5: 17, 1.0: 26, 1.5: 35}
    return CacheBudgetRun("t0", KINDS, L4, dict.fromkeys(OBJECTIVES, values), budgets, 2, max_changed, [], test)


def test_the_exact_optimum_bounds_the_beam_at_every_budget():
    run = searched(random_score(4, 2).__getitem__)
    rows = [row for row in run.budget_rows() if row["objective"] == "math"]
    for row in rows:
        fitting = [p for p in run.points("math") if p.n_bytes <= row["budget_bytes"]]
        assert row["best_value"] == max(p.value for p in fitting) and row["n_fitting"] == len(fitting)
        assert row["regret"] == pytest.approx(row["best_value"] - row["value"]) and row["regret"] >= 0
        assert row["n_evaluated"] <= row["n_fitting"] and max(row["bytes"], row["best_bytes"]) <= row["budget_bytes"]
    assert rows[0]["best_kinds"] == "LLLL" and rows[0]["regret"] == 0
    assert any(row["regret"] > 0 for row in rows)  # a score without structure leads a narrow beam astray


def test_the_gain_of_windows_is_the_optimum_less_that_without_them():
    """Layer 0 gains as much by a window as by attention: within 35 bytes it and attention in layer 2 fit only together so."""
    row = next(row for row in searched(additive).budget_rows() if (row["objective"], row["budget"]) == ("math", 1.5))
    assert (row["best_kinds"], row["two_kinds"]) == ("WLFL", "LLFL")
    assert row["gain"] == pytest.approx(3) and row["gain_se"] == pytest.approx(0, abs=1e-12)
    none = next(row for row in searched(lambda kinds: 0.5).budget_rows() if row["budget"] == 1.5)
    assert none["best_kinds"] == none["two_kinds"] and none["gain"] == 0


def test_levels_count_every_architecture_once_and_end_in_the_best():
    run = searched(random_score(4, 5).__getitem__)
    levels = [row for row in run.level_rows() if row["objective"] == "code"]
    assert sum(row["n"] for row in levels) == 81
    assert len({row["bytes"] for row in levels}) == len(levels) == 15  # sums of four layers of three kinds
    front = {row["bytes"]: row["value"] for row in run.front_rows() if row["objective"] == "code"}
    best = {row["bytes"]: row["best"] for row in levels}
    assert all(best[n_bytes] == value for n_bytes, value in front.items())
    assert all(row["q05"] <= row["q50"] <= row["q95"] <= row["best"] for row in levels)


def test_references_are_placements_without_windows_and_layers_of_one_kind():
    run = searched(additive, max_changed=1)
    letters = [row["kinds"] for row in run.reference_rows() if row["objective"] == "all"]
    assert len(letters) == 1 + 4 + 6 + 2 and {"LLLL", "WWWW", "FFFF", "LFLF"} <= set(letters)
    values = {row["kinds"]: row["value"] for row in run.reference_rows() if row["objective"] == "math"}
    assert values["LLFL"] == 8 and values["WWWW"] is None  # not scored on split search


@pytest.fixture(scope="module")
def study(base):
    given = base.model_dump(include={"common", "tasks"})
    return CacheBudgetStudy.from_params(
        **given, supernet=base, teachers=["assets/teacher/0"], window=8, context_tokens=64, beam_width=2,
        budgets=[0.0, 1.0], max_changed=1,
    )  # fmt: skip


def test_a_study_scores_what_it_reports(study):
    (run,) = search(study)
    assert len(run.values["all"]) == 17 and set(run.reported()) == set(run.test)
    assert run.budgets[0.0] == architecture_bytes(run.layer_bytes, (LINEAR,) * 8)
    assert run.budgets[1.0] == architecture_bytes(run.layer_bytes, (FULL, *(LINEAR,) * 7))
    full = next(row for row in run.reference_rows() if row["kinds"] == "F" * 8 and row["objective"] == "all")
    assert full["test"] == pytest.approx(1) and full["value"] is None  # the teacher, beyond one changed layer
    assert [row["phase"] for row in run.history] == ["local", "end to end"]
    lengths = {name: len(getattr(run, name)()) for name in ("budget_rows", "reference_rows")}
    assert lengths == {"budget_rows": 5 * 2, "reference_rows": 5 * (1 + 8 + 28 + 2)}


def test_a_window_that_costs_less_than_a_linear_layer_is_refused(study):
    model, _ = build(study.model_copy(update={"window": 1}), ROOT / "assets/teacher/0", 0)
    with pytest.raises(ValueError, match=r"bytes must grow from linear over sliding to full.*raise window"):
        costs(study, model)
