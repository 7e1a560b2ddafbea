"""Rotary positions of queries and keys together (arXiv:2104.09864), each head normed before if it has a weight.

    x̂ = x / sqrt(mean(x²) + eps) · weight        (x̂ = x without a weight)
    y = x̂ · cos + [-x̂₂, x̂₁] · sin                with x̂₁, x̂₂ the halves of a head's D channels

Channel i turns with channel i + D/2, as in Transformers; Qwen3 norms the heads of q and k, Qwen2 and Llama do not.

Shapes: B batch, T time, H query heads, Hkv key heads, D channels.
q [B,H,T,D] · k [B,Hkv,T,D] · cos, sin [B,T,D], one angle for all heads · q_weight, k_weight [D] or None
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from jetlab.ops.backends import resolve_backend
from jetlab.ops.recurrence import core_dtype


def rotary(
    q: Tensor,
    k: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Normed and rotated q [B,H,T,D] and k [B,Hkv,T,D], each in its own dtype.

    Backend "triton" is one launch for both, in fp32 until the end, on a GPU, of inputs in bf16, fp16 or fp32 and any strides;
    it gives no gradient. "reference" is the definition, and "chunked" rounds after each step to q's dtype, as Transformers
    does.
    Raises ValueError if shapes do not fit together or D is odd.
    """
    (B, _, T, D), tensors = q.shape, (q, k, cos, sin, q_weight, k_weight)
    if D % 2:
        raise ValueError(f"a head must have an even number of channels, got {D}; rotate an even part of them")
    for name, x, expected in (
        ("k", k, (B, k.shape[1], T, D)),
        ("cos", cos, (B, T, D)),
        ("sin", sin, (B, T, D)),
        ("q_weight", q_weight, (D,)),
        ("k_weight", k_weight, (D,)),
    ):
        if x is not None and x.shape != expected:
            raise ValueError(
                f"{name} must be {list(expected)} beside q {list(q.shape)}, got {list(x.shape)}; pass heads before tokens, and "
                "angles of each row without a dimension for heads"
            )
    backend = resolve_backend(backend, *tensors)
    if backend == "reference":
        return rotary_reference(*tensors, eps)
    if backend == "triton":
        from jetlab_kernels.rotary import rotary as kernel

        return kernel(*tensors, eps)
    return tuple(_turn(_norm(x, weight, eps), cos, sin).to(x.dtype) for x, weight in ((q, q_weight), (k, k_weight)))


def rotary_reference(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """The definition in fp32 (fp64 stays fp64)."""
    core = core_dtype(q, k, cos)
    wide = [None if x is None else x.to(core) for x in (q, k, cos, sin, q_weight, k_weight)]
    q_wide, k_wide, cos, sin, q_weight, k_weight = wide
    new_q = _turn(_norm(q_wide, q_weight, eps), cos, sin)
    return new_q.to(q.dtype), _turn(_norm(k_wide, k_weight, eps), cos, sin).to(k.dtype)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return x if weight is None else F.rms_norm(x, weight.shape, weight, eps)


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]
