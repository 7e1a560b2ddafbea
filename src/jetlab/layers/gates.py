"""Padding, and gates: decay and write strength from two projections, one number per head and token, none at padding."""

import torch
from torch import Tensor
from torch.nn import functional as F

from jetlab.ops.recurrence import core_dtype


def decay_and_write(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """g = -exp(A_log) · softplus(a + dt_bias) and beta = sigmoid(b), [B,T,H] in fp32 (fp64 stays fp64).

    Where `mask` [B,T] is 0 both are 0: the state passes such a token unchanged.
    """
    core = core_dtype(a)
    g = -A_log.to(core).exp() * F.softplus(a.to(core) + dt_bias.to(core))
    beta = torch.sigmoid(b.to(core))
    return zero_padding(g, mask), zero_padding(beta, mask)


def real_tokens(x: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, d_model: int) -> Tensor:
    """The input of a mixer, x [B,T,D], with zeros where `mask` [B,T] is 0: whatever stands there, NaN too, is not read.

    Padding stands before the first token of a row or behind the last one.
    Raises ValueError if x or the mask has another shape, or if there are both a mask and packed documents.
    """
    if x.ndim != 3 or not x.shape[1] or x.shape[2] != d_model:
        raise ValueError(
            f"x must be [B, T, D] with T ≥ 1 and D = {d_model}, got {list(x.shape)}; a single token is [B, 1, D]"
        )
    if mask is not None and cu_seqlens is not None:
        raise ValueError("packed documents hold no padding, got both cu_seqlens and mask; remove the padding first")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask must be [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}; give 1 for tokens and 0 for padding"
        )
    return zero_padding(x, mask)


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B,T,…] with zeros where `mask` [B,T] is 0: a value of 0 writes nothing, a log-decay of 0 forgets nothing."""
    return x if mask is None else x.masked_fill(~mask.bool().view(*mask.shape, *[1] * (x.ndim - 2)), 0)
