"""RMSNorm with an output gate, in one pass over memory (arXiv:2307.08621).

    n = 1 / sqrt(mean(o²) + eps)                y = o · n · weight · SiLU(z)

Reference: jetlab.layers.norm.GatedRMSNorm. In PyTorch every factor is a pass of its own over tensors in fp32, about ten
times the bytes that must move; nothing here is computed twice. Backward, with s = SiLU(z), e = dy · weight · s:

    do = n (e - o n² mean(e o))                 dz = dy · o · n · weight · SiLU'(z)         dweight = Σ dy · o · n · s

Shapes: B batch, T time, H heads, V width of a head.   o, z, y [B,T,H,V] · weight [V], one for all heads
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from jetlab_kernels.launch import check_device, check_format, token_strides

# From records/h100/kernels/tuning.csv, forward and back at 4 × 4096 × 12 × 256: 0.305 ms, others 0.296 to 0.345.
ROWS = 8  # rows of a tile
TILES = 16  # tiles of a program going back, which adds up their shares in the weight's gradient
N_WARPS = 4


@triton.jit
def _rows(i, n_rows, o_t, o_h, z_t, z_h, H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr):
    """Places of a tile's numbers in o, in z and in a contiguous tensor, and which of them there are."""
    row = i * ROWS + tl.arange(0, ROWS)
    c = tl.arange(0, BV)
    token, head = (row // H).to(tl.int64)[:, None], (row % H)[:, None]
    inside = (row < n_rows)[:, None] & (c < V)[None, :]
    at = row.to(tl.int64)[:, None] * V + c[None, :]
    return token * o_t + head * o_h + c[None, :], token * z_t + head * z_h + c[None, :], at, inside


@triton.jit
def _norm_forward(
    o_ptr, z_ptr, weight_ptr, y_ptr, n_rows, o_t, o_h, z_t, z_h, eps,
    H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """y.  Grid (cdiv(rows, ROWS),): one program owns ROWS heads of tokens."""
    o_at, z_at, at, inside = _rows(tl.program_id(0), n_rows, o_t, o_h, z_t, z_h, H, V, ROWS, BV)
    c = tl.arange(0, BV)
    weight = tl.load(weight_ptr + c, mask=c < V, other=0.0).to(tl.float32)
    o = tl.load(o_ptr + o_at, mask=inside, other=0.0).to(tl.float32)
    z = tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
    n = tl.rsqrt(tl.sum(o * o, 1) / V + eps)
    y = o * n[:, None] * weight[None, :] * z * tl.sigmoid(z)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _norm_backward(
    o_ptr, z_ptr, weight_ptr, dy_ptr, do_ptr, dz_ptr, dweight_ptr, n_rows, o_t, o_h, z_t, z_h, dy_t, dy_h, eps,
    H: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr, BV: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """do, dz and a share of dweight.  Grid (cdiv(rows, ROWS · TILES),): one program owns TILES tiles in a row."""
    c = tl.arange(0, BV)
    weight = tl.load(weight_ptr + c, mask=c < V, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros([ROWS, BV], dtype=tl.float32)
    for tile in range(TILES):
        i = tl.program_id(0) * TILES + tile
        o_at, z_at, at, inside = _rows(i, n_rows, o_t, o_h, z_t, z_h, H, V, ROWS, BV)
        dy_at, _, _, _ = _rows(i, n_rows, dy_t, dy_h, 0, 0, H, V, ROWS, BV)
        o = tl.load(o_ptr + o_at, mask=inside, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + z_at, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + dy_at, mask=inside, other=0.0).to(tl.float32)
        n = tl.rsqrt(tl.sum(o * o, 1) / V + eps)[:, None]
        open_ = tl.sigmoid(z)
        silu = z * open_
        e = dy * weight * silu
        do = n * (e - o * n * n * (tl.sum(e * o, 1) / V)[:, None])
        dz = dy * o * n * weight * (open_ + silu * (1 - open_))
        dweight += dy * o * n * silu
        tl.store(do_ptr + at, do.to(do_ptr.dtype.element_ty), mask=inside)
        tl.store(dz_ptr + at, dz.to(dz_ptr.dtype.element_ty), mask=inside)
    tl.store(dweight_ptr + tl.program_id(0).to(tl.int64) * V + c, tl.sum(dweight, 0), mask=c < V)


class _GatedRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, o, z, weight, eps):
        (o, o_t, o_h), (z, z_t, z_h) = token_strides(o), token_strides(z)
        B, T, H, V = o.shape
        y = torch.empty(B, T, H, V, dtype=o.dtype, device=o.device)
        n_rows, BV = B * T * H, triton.next_power_of_2(V)
        _norm_forward[(triton.cdiv(n_rows, ROWS),)](
            o, z, weight, y, n_rows, o_t, o_h, z_t, z_h, eps, H=H, V=V, ROWS=ROWS, BV=BV, num_warps=N_WARPS
        )
        ctx.save_for_backward(o, z, weight)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        o, z, weight = ctx.saved_tensors
        (o, o_t, o_h), (z, z_t, z_h), (dy, dy_t, dy_h) = (token_strides(x) for x in (o, z, dy))
        B, T, H, V = o.shape
        n_rows, BV = B * T * H, triton.next_power_of_2(V)
        n_programs = triton.cdiv(n_rows, ROWS * TILES)
        do, dz = (torch.empty(B, T, H, V, dtype=x.dtype, device=x.device) for x in (o, z))
        dweight = torch.empty(n_programs, V, dtype=torch.float32, device=o.device)
        _norm_backward[(n_programs,)](
            o, z, weight, dy, do, dz, dweight, n_rows, o_t, o_h, z_t, z_h, dy_t, dy_h, ctx.eps,
            H=H, V=V, ROWS=ROWS, BV=BV, TILES=TILES, num_warps=N_WARPS,
        )  # fmt: skip
        return do, dz, dweight.sum(0).to(weight.dtype), None


def gated_rms_norm(o: Tensor, z: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y [B,T,H,V] in o's dtype, all of it in fp32 until then. The gradient can be taken once.

    o and z have any strides. The caller has checked that shapes fit together.
    Raises ValueError for a dtype other than bf16, fp16 and fp32, or another device than a GPU's.
    """
    check_device(o, z, weight)
    for x in (o, z):
        check_format(x)
    with torch.cuda.device_of(o):
        return _GatedRMSNorm.apply(o, z, weight, eps)
