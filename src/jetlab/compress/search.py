"""Search under a memory budget: which targets fit, and which of those keep the most (arXiv:2508.14444, Sec 4.2).

Depth first: layers go in the order in which `importance.remove_layers` gave them up. Then the widths: of the targets that fit
the budget only the maximal ones are candidates, since another that fits is narrower than one of them in every width.
"""

import dataclasses
from collections.abc import Sequence
from itertools import product

import torch

from jetlab.compress.budget import Budget, Needed, needed
from jetlab.compress.importance import Importance
from jetlab.compress.target import Target
from jetlab.models.zoo import Shape, n_params
from jetlab.seeding import generator, rng


class BudgetTooSmall(ValueError):
    """No target of the space fits the budget."""


@dataclasses.dataclass(frozen=True)
class Space:
    """What may be chosen: layers removed, and the widths. Kept sorted, each value once; raises ValueError if one is empty."""

    n_removed: tuple[int, ...]
    d_model: tuple[int, ...]
    d_ff: tuple[int, ...]
    n_mamba_heads: tuple[int, ...]

    def __post_init__(self):
        for name, values in vars(self).copy().items():
            if not values:
                raise ValueError(f"a space needs at least one value of {name}, got none; give the model's own")
            object.__setattr__(self, name, tuple(sorted(set(values))))


# The report's own for the 12B: ranges from Sec 4.2, steps chosen here so that the published 9B lies on the grid.
NANO2_SPACE = Space(
    n_removed=tuple(range(6, 11)),
    d_model=tuple(range(4480, 5121, 160)),
    d_ff=tuple(range(13440, 20481, 320)),
    n_mamba_heads=tuple(range(112, 129, 8)),
)


def space_like_nano2(shape: Shape) -> Space:
    """The ranges of `NANO2_SPACE` as shares of another model.

    0 to 16 % of the layers removed (10 of 62); d_model 7/8, 15/16 and all; d_ff 21/32 to all in steps of 1/32; heads 7/8 to
    all, whole groups. Nano 2's lower end of 6 layers is left out, so that a budget that takes little need not take layers.
    """
    groups = shape.linear.n_groups
    per_group = shape.linear.n_heads // groups
    return Space(
        n_removed=tuple(range(round(shape.n_layers * 10 / 62) + 1)),
        d_model=tuple(shape.d_model * part // 16 for part in (14, 15, 16)),
        d_ff=tuple(max(1, shape.d_ff * part // 32) for part in range(21, 33)),
        n_mamba_heads=tuple(groups * n for n in range(-(-per_group * 7 // 8), per_group + 1)),
    )


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A target that fits, its size, and what it takes of the budget."""

    target: Target
    n_params: int
    needed: Needed


def target_at(shape: Shape, order: Sequence[int], n_removed: int, **widths: int) -> Target:
    """The target that is left when the first `n_removed` layers of `order` go; widths that are not named stay the model's.

    Raises ValueError if `order` holds fewer layers.
    """
    if n_removed > len(order):
        raise ValueError(
            f"{n_removed} layers are to go, and the order of removal holds {len(order)}; remove_layers gives a longer one"
        )
    gone = set(order[:n_removed])
    layers = tuple(layer for layer in range(shape.n_layers) if layer not in gone)
    all_widths = {"d_model": shape.d_model, "d_ff": shape.d_ff, "n_mamba_heads": shape.linear.n_heads}
    return Target(layers, **(all_widths | widths))


def require_reachable(shape: Shape, space: Space, budget: Budget) -> None:
    """Raises BudgetTooSmall if no choice of layers at all can bring the space below the budget: before any is measured.

    Of the most layers that may go those go which take most bytes, at the narrowest widths.
    """
    widths = Target(tuple(range(shape.n_layers)), space.d_model[0], space.d_ff[0], space.n_mamba_heads[0])

    def without(layer: int) -> int:
        return needed(
            dataclasses.replace(widths, layers=tuple(i for i in widths.layers if i != layer)).of(shape), budget
        ).total

    by_bytes = sorted(widths.layers, key=without)
    left = tuple(sorted(by_bytes[space.n_removed[-1] :]))
    smallest = needed(dataclasses.replace(widths, layers=left).of(shape), budget).total if left else 0
    if smallest > budget.n_bytes:
        raise BudgetTooSmall(
            f"the budget is {budget.n_bytes:,} bytes at {budget.context:,} tokens and batch {budget.batch}, and whichever "
            f"{space.n_removed[-1]} layers go, at least {smallest:,} are needed: {len(left)} layers, d_model {widths.d_model}, "
            f"d_ff {widths.d_ff}, {widths.n_mamba_heads} Mamba heads; raise the budget, shorten the context or widen the space"
        )


def candidates(shape: Shape, order: Sequence[int], space: Space, budget: Budget) -> list[Candidate]:
    """The maximal targets of the space that fit the budget, the largest number of parameters first.

    Maximal: no other that fits has at least as many layers and every width at least as large. `order` are the layers in the
    order of their removal. Raises BudgetTooSmall, with the smallest size that the space reaches, if nothing fits; ValueError
    for a space that the model cannot be pruned to.
    """

    def candidate(n_removed: int, d_model: int, d_ff: int, n_mamba_heads: int) -> Candidate:
        target = target_at(shape, order, n_removed, d_model=d_model, d_ff=d_ff, n_mamba_heads=n_mamba_heads)
        pruned = target.of(shape)
        return Candidate(target, n_params(pruned), needed(pruned, budget))

    candidate(
        space.n_removed[0], space.d_model[-1], space.d_ff[-1], space.n_mamba_heads[-1]
    )  # refuses what is too wide
    smallest = candidate(space.n_removed[-1], space.d_model[0], space.d_ff[0], space.n_mamba_heads[0])
    if smallest.needed.total > budget.n_bytes:
        target = smallest.target
        raise BudgetTooSmall(
            f"the budget is {budget.n_bytes:,} bytes at {budget.context:,} tokens and batch {budget.batch}, and the smallest "
            f"target of the space needs {smallest.needed.total:,}: {len(target.layers)} layers, d_model {target.d_model}, "
            f"d_ff {target.d_ff}, {target.n_mamba_heads} Mamba heads; raise the budget, shorten the context or widen the space"
        )
    widest = []  # for each choice of the rest, the widest MLP that fits
    for n_removed, d_model, n_heads in product(space.n_removed, space.d_model, space.n_mamba_heads):
        for d_ff in reversed(space.d_ff):
            found = candidate(n_removed, d_model, d_ff, n_heads)
            if found.needed.total <= budget.n_bytes:
                widest.append(found)
                break

    def covers(a: Target, b: Target) -> bool:
        return a != b and all(
            x >= y
            for x, y in (
                (len(a.layers), len(b.layers)),
                (a.d_model, b.d_model),
                (a.d_ff, b.d_ff),
                (a.n_mamba_heads, b.n_mamba_heads),
            )
        )

    maximal = [found for found in widest if not any(covers(other.target, found.target) for other in widest)]
    return sorted(maximal, key=lambda found: (-found.n_params, dataclasses.astuple(found.target)))


def random_target(shape: Shape, target: Target, seed: int, *, keep: str | None = None) -> Target:
    """The target's widths, with other layers removed: as many of each kind, drawn evenly. It takes exactly as many bytes.

    Layers of the kind `keep` stay as the target has them.
    """
    draw, kept = rng(seed, "random layers"), []
    for kind in sorted(set(shape.layer_kinds)):
        of_kind = [layer for layer, found in enumerate(shape.layer_kinds) if found == kind]
        left = [layer for layer in of_kind if layer in target.layers]
        kept += left if kind == keep else draw.sample(of_kind, len(left))
    return dataclasses.replace(target, layers=tuple(sorted(kept)))


def random_importance(shape: Shape, seed: int) -> Importance:
    """Scores that know nothing: with them `prune.apply` keeps neurons, channels and, in each group, heads drawn evenly."""
    draw = generator(seed, "random importance")

    def scores(kind: str, n: int) -> dict[int, torch.Tensor]:
        return {layer: torch.rand(n, generator=draw) for layer, found in enumerate(shape.layer_kinds) if found == kind}

    channels = torch.rand(shape.d_model, generator=draw)
    return Importance(scores("mlp", shape.d_ff), channels, scores("mamba2", shape.linear.n_heads))
