"""Rotary positions of queries and keys in one launch (arXiv:2104.09864), each head normed before if it has a weight.

    x̂ = x / sqrt(mean(x²) + eps) · weight        (x̂ = x without a weight)
    y = x̂ · cos + [-x̂₂, x̂₁] · sin                with x̂₁, x̂₂ the halves of a head's D channels

Reference: jetlab.ops.rotary.rotary_reference.

For one token this is a few kilobytes, and what it costs in PyTorch is its dozen launches.

Shapes: B batch, T time, H query heads, Hkv key heads, D channels.
q [B,H,T,D] · k [B,Hkv,T,D] · cos, sin [B,T,D] · q_weight, k_weight [D] or None
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jetlab_kernels.launch import check_device, check_format

N_WARPS = 1  # half a head is 64 numbers, two a thread


@triton.jit
def _turn(x_ptr, weight_ptr, y_ptr, cos_ptr, sin_ptr, eps, D: tl.constexpr, BC: tl.constexpr):
    """y of one head, whose x, cos and sin begin at these places."""
    c = tl.arange(0, BC)
    real, half = c < D // 2, D // 2
    first = tl.load(x_ptr + c, mask=real, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + half + c, mask=real, other=0.0).to(tl.float32)
    if weight_ptr is not None:
        n = tl.rsqrt((tl.sum(first * first, 0) + tl.sum(second * second, 0)) / D + eps)
        first *= n * tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
        second *= n * tl.load(weight_ptr + half + c, mask=real, other=0.0).to(tl.float32)
    y = first * tl.load(cos_ptr + c, mask=real, other=0.0).to(tl.float32)
    y -= second * tl.load(sin_ptr + c, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + c, y.to(y_ptr.dtype.element_ty), mask=real)
    y = second * tl.load(cos_ptr + half + c, mask=real, other=0.0).to(tl.float32)
    y += first * tl.load(sin_ptr + half + c, mask=real, other=0.0).to(tl.float32)
    tl.store(y_ptr + half + c, y.to(y_ptr.dtype.element_ty), mask=real)


@triton.jit
def _rotary(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_weight_ptr, k_weight_ptr, new_q_ptr, new_k_ptr, T,
    q_b, q_h, q_t, k_b, k_h, k_t, cos_b, cos_t, sin_b, sin_t, eps,
    H: tl.constexpr, HKV: tl.constexpr, D: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """New q and k, [B,T,H,D] in memory.  Grid (B · T, H + Hkv): one program owns one head of a token, those of k last."""
    row, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1)  # int64: B·T·H·D passes 2^31
    i_b, i_t = row // T, row % T
    cos_ptr += i_b * cos_b + i_t * cos_t
    sin_ptr += i_b * sin_b + i_t * sin_t
    if i_h < H:
        x_ptr = q_ptr + i_b * q_b + i_h.to(tl.int64) * q_h + i_t * q_t
        _turn(x_ptr, q_weight_ptr, new_q_ptr + (row * H + i_h) * D, cos_ptr, sin_ptr, eps, D, BC)
    else:
        x_ptr = k_ptr + i_b * k_b + (i_h - H).to(tl.int64) * k_h + i_t * k_t
        _turn(x_ptr, k_weight_ptr, new_k_ptr + (row * HKV + i_h - H) * D, cos_ptr, sin_ptr, eps, D, BC)


def rotary(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Normed and rotated q [B,H,T,D] and k [B,Hkv,T,D], each in its own dtype. There is no gradient.

    Tokens lie behind one another, heads within: what a transposed projection has. The caller has checked that shapes fit
    together.
    Raises ValueError for a dtype other than bf16, fp16 and fp32, or another device than a GPU's.
    """
    check_device(q, k, cos, sin, q_weight, k_weight)
    for x in (q, k, cos, sin):
        check_format(x)
    q, k, cos, sin = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, cos, sin))
    q_weight, k_weight = (None if x is None else x.contiguous() for x in (q_weight, k_weight))
    (B, H, T, D), HKV = q.shape, k.shape[1]
    new_q, new_k = (torch.empty(B, T, x.shape[1], D, dtype=x.dtype, device=x.device) for x in (q, k))
    strides = (*q.stride()[:3], *k.stride()[:3], *cos.stride()[:2], *sin.stride()[:2])
    with torch.cuda.device_of(q):
        _rotary[(B * T, H + HKV)](
            q, k, cos, sin, q_weight, k_weight, new_q, new_k, T, *strides, eps,
            H=H, HKV=HKV, D=D, BC=triton.next_power_of_2(D // 2), num_warps=N_WARPS,
        )  # fmt: skip
    return new_q.transpose(1, 2), new_k.transpose(1, 2)
