"""Gates: decay and write strength from two projections, one number per head and token; none of either at padding."""

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


def zero_padding(x: Tensor, mask: Tensor | None) -> Tensor:
    """x [B,T,…] with zeros where `mask` [B,T] is 0: a value of 0 writes nothing, a log-decay of 0 forgets nothing."""
    return x if mask is None else x.masked_fill(~mask.bool().view(*mask.shape, *[1] * (x.ndim - 2)), 0)
