"""RMSNorm, alone or with an output gate (arXiv:2307.08621)."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetlab.ops.backends import resolve_backend
from jetlab.ops.recurrence import core_dtype


class RMSNorm(nn.Module):
    """y = x / sqrt(mean(x²) + eps) · w in fp32 (fp64 stays fp64), then in x's dtype; x [..., width].

    The product with w comes before the rounding, as in the Jet-Nemotron checkpoints: Qwen2 rounds first, and in bf16 the
    two differ by a last bit.
    """

    def __init__(self, width: int, eps: float = 1e-5):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda and x.dtype == self.weight.dtype:  # the same steps in one kernel
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return self._exact(x).to(x.dtype)

    def _exact(self, x: Tensor) -> Tensor:
        core = x.to(core_dtype(x))
        return core * torch.rsqrt(core.square().mean(-1, keepdim=True) + self.eps) * self.weight.to(core.dtype)


class GatedRMSNorm(RMSNorm):
    """y = RMSNorm(o) · SiLU(z), rounded to o's dtype at the end alone; o and z [B,T,H,V]. Norm first, then gate.

    One weight of width V serves all heads. On backend "triton" all of it is one pass over memory.
    """

    def __init__(self, width: int, eps: float = 1e-5, *, backend: str = "auto"):
        super().__init__(width, eps)
        self.backend = backend

    def forward(self, o: Tensor, z: Tensor) -> Tensor:
        if resolve_backend(self.backend, o, z) == "triton":
            from jetlab_kernels.gated_rms_norm import gated_rms_norm

            return gated_rms_norm(o, z, self.weight, self.eps)
        return (self._exact(o) * F.silu(z.to(core_dtype(o)))).to(o.dtype)
