"""One token through a JetBlock (arXiv:2508.15884, Sec. 2.4), from its projections to what the output projection takes.

    v = SiLU(Σ_j kappa_j · [conv_state, v]_j)               q, k = l2(SiLU(q)), l2(SiLU(k))
    g = -exp(A_log) · softplus(a + dt_bias)                 beta = sigmoid(b)
    S = exp(g) S;   S = S + beta k (v - S^T k)^T;   o = scale · S^T q
    y = RMSNorm(o) · SiLU(z)

Shapes: B batch, H heads, K key width, V value width, W taps.
q, k [B,H,K] · v, z [B,H,V] · kernels (kappa) [B,H·V,W] · a, b [B,H] · A_log, dt_bias [H] · weight [V] · state S [B,H,K,V] ·
conv_state [B,H·V,W-1]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from jetlab.ops.backends import resolve_backend
from jetlab.ops.recurrence import core_dtype, l2_normalize


def jetblock_step(*tensors: Tensor, backend: str = "auto", **options) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,H,V] in v's dtype, the new state in the dtype that it came in, and the new conv_state.

    Arguments as of `jetblock_step_reference`. Backend "triton" does all in one launch, on a GPU, in bf16, fp16 or fp32;
    it gives no gradient, and with `in_place=True` it overwrites `state`. Every other backend is the definition.
    """
    if resolve_backend(backend, *tensors, options["state"]) != "triton":
        return jetblock_step_reference(*tensors, **options)
    from jetlab_kernels.jetblock_step import jetblock_step as kernel

    return kernel(*tensors, **options)


def jetblock_step_reference(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernels: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    *,
    state: Tensor,
    conv_state: Tensor,
    eps: float = 1e-5,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in fp32 (fp64 stays fp64): y [B,H,V] in v's dtype, the new state in its own, the new conv_state."""
    (B, H, K), V, dtype = q.shape, v.shape[-1], v.dtype
    scale = K**-0.5 if scale is None else scale
    core = core_dtype(q, v, state)
    window = torch.cat([conv_state.to(dtype), v.reshape(B, H * V, 1)], -1)
    q, k, kernels, a, b, z, A_log, dt_bias, weight, S = (
        x.to(core) for x in (q, k, kernels, a, b, z, A_log, dt_bias, weight, state)
    )
    v = F.silu((kernels * window).sum(-1)).view(B, H, V)
    q, k = l2_normalize(F.silu(q)), l2_normalize(F.silu(k))
    S = S * (-A_log.exp() * F.softplus(a + dt_bias)).exp()[..., None, None]
    write = torch.sigmoid(b)[..., None] * (v - torch.einsum("bhkv,bhk->bhv", S, k))
    S = S + torch.einsum("bhk,bhv->bhkv", k, write)
    o = scale * torch.einsum("bhkv,bhk->bhv", S, q)
    y = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps) * weight * F.silu(z)
    return y.to(dtype), S.to(state.dtype), window[..., 1:].to(conv_state.dtype)
