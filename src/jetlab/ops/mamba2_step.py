"""One token through a Mamba2 layer (arXiv:2405.21060), from its input projection to what the output projection takes.

    v, k, q = SiLU(Σ_j conv_weight_j · [conv_state, xbc]_j + conv_bias)        (x, B and C of the paper)
    dt = softplus(dt + dt_bias)                         S = exp(-exp(A_log) dt) S + dt v k^T
    o = (S q + D v) · SiLU(z)                           y = RMSNorm over each group's channels of o

Shapes: B batch, H heads, V value width (the paper's P), K state size (its N), G groups, W taps, C = H·V + 2·G·K channels.
xbc [B,C] · z [B,H·V] · dt [B,H] · conv_weight [C,W] · conv_bias [C] or None · dt_bias, A_log, D [H] · weight [H·V] ·
state S [B,H,V,K], as Transformers lays it out · conv_state [B,C,W-1]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from jetlab.ops.backends import resolve_backend
from jetlab.ops.recurrence import core_dtype


def mamba2_step(
    *tensors: Tensor | None, state: Tensor, conv_state: Tensor, backend: str = "auto", in_place: bool = False, **options
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,H·V] in z's dtype, the new state in the dtype that it came in, and the new conv_state.

    Arguments as of `mamba2_step_reference`. With `in_place` the states given are overwritten and returned. Backend "triton"
    reads and writes the state once, on a GPU, in bf16, fp16 or fp32; it gives no gradient. Every other backend is the
    definition.
    """
    taps, states = tensors[3].shape[-1], {"state": state, "conv_state": conv_state}
    if resolve_backend(backend, *tensors, state, conv_state, head_dim=state.shape[-1], taps=taps) == "triton":
        from jetlab_kernels.mamba2_step import mamba2_step as kernel

        return kernel(*tensors, **states, in_place=in_place, **options)
    y, new_state, new_conv = mamba2_step_reference(*tensors, **states, **options)
    if in_place:
        return y, state.copy_(new_state), conv_state.copy_(new_conv)
    return y, new_state, new_conv


def mamba2_step_reference(
    xbc: Tensor,
    z: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    weight: Tensor,
    *,
    state: Tensor,
    conv_state: Tensor,
    n_groups: int = 1,
    norm_groups: int | None = None,
    eps: float = 1e-5,
) -> tuple[Tensor, Tensor, Tensor]:
    """The definition in fp32 (fp64 stays fp64): y [B,H·V] in z's dtype, the new state in its own, the new conv_state.

    The norm's groups are those of k and q unless `norm_groups` says otherwise.
    """
    (B, H), K, G, dtype = dt.shape, state.shape[-1], n_groups, z.dtype
    core = core_dtype(xbc, z, state)
    window = torch.cat([conv_state.to(xbc.dtype), xbc[..., None]], -1)
    z, dt, conv_weight, dt_bias, A_log, D, weight, S = (
        x.to(core) for x in (z, dt, conv_weight, dt_bias, A_log, D, weight, state)
    )
    mixed = (window.to(core) * conv_weight).sum(-1)
    mixed = F.silu(mixed if conv_bias is None else mixed + conv_bias.to(core))
    v, k, q = mixed.split([z.shape[-1], G * K, G * K], dim=-1)
    v = v.view(B, H, -1)
    k, q = (x.view(B, G, K).repeat_interleave(H // G, dim=1) for x in (k, q))
    dt = F.softplus(dt + dt_bias)
    S = S * (-A_log.exp() * dt).exp()[..., None, None] + torch.einsum("bh,bhv,bhk->bhvk", dt, v, k)
    o = torch.einsum("bhvk,bhk->bhv", S, q) + D[:, None] * v
    o = (o.flatten(1) * F.silu(z)).unflatten(-1, (norm_groups or G, -1))
    y = (o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps)).flatten(1) * weight
    return y.to(dtype), S.to(state.dtype), window[..., 1:].to(conv_state.dtype)
