"""Many architectures on the same inputs in one forward: layers that several of them begin with compute once.

Breadth first: behind layer l the hidden states hold, for each input row, one row for each distinct prefix of l + 1 kinds.
A layer copies the rows of a prefix to each kind that follows it, runs each of its paths once, on all rows that take
it, and its norms and MLP once on all. So it is evaluated once a prefix, for all placements of up to two full layers in eight
128 times instead of 296, and called as often as for a single architecture.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jetlab.layers.state import map_tensors
from jetlab.models.surgery import LayerKinds, Slot, activate, decoder, kinds_of, slots


@contextmanager
def branching(model: PreTrainedModel, architectures: Iterable[LayerKinds]) -> Iterator[list[LayerKinds]]:
    """Yields the P distinct architectures; within it a forward on n rows returns n · P, row i·P + p input row i under the p-th.

    This is the order of Hugging Face's beams. The states of a HybridCache keep the input rows as their first dimension,
    so that it repeats and selects input rows, each under all architectures. Afterwards the model is as it was.
    Raises ValueError for an architecture that does not fit the model, or if there is none.
    """
    architectures = sorted(set(map(tuple, architectures)))
    if not architectures:
        raise ValueError("branching needs at least one architecture, got none")
    found, before, handles = slots(model), kinds_of(model), []
    try:
        for kinds in architectures:
            activate(model, kinds)  # refuses what the model has no paths for
        prefixes: list[LayerKinds] = [()]
        for depth, (layer, slot) in enumerate(zip(decoder(model).layers, found, strict=True), start=1):
            groups = _by_kind(slot, {kinds[:depth] for kinds in architectures})
            parents = [prefixes.index(prefix[:-1]) for group in groups for prefix in group]
            handles.append(layer.register_forward_pre_hook(partial(_branch, len(prefixes), parents)))
            slot.mix = partial(_mix, slot, groups)
            prefixes = [prefix for group in groups for prefix in group]
        yield prefixes
    finally:
        for handle in handles:
            handle.remove()
        for slot in found:
            vars(slot).pop("mix", None)  # the class's own shows again
        activate(model, before)


def _by_kind(slot: Slot, prefixes: Iterable[LayerKinds]) -> list[list[LayerKinds]]:
    """Prefixes that take the same path of `slot`, apart where the path is the first of its kind and this matters to it."""

    def key(prefix: LayerKinds) -> tuple[str, bool]:
        *earlier, kind = prefix
        return kind, getattr(slot.paths[kind], "depends_on_depth", False) and kind in earlier

    return [list(group) for _, group in groupby(sorted(prefixes, key=lambda prefix: (key(prefix), prefix)), key)]


def _branch(n_above: int, parents: Sequence[int], _layer, args):
    """For every prefix the hidden states of its parent, one of `n_above`: [n · n_above, T, D] -> [n · P, T, D]."""
    x = args[0].unflatten(0, (-1, n_above))
    return x.index_select(1, torch.tensor(parents, device=x.device)).flatten(0, 1), *args[1:]


def _mix(slot: Slot, groups: Sequence[Sequence[LayerKinds]], x: Tensor, states, *, mask, positions, shared: dict):
    """`Slot.mix` with the rows of each group on its own path; y [n · P, T, D], and of each group the states [n, C, …].

    `shared` holds, for each prefix so far, what its own layers share, with first dimension n.
    """
    x = x.unflatten(0, (-1, sum(map(len, groups))))
    n = len(x)
    outputs, new_states = [], []
    parts = x.split([len(group) for group in groups], dim=1)
    for group, part, state in zip(groups, parts, states or [None] * len(groups), strict=True):
        C = len(group)
        inherited = [shared.get(prefix[:-1], {}) for prefix in group]
        common = sorted(set.intersection(*map(set, inherited)))
        own = {
            name: torch.stack([held[name].to(x.device) for held in inherited], dim=1).flatten(0, 1) for name in common
        }
        y, state = slot.paths[group[0][-1]](
            part.flatten(0, 1),
            map_tensors(lambda s: s.flatten(0, 1), state),
            mask=None if mask is None else mask.repeat_interleave(C, dim=0),
            positions=positions if len(positions) == 1 else positions.repeat_interleave(C, dim=0),
            shared=own,
        )
        for c, (prefix, held) in enumerate(zip(group, inherited, strict=True)):
            left = {name: s.unflatten(0, (n, C))[:, c] for name, s in own.items() if name not in held}
            shared[prefix] = held | left
        outputs.append(y.unflatten(0, (n, C)))
        new_states.append(map_tensors(lambda s, C=C: s.unflatten(0, (n, C)), state))
    return torch.cat(outputs, dim=1).flatten(0, 1), new_states
