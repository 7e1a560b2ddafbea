"""What a recurrent token mixer carries from call to call: tensors whose first dimension is the batch."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from jetlab.layers.dims import BlockDims


class RecurrentState(NamedTuple):
    """`recurrent` [B,H,K,V] in fp32 and one cache [B,C,W-1] for each short convolution."""

    recurrent: Tensor
    conv: tuple[Tensor, ...] = ()


def map_tensors(function: Callable, tree):
    """`function` of every tensor in nested tuples, named tuples and lists; None and plain numbers pass through."""
    if isinstance(tree, Tensor):
        return function(tree)
    if isinstance(tree, (tuple, list)):
        items = [map_tensors(function, item) for item in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def tensors(tree) -> list[Tensor]:
    """Every tensor in nested tuples, named tuples and lists, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def select(state, index: Tensor):
    """Rows `index` of every tensor of `state`; an index may repeat, so that one row becomes many."""
    return map_tensors(lambda x: x.index_select(0, index.to(x.device)), state)


def n_bytes(state) -> int:
    """Bytes of every tensor of `state`."""
    return sum(x.nbytes for x in tensors(state))


def recurrent_state_bytes(dims: BlockDims, conv_channels: int, dtype: torch.dtype) -> int:
    """4 · H·K·V + e · (W-1) · channels: the matrix in fp32 (fp64 stays fp64), the convolution caches in `dtype`."""
    return max(4, dtype.itemsize) * dims.state_size + dtype.itemsize * (dims.conv_size - 1) * conv_channels


def token_positions(
    x: Tensor, past: Tensor | None, *, positions: Tensor | None, mask: Tensor | None, cu_seqlens: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Position [B,T] of every token of x [B,T,D], and of the token after the last one, [B] ([N] with N documents).

    Positions that are given are taken as they are. Otherwise tokens are counted from `past`, what an earlier call
    returned (0 if None): padding does not count, and every document counts for itself.
    """
    B, T, _ = x.shape
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.long()
        past = cu_seqlens.new_zeros(len(cu_seqlens) - 1) if past is None else past
        if positions is None:
            offset = (past - cu_seqlens[:-1]).repeat_interleave(cu_seqlens.diff())
            positions = (torch.arange(T, device=x.device) + offset)[None]
        return positions, positions[0, cu_seqlens[1:] - 1] + 1
    past = torch.zeros(B, dtype=torch.long, device=x.device) if past is None else past
    real = torch.ones(B, T, dtype=torch.bool, device=x.device) if mask is None else mask.bool()
    positions = past[:, None] + real.cumsum(1) - 1 if positions is None else positions.expand(B, T)
    return positions, torch.where(real, positions + 1, past[:, None]).amax(1)
