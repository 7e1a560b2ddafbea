"""The search under a budget: brute force on a small model, and the published 12B and 9B."""

import dataclasses
from itertools import product

import pytest
import torch

from jetlab.compress.budget import Budget, nano2_budget, needed
from jetlab.compress.prune import apply
from jetlab.compress.search import (
    NANO2_SPACE,
    BudgetTooSmall,
    Space,
    candidates,
    random_importance,
    random_target,
    space_like_nano2,
    target_at,
)
from jetlab.compress.target import Target, whole
from jetlab.models import nemotron, zoo

LARGE = zoo.shape("NVIDIA-Nemotron-Nano-12B-v2-Base")
SMALL = zoo.shape("NVIDIA-Nemotron-Nano-9B-v2")
SPACE = Space(n_removed=(0, 1, 3), d_model=(16, 20, 24), d_ff=(8, 14, 20), n_mamba_heads=(2, 4, 6))
ORDER = (3, 5, 1)


@pytest.fixture(scope="module")
def shape(small):
    return nemotron.shape_of(small("M-*M-*-").config)


def budget_of(shape, share: float) -> Budget:
    anything = Budget(1, context=100)
    return dataclasses.replace(anything, n_bytes=int(share * needed(shape, anything).total))


def axes(target: Target) -> tuple[int, ...]:
    return len(target.layers), target.d_model, target.d_ff, target.n_mamba_heads


@pytest.mark.parametrize("share", [0.35, 0.5, 0.8, 0.99, 1.0])
def test_candidates_are_the_fitting_targets_that_no_fitting_one_covers(shape, share):
    budget = budget_of(shape, share)
    every = [
        target_at(shape, ORDER, n, d_model=d_model, d_ff=d_ff, n_mamba_heads=heads)
        for n, d_model, d_ff, heads in product(SPACE.n_removed, SPACE.d_model, SPACE.d_ff, SPACE.n_mamba_heads)
    ]
    fitting = {axes(target) for target in every if needed(target.of(shape), budget).total <= budget.n_bytes}
    maximal = {
        a for a in fitting if not any(a != b and all(x <= y for x, y in zip(a, b, strict=True)) for b in fitting)
    }
    found = candidates(shape, ORDER, SPACE, budget)
    assert {axes(candidate.target) for candidate in found} == maximal and len(found) == len(maximal)
    sizes = [candidate.n_params for candidate in found]
    assert sizes == sorted(sizes, reverse=True)
    for candidate in found:
        assert candidate.n_params == zoo.n_params(candidate.target.of(shape))
        assert candidate.needed == needed(candidate.target.of(shape), budget)


def test_a_budget_for_the_whole_model_leaves_it_whole(shape):
    (only,) = candidates(shape, ORDER, SPACE, budget_of(shape, 1.0))
    assert only.target == whole(shape)


def test_layers_go_in_the_order_of_their_removal(shape):
    assert target_at(shape, ORDER, 2).layers == (0, 1, 2, 4, 6)
    with pytest.raises(ValueError, match="4 layers are to go, and the order of removal holds 3"):
        target_at(shape, ORDER, 4)


def test_a_budget_that_nothing_fits_names_the_smallest_size(shape):
    budget = budget_of(shape, 0.2)
    smallest = needed(target_at(shape, ORDER, 3, d_model=16, d_ff=8, n_mamba_heads=2).of(shape), budget).total
    message = rf"{budget.n_bytes:,} bytes .* needs {smallest:,}: 4 layers, d_model 16, d_ff 8, 2 Mamba heads"
    with pytest.raises(BudgetTooSmall, match=message):
        candidates(shape, ORDER, SPACE, budget)
    exact = dataclasses.replace(budget, n_bytes=smallest)
    assert [axes(candidate.target) for candidate in candidates(shape, ORDER, SPACE, exact)] == [(4, 16, 8, 2)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": (16, 32)}, "d_model must be 1 … 24, got 32"),
        ({"n_mamba_heads": (3, 6)}, "multiple of the 2 groups .* got 3"),
        ({"d_ff": (0, 20)}, "d_ff must be 1 … 20, got 0"),
        ({"n_removed": (4,)}, "4 layers are to go"),
    ],
)
def test_a_space_that_the_model_does_not_reach_is_refused(shape, change, message):
    with pytest.raises(ValueError, match=message):
        candidates(shape, ORDER, dataclasses.replace(SPACE, **change), budget_of(shape, 0.6))


def test_a_space_without_a_value_is_refused():
    with pytest.raises(ValueError, match="at least one value of d_ff"):
        Space((0,), (16,), (), (2,))


def removal_order_of_the_9b() -> list[int]:
    """Layers of the 12B by which the 9B has as many of each kind: 2 attention, 3 MLPs, 1 Mamba2."""
    of_kind = {kind: [i for i, k in enumerate(LARGE.layer_kinds) if k == kind] for kind in set(LARGE.layer_kinds)}
    return [*of_kind["attention"][:2], *of_kind["mlp"][:3], of_kind["mamba2"][0]]


def test_the_published_9b_is_a_target_of_the_12b_in_the_space_of_the_report():
    target = target_at(LARGE, removal_order_of_the_9b(), 6, d_model=4480, d_ff=15680, n_mamba_heads=128)
    pruned = target.of(LARGE)
    assert zoo.n_params(pruned) == zoo.n_params(SMALL)
    assert needed(pruned, nano2_budget()) == needed(SMALL, nano2_budget())
    assert 6 in NANO2_SPACE.n_removed and 4480 in NANO2_SPACE.d_model and 15680 in NANO2_SPACE.d_ff


def test_the_budget_of_nano_2_leaves_room_for_wider_mlps_than_the_9b_has():
    space = dataclasses.replace(NANO2_SPACE, n_removed=(6,))
    found = candidates(LARGE, removal_order_of_the_9b(), space, nano2_budget())
    assert all(candidate.needed.total <= nano2_budget().n_bytes for candidate in found)
    (d_ff,) = [c.target.d_ff for c in found if (c.target.d_model, c.target.n_mamba_heads) == (4480, 128)]
    assert d_ff > 15680


def test_the_space_by_shares_holds_the_whole_model_and_the_share_of_the_9b():
    space = space_like_nano2(LARGE)
    assert (space.d_model[-1], space.d_ff[-1], space.n_mamba_heads[-1]) == (5120, 20480, 128)
    assert space.d_model[0] == 4480 and space.d_ff[0] == 13440 and space.n_mamba_heads == (112, 120, 128)
    assert space.n_removed == tuple(range(11))


def test_random_pruning_takes_exactly_as_many_bytes(small, shape):
    model, target = small("M-*M-*-"), Target((0, 1, 2, 4), 20, 12, 4)
    found = {}
    for seed in range(6):
        drawn = random_target(shape, target, seed)
        found[drawn.layers] = apply(model, drawn, random_importance(shape, seed))
        assert axes(drawn) == axes(target) and drawn == random_target(shape, target, seed)
        kinds = [sorted(shape.layer_kinds[layer] for layer in t.layers) for t in (drawn, target)]
        assert kinds[0] == kinds[1]
    expected = sum(p.nbytes for p in apply(model, target, random_importance(shape, 0)).parameters())
    assert {sum(p.nbytes for p in pruned.parameters()) for pruned in found.values()} == {expected}
    assert len(found) > 1


def test_random_importance_depends_on_its_seed(shape):
    a, b, c = (random_importance(shape, seed) for seed in (1, 1, 2))
    assert torch.equal(a.channels, b.channels) and not torch.equal(a.channels, c.channels)
    assert set(a.neurons) == {1, 4, 6} and set(a.heads) == {0, 3}
