"""Specification of the search under a budget of bytes, on scores that are known in closed form."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.search.cache_budget import (
    Point,
    all_architectures,
    architecture_bytes,
    grow,
    measure,
    pareto_front,
)
from jetlab.search.selectors import select

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
