"""Softmax attention of one new token over a preallocated cache, which may be a ring.

    y = Σ_j softmax_j(scale · qᵀ k_j) v_j        over the slots j that hold a visible token

A cache of C slots keeps token p in slot p mod C, so C ≥ the number of tokens is the whole context and a smaller C a sliding
window. Keys carry their positions (RoPE), so the order of slots does not matter. `end` counts the tokens so far, the new one
included; `start` is the first token of a row, which has padding before it.

Shapes: B batch, G query heads for each of Hkv key-value heads, C slots, d channels.
q, y [B, Hkv·G, d] · keys, values [B, Hkv, C, d] · start [B] and end [] whole numbers
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from jetlab.ops.backends import resolve_backend


def slot_positions(n_slots: int, end: Tensor) -> Tensor:
    """Position [C] of the token in each slot; negative where none was written yet."""
    slot = torch.arange(n_slots, device=end.device)
    return end - 1 - (end - 1 - slot) % n_slots


def decode_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    end: Tensor,
    start: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """y [B, Hkv·G, d] in q's dtype; there is no gradient on backend "triton".

    Backend "triton" reads each key and value once and takes `end` and `start` from the device, so a captured graph serves
    every length; "chunked" is PyTorch's scaled_dot_product_attention under a mask.
    Raises ValueError if the query heads are no multiple of the key-value heads.
    """
    if q.shape[1] % keys.shape[1]:
        raise ValueError(
            f"query heads must be a multiple of key-value heads, got {q.shape[1]} and {keys.shape[1]}; check the shapes"
        )
    backend = resolve_backend(backend, q, keys, head_dim=q.shape[-1])
    if backend == "reference":
        return decode_attention_reference(q, keys, values, end=end, start=start, scale=scale)
    if backend == "triton":
        from jetlab_kernels.decode_attention import decode_attention as kernel

        return kernel(q, keys, values, end=end, start=start, scale=scale)
    # On a CPU asking for the length makes nobody wait; on a GPU the mask alone knows it.
    n = keys.shape[2] if q.is_cuda else min(int(end), keys.shape[2])
    visible = None if start is None and not q.is_cuda else _visible(keys, end, start)[:, None, None, :n]
    return F.scaled_dot_product_attention(
        q[:, :, None], keys[:, :, :n], values[:, :, :n], attn_mask=visible, scale=scale, enable_gqa=True
    )[:, :, 0]


def decode_attention_reference(
    q: Tensor, keys: Tensor, values: Tensor, *, end: Tensor, start: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """The definition: a softmax over all slots in fp32 (fp64 stays fp64), minus infinity where nothing is visible."""
    core = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // keys.shape[1]
    k, v = (x.to(core).repeat_interleave(group, dim=1) for x in (keys, values))
    scores = torch.einsum("bhd,bhcd->bhc", q.to(core), k) * (q.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores.masked_fill(~_visible(keys, end, start)[:, None], -torch.inf)
    return torch.einsum("bhc,bhcd->bhd", scores.softmax(-1), v).to(q.dtype)


def _visible(keys: Tensor, end: Tensor, start: Tensor | None) -> Tensor:
    """[B, C]: whether a slot holds a token of its row."""
    position = slot_positions(keys.shape[2], end)[None]
    first = position.new_zeros(1) if start is None else start
    return (position >= first[:, None]).expand(len(keys), -1)
