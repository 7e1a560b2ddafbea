"""Softmax attention of one new token over a preallocated cache, each key and value read once.

    y = Σ_j softmax_j(scale · qᵀ k_j) v_j        over the slots j that hold a visible token

Reference: jetlab.ops.decode_attention.decode_attention_reference.

A token's attention is bound by the bytes of its keys and values, and one sequence has few heads: so the slots are split
among many programs. `_split` gives each a run of slots of one key-value head, which it reads once for all query heads of the
group; it leaves the maximum of its scores, the sum of their exponentials and the weighted sum of values. `_join` puts the
parts of a row together. How many tokens there are is read on the device, and a program without a slot reads no key and leaves
an empty part: a captured graph serves every length, and rows may begin at different tokens.

Slot j holds the last token p < end with p mod C = j. A cache longer than the context is read up to `end` alone; in a ring
that has gone round every slot is filled.

Shapes: B batch, G query heads for each of Hkv key-value heads, C slots, D channels, P parts.
q, y [B, Hkv·G, D] · keys, values [B, Hkv, C, D] · start [B], end [] · sums [B, Hkv·G, P, D] and edges [B, Hkv·G, P, 2] in fp32
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jetlab_kernels.launch import check_device, check_format, dot_format

# Slots that a program takes at a time, depth of prefetching, warps. On an H200, ms at 128 rows of 2 heads × 65,536 × 128 in
# bf16: 1.895; with 4096 PROGRAMS 1.918, and then (128, 2, 4) 1.904, (64, 4, 4) 1.910, (32, 4, 4) 1.969; with 1056 2.057. The
# run of records/h200/kernels has 1.892, and 1.877 for PyTorch's cuDNN backend, which needs the length on the host.
TILE = {"BN": 64, "STAGES": 3, "num_warps": 4}
# Beyond 128 channels: 0.491 (cuDNN 0.624) at 32 rows of 65,536 × 256; in fp32 a third stage has no room.
TILE_WIDE = {"BN": 64, "STAGES": 2, "num_warps": 4}
PROGRAMS = 2048  # enough waves that the last, which is not full, costs little
FULL = 264  # programs that fill an H100: a cache is cut into so many parts, be they short
LONG_PART = 1024  # slots; into more parts than FULL only if they keep about so many, since each has to be joined


@triton.jit
def _split(
    q_ptr, k_ptr, v_ptr, start_ptr, end_ptr, sums_ptr, edges_ptr,
    q_b, q_h, kv_b, kv_h, C, P, scale,
    HKV: tl.constexpr, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, BN: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Grid (P, B · Hkv): one program owns a run of slots of one key-value head of one row."""
    i_p, i_bh = tl.program_id(0), tl.program_id(1)
    i_b, i_h = (i_bh // HKV).to(tl.int64), (i_bh % HKV).to(tl.int64)
    end = tl.load(end_ptr).to(tl.int32)
    start = 0
    if start_ptr is not None:
        start = tl.load(start_ptr + i_b).to(tl.int32)
    first = tl.where(end <= C, start, 0)
    last = tl.minimum(end, C)
    each = tl.cdiv(tl.cdiv(last - first, P), BN) * BN
    low = first + i_p * each
    high = tl.minimum(low + each, last)

    g, d, n = tl.arange(0, BG), tl.arange(0, BD), tl.arange(0, BN)
    real = (g < G)[:, None] & (d < D)[None, :]
    q = tl.load(q_ptr + i_b * q_b + (i_h * G + g)[:, None] * q_h + d[None, :], mask=real, other=0.0).to(DOT)
    k_ptr += i_b * kv_b + i_h * kv_h
    v_ptr += i_b * kv_b + i_h * kv_h
    top = tl.full([BG], -float("inf"), tl.float32)
    total = tl.zeros([BG], tl.float32)
    sums = tl.zeros([BG, BD], tl.float32)
    for slot in tl.range(low, high, BN, num_stages=STAGES):
        j = slot + n
        inside = (j < high)[:, None] & (d < D)[None, :]
        at = j.to(tl.int64)[:, None] * D + d[None, :]
        k = tl.load(k_ptr + at, mask=inside, other=0.0).to(DOT)
        v = tl.load(v_ptr + at, mask=inside, other=0.0).to(DOT)
        position = tl.where(end <= C, j, end - 1 - (end - 1 - j) % C)
        seen = (j < high) & (position >= start)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * 1.4426950408889634)
        scores = tl.where(seen[None, :], scores, -float("inf"))
        higher = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(higher == -float("inf"), 0.0, higher)  # nothing seen so far: 2^-inf, not 2^nan
        weights = tl.exp2(scores - base[:, None])
        faded = tl.exp2(top - base)
        total = total * faded + tl.sum(weights, 1)
        sums = tl.dot(weights.to(DOT), v, sums * faded[:, None], input_precision=PRECISION)
        top = higher
    head = (i_b * HKV + i_h) * G + g
    tl.store(sums_ptr + (head * P + i_p)[:, None] * D + d[None, :], sums, mask=real)
    tl.store(edges_ptr + (head * P + i_p) * 2, top, mask=g < G)
    tl.store(edges_ptr + (head * P + i_p) * 2 + 1, total, mask=g < G)


@triton.jit
def _join(sums_ptr, edges_ptr, y_ptr, P, D: tl.constexpr, BP: tl.constexpr, BD: tl.constexpr):
    """Grid (B · Hkv · G,): one program owns one query head of one row."""
    head = tl.program_id(0).to(tl.int64)
    p, d = tl.arange(0, BP), tl.arange(0, BD)
    top = tl.load(edges_ptr + (head * P + p) * 2, mask=p < P, other=-float("inf"))
    total = tl.load(edges_ptr + (head * P + p) * 2 + 1, mask=p < P, other=0.0)
    weights = tl.exp2(top - tl.max(top, 0))
    real = (p < P)[:, None] & (d < D)[None, :]
    sums = tl.load(sums_ptr + (head * P + p)[:, None] * D + d[None, :], mask=real, other=0.0)
    y = tl.sum(sums * weights[:, None], 0) / tl.sum(total * weights, 0)
    tl.store(y_ptr + head * D + d, y.to(y_ptr.dtype.element_ty), mask=d < D)


def decode_attention(
    q: Tensor, keys: Tensor, values: Tensor, *, end: Tensor, start: Tensor | None = None, scale: float | None = None
) -> Tensor:
    """y [B, Hkv·G, D] in q's dtype. Each row must have a visible token. There is no gradient.

    Raises ValueError if shapes or strides do not fit together, for a dtype other than bf16, fp16 and fp32, or for another
    device than a GPU's.
    """
    check_device(q, keys, values, end, start)
    check_format(q)
    (B, H, D), (rows, HKV, C, width) = q.shape, keys.shape
    if (rows, width) != (B, D) or H % HKV or values.shape != keys.shape or end.numel() != 1:
        raise ValueError(
            f"keys and values must be [{B}, Hkv, C, {D}] with Hkv a divisor of {H}, and end one number, beside q {[B, H, D]}; "
            f"got {list(keys.shape)}, {list(values.shape)} and {list(end.shape)}"
        )
    if keys.stride() != values.stride() or keys.stride()[2:] != (D, 1):
        raise ValueError(
            f"keys and values must lie alike, with whole slots behind one another, got strides {keys.stride()} and "
            f"{values.stride()}; take views of one cache along its rows and heads alone"
        )
    q = q if q.stride(-1) == 1 else q.contiguous()
    tile = TILE if D <= 128 and q.dtype != torch.float32 else TILE_WIDE
    enough = max(triton.cdiv(C, LONG_PART), triton.cdiv(FULL, B * HKV))
    P = min(enough, triton.cdiv(PROGRAMS, B * HKV), triton.cdiv(C, tile["BN"]))
    sums = torch.empty(B, H, P, D, dtype=torch.float32, device=q.device)
    edges = torch.empty(B, H, P, 2, dtype=torch.float32, device=q.device)
    y = torch.empty(B, H, D, dtype=q.dtype, device=q.device)
    BD = max(16, triton.next_power_of_2(D))
    with torch.cuda.device_of(q):
        _split[(P, B * HKV)](
            q, keys, values, start, end, sums, edges, q.stride(0), q.stride(1), keys.stride(0), keys.stride(1), C, P,
            float(D**-0.5 if scale is None else scale),
            HKV=HKV, G=H // HKV, D=D, BG=max(16, triton.next_power_of_2(H // HKV)), BD=BD, **dot_format(q.dtype), **tile,
        )  # fmt: skip
        _join[(B * H,)](sums, edges, y, P, D=D, BP=triton.next_power_of_2(P), BD=BD)
    return y
