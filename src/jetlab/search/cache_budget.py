"""Which kind of mixer each layer gets under a budget of state and cache bytes, instead of a number of full layers.

An architecture names the kind of every layer, e.g. linear, sliding and full attention: n_kinds^n_layers of them, 6561 with
three kinds in eight layers. Its bytes at a context length are the sum over its layers, so none has to be built for them.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

from jetlab.models.surgery import LayerKinds

LayerBytes = Sequence[dict[str, int]]
"""Bytes of each kind in each layer at one context length, as `surgery.path_bytes` gives them."""


@dataclass(frozen=True)
class Point:
    """An architecture, its bytes of state and cache (lower is better), and its value (higher is better)."""

    kinds: LayerKinds
    n_bytes: int
    value: float


@dataclass(frozen=True)
class Grown:
    """The best architecture that a beam saw, and how many it looked at."""

    best: Point
    n_evaluated: int


def all_architectures(n_layers: int, kinds: Sequence[str]) -> list[LayerKinds]:
    """Every choice of one of `kinds` for each layer, len(kinds)^n_layers in all; the last layer varies first."""
    return list(product(kinds, repeat=n_layers))


def architecture_bytes(layer_bytes: LayerBytes, kinds: LayerKinds) -> int:
    """Bytes of state and cache of an architecture: what `surgery.state_bytes` counts when it is active."""
    return sum(of[kind] for of, kind in zip(layer_bytes, kinds, strict=True))


def measure(
    architectures: Iterable[LayerKinds], score: Callable[[LayerKinds], float], layer_bytes: LayerBytes
) -> list[Point]:
    """Each architecture with its bytes and its score, e.g. `lambda kinds: objective(table[kinds], task)`."""
    return [Point(kinds, architecture_bytes(layer_bytes, kinds), score(kinds)) for kinds in architectures]


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other matches in both bytes and value and beats in one, from few bytes to many.

    Of points equal in both the one whose kinds sort first is kept.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.n_bytes, -point.value, point.kinds)):
        if not front or point.value > front[-1].value:
            front.append(point)
    return front


def grow(
    score: Callable[[LayerKinds], float],
    layer_bytes: LayerBytes,
    n_layers: int,
    kinds: Sequence[str],
    budget_bytes: int,
    width: int,
) -> Grown:
    """Beam search within `budget_bytes`; `kinds` goes from the cheapest to the costliest, e.g. linear, sliding, attention.

    From `kinds[0]` in every layer, a move gives one layer any of the kinds behind its own. At each number of moves the best
    `width` architectures that fit the budget go on; one that does not fit is never scored. With two kinds this is the beam
    of `selectors.select`, but for keeping fewer full layers where these score higher. Ties go to fewer bytes, then to the
    kinds that sort first.
    Raises ValueError if sizes do not fit together or the budget does not hold the architecture to begin with.
    """
    if len(layer_bytes) != n_layers or width < 1 or not kinds:
        raise ValueError(
            f"grow needs bytes for each of n_layers layers, a width ≥ 1 and at least one kind, "
            f"got {len(layer_bytes)} of {n_layers}, {width} and {len(kinds)}"
        )
    start = (kinds[0],) * n_layers
    needed = architecture_bytes(layer_bytes, start)
    if needed > budget_bytes:
        raise ValueError(
            f"budget_bytes must hold {kinds[0]} in every layer, {needed} bytes, got {budget_bytes}; raise it to that"
        )
    costlier = {kind: kinds[rank + 1 :] for rank, kind in enumerate(kinds)}
    seen: dict[LayerKinds, Point] = {}

    def ask(architecture: LayerKinds) -> Point:
        if architecture not in seen:
            n_bytes = architecture_bytes(layer_bytes, architecture)
            seen[architecture] = Point(architecture, n_bytes, score(architecture))
        return seen[architecture]

    def best_first(point: Point) -> tuple:
        return -point.value, point.n_bytes, point.kinds

    beam = [ask(start)]
    while beam:
        grown = {
            (*point.kinds[:layer], kind, *point.kinds[layer + 1 :])
            for point in beam
            for layer in range(n_layers)
            for kind in costlier[point.kinds[layer]]
        }
        fitting = sorted(each for each in grown if architecture_bytes(layer_bytes, each) <= budget_bytes)
        beam = sorted(map(ask, fitting), key=best_first)[:width]
    return Grown(min(seen.values(), key=best_first), len(seen))
