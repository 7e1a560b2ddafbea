"""Gated delta rule (arXiv:2412.06464) in chunks of 64 tokens, and without its correction gated linear attention.

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = scale · S_t^T q_t
    S_t = exp(g_t) S_{t-1} + k_t v_t^T                     without beta: RetNet, Mamba2, one log-decay a head

References: jetlab.ops.gated_delta_rule.gated_delta_rule_reference, jetlab.ops.gated_linear_attention
.gated_linear_attention_reference.

Inside a chunk, with G_t = Σ_{s≤t} g_s, Γ_ts = exp(G_t - G_s) for s ≤ t and 0 above, h the state before it, q and k
normalised, L = strictlower(diag(beta) K K^T ∘ Γ) and M = (I + L)^-1:

    A = scale Q K^T ∘ Γ                     X = M diag(beta) (V - e^G K h)                without beta X = V
    o = scale e^G Q h + A X                 h' = e^{G_C} h + (e^{G_C-G} K)^T X

Four kernels, read in this order. `_prepare` makes A and L of all chunks at once, `invert` (unit_lower.py) makes M;
`_scan` walks from chunk to chunk with h in registers and is the only part that takes turns: the state waits for three
products in a row, K h, M R and K^T X. Backwards `_scan` runs again, now keeping each h and X; `_scan_back` walks from the
end with dh; `_gradients` has both states of every chunk and does the rest for all of them at once:

    dX = A^T do + e^{G_C-G} K dh'           dY = M^T dX
    dh = e^{G_C} dh' + scale (e^G Q)^T do - (beta e^G K)^T dY

The norms of q and k are factors of a row, like beta and e^G, and rows of a product can be scaled behind it: q and k
enter the matrix units as they came, without a rounded normalised copy.

Shapes: B batch, T time, H heads, K key width, V value width, C = 64 tokens a chunk, N chunks in all rows or documents.
q, k [B,T,H,K] · v, o [B,T,H,V] · g, beta [B,T,H] · S [B,H,K,V] · per chunk and head: A, L, M [C,C], h [K,V], X [C,V],
rows [4,C]: G, 1/|q|, 1/|k|, beta
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from jetlab_kernels import MAX_HEAD_DIM
from jetlab_kernels.launch import check_device, check_format, dot_format, token_strides
from jetlab_kernels.unit_lower import SIDE, invert

CHUNK = SIDE
# Value channels that a program owns (of _gradients: takes at a time), depth of prefetching, warps; from
# records/h100/kernels/tuning.csv, ms of the whole call at 4 × 4096 tokens, 12 heads of 96 × 256 (_LARGE: 4 of 256 × 288).
# Retention alone (128 × 128) would take (64, 3, 4): forward 0.159 instead of 0.194.
SCAN = {"BV": 32, "STAGES": 3, "num_warps": 4}  # forward 0.448; (64, 1, 4) 0.455, (64, 3, 4) 0.499, (32, 2, 4) 0.571
SCAN_BACK = {"BV": 32, "STAGES": 3, "num_warps": 4}  # and back 1.603; (64, 3, 4) 1.601, (32, 2, 4) 1.743
SCAN_LARGE = {"BV": 32, "STAGES": 2, "num_warps": 4}  # K > 128, or fp32: 0.420; (64, 2, 8) 0.421, (16, 2, 4) 0.532
# GRADIENTS, and back: 1.603; (32, 4, 8) 1.640, (64, 2, 8) 1.664, (64, 2, 4) 2.086.
GRADIENTS = {"BV": 64, "STAGES": 3, "num_warps": 8}
GRADIENTS_LARGE = {"BV": 32, "STAGES": 2, "num_warps": 8}  # 1.780; (32, 3, 8) 1.761, (64, 2, 8) 1.731: no room in fp32
L2_EPS: tl.constexpr = tl.constexpr(1e-6)
# exp() of this is below the last bit of any state in fp32, and sums of 64 of them keep four digits of what follows.
LOWEST_LOG_DECAY: tl.constexpr = tl.constexpr(-50.0)


@triton.jit
def _span(i_s, T, first_ptr, cu_ptr, C: tl.constexpr, PACKED: tl.constexpr):
    """First chunk, number of chunks, first token and number of tokens of row or document i_s."""
    if PACKED:
        first = tl.load(first_ptr + i_s)
        n = tl.load(first_ptr + i_s + 1) - first
        begin = tl.load(cu_ptr + i_s)
        length = tl.load(cu_ptr + i_s + 1) - begin
    else:
        n = (T + C - 1) // C
        first = i_s * n
        begin = i_s * T
        length = T
    return first, n, begin.to(tl.int64), length


@triton.jit
def _chunk(i_n, T, owner_ptr, first_ptr, cu_ptr, C: tl.constexpr, PACKED: tl.constexpr):
    """First token of chunk i_n, and how many of its C tokens there are."""
    i_s = tl.load(owner_ptr + i_n) if PACKED else i_n // ((T + C - 1) // C)
    first, _, begin, length = _span(i_s, T, first_ptr, cu_ptr, C, PACKED)
    done = (i_n - first) * C
    return begin + done, tl.minimum(length - done, C)


@triton.jit
def _tile(ptr, n_rows, stride, i_col, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    """Rows 0 … ROWS-1 and columns i_col … of what begins at `ptr`; zeros beyond n_rows and WIDTH."""
    r = tl.arange(0, ROWS)
    c = i_col + tl.arange(0, COLS)
    mask = (r < n_rows)[:, None] & (c < WIDTH)[None, :]
    return tl.load(ptr + r[:, None] * stride + c[None, :], mask=mask, other=0.0)


@triton.jit
def _put_tile(ptr, x, n_rows, stride, i_col, WIDTH: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr):
    r = tl.arange(0, ROWS)
    c = i_col + tl.arange(0, COLS)
    mask = (r < n_rows)[:, None] & (c < WIDTH)[None, :]
    tl.store(ptr + r[:, None] * stride + c[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _square(ptr, C: tl.constexpr, DOT: tl.constexpr):
    """A whole [C,C] matrix."""
    r = tl.arange(0, C)
    return tl.load(ptr + r[:, None] * C + r[None, :]).to(DOT)


@triton.jit
def _row_factors(rows_ptr, C: tl.constexpr):
    """G, 1/|q|, 1/|k|, beta of a chunk's tokens, each [C], and G at its end."""
    t = tl.arange(0, C)
    G = tl.load(rows_ptr + t)
    return (
        G,
        tl.load(rows_ptr + C + t),
        tl.load(rows_ptr + 2 * C + t),
        tl.load(rows_ptr + 3 * C + t),
        tl.load(rows_ptr + C - 1),
    )


@triton.jit
def _decay(G, C: tl.constexpr):
    """Γ [C,C]: masked before the exponential, so that no exponent is positive."""
    t = tl.arange(0, C)
    return tl.exp(tl.where(t[:, None] >= t[None, :], G[:, None] - G[None, :], -float("inf")))


@triton.jit
def _prepare(
    q_ptr, k_ptr, g_ptr, beta_ptr, rows_ptr, a_ptr, l_ptr, owner_ptr, first_ptr, cu_ptr,
    T, q_t, q_h, k_t, k_h, scale,
    H: tl.constexpr, K: tl.constexpr, C: tl.constexpr, BK: tl.constexpr,
    NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Row factors, A and L of a chunk.  Grid (N, H): one program owns one chunk of one head."""
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, n = _chunk(i_n, T, owner_ptr, first_ptr, cu_ptr, C, PACKED)
    block = i_n * H + i_h
    t = tl.arange(0, C)
    real = t < n
    zeros = tl.zeros([C], dtype=tl.float32)
    G = zeros
    if g_ptr is not None:
        g = tl.load(g_ptr + (token + t) * H + i_h, mask=real, other=0.0).to(tl.float32)
        G = tl.cumsum(tl.maximum(g, LOWEST_LOG_DECAY, propagate_nan=tl.PropagateNan.ALL), 0)
    beta = zeros
    if beta_ptr is not None:
        beta = tl.load(beta_ptr + (token + t) * H + i_h, mask=real, other=0.0).to(tl.float32)

    q = _tile(q_ptr + token * q_t + i_h * q_h, n, q_t, 0, K, C, BK).to(DOT)
    k = _tile(k_ptr + token * k_t + i_h * k_h, n, k_t, 0, K, C, BK).to(DOT)
    q_norm, k_norm = zeros + 1.0, zeros + 1.0
    if NORM:
        q_norm = tl.rsqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1) + L2_EPS)
        k_norm = tl.rsqrt(tl.sum(k.to(tl.float32) * k.to(tl.float32), 1) + L2_EPS)
    rows_ptr += block * 4 * C
    tl.store(rows_ptr + t, G)
    tl.store(rows_ptr + C + t, q_norm)
    tl.store(rows_ptr + 2 * C + t, k_norm)
    tl.store(rows_ptr + 3 * C + t, beta)

    at = block * C * C + t[:, None] * C + t[None, :]
    gamma = _decay(G, C) * k_norm[None, :]
    a = tl.dot(q, tl.trans(k), input_precision=PRECISION) * gamma * (scale * q_norm)[:, None]
    tl.store(a_ptr + at, a.to(a_ptr.dtype.element_ty))
    if beta_ptr is not None:
        pairs = tl.dot(k, tl.trans(k), input_precision=PRECISION) * gamma * (beta * k_norm)[:, None]
        tl.store(l_ptr + at, tl.where(t[:, None] > t[None, :], pairs, 0.0))


@triton.jit
def _scan(
    q_ptr, k_ptr, v_ptr, rows_ptr, a_ptr, m_ptr, h0_ptr, o_ptr, hT_ptr, x_ptr, h_ptr, first_ptr, cu_ptr,
    T, q_t, q_h, k_t, k_h, v_t, v_h, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    OUTPUT: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """o and the last state, or (without OUTPUT) X and the state before each chunk.  Grid (rows · H · cdiv(V, BV),):
    one program owns BV value channels of one head and takes its chunks in turn."""
    n_v = (V + BV - 1) // BV
    i_v, i_sh = tl.program_id(0) % n_v * BV, tl.program_id(0) // n_v
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    first, n_chunks, begin, length = _span(i_s, T, first_ptr, cu_ptr, C, PACKED)
    state = (i_s * H + i_h) * K * V
    h = tl.zeros([BK, BV], dtype=tl.float32)
    if h0_ptr is not None:
        h = _tile(h0_ptr + state, K, V, i_v, V, BK, BV).to(tl.float32)
    for c in tl.range(0, n_chunks, num_stages=STAGES):
        block = (first + c) * H + i_h
        token = begin + c * C
        n = length - c * C
        G, q_norm, k_norm, beta, end = _row_factors(rows_ptr + block * 4 * C, C)
        k = _tile(k_ptr + token * k_t + i_h * k_h, n, k_t, 0, K, C, BK).to(DOT)
        x = _tile(v_ptr + token * v_t + i_h * v_h, n, v_t, i_v, V, C, BV)
        before = h.to(DOT)
        if not OUTPUT:
            _put_tile(h_ptr + block * K * V, h, K, V, i_v, V, BK, BV)
        if m_ptr is not None:
            held = tl.dot(k, before, input_precision=PRECISION) * (tl.exp(G) * k_norm)[:, None]
            wanted = (x.to(tl.float32) - held) * beta[:, None]
            x = tl.dot(_square(m_ptr + block * C * C, C, DOT), wanted.to(DOT), input_precision=PRECISION)
            if not OUTPUT:
                _put_tile(x_ptr + block * C * V, x, C, V, i_v, V, C, BV)
        if OUTPUT:
            q = _tile(q_ptr + token * q_t + i_h * q_h, n, q_t, 0, K, C, BK).to(DOT)
            o = tl.dot(q, before, input_precision=PRECISION) * (scale * tl.exp(G) * q_norm)[:, None]
            o = tl.dot(_square(a_ptr + block * C * C, C, DOT), x.to(DOT), o, input_precision=PRECISION)
            _put_tile(o_ptr + (token * H + i_h) * V, o, n, H * V, i_v, V, C, BV)
        writes = x.to(tl.float32) * (tl.exp(end - G) * k_norm)[:, None]
        h = tl.dot(tl.trans(k), writes.to(DOT), h * tl.exp(end), input_precision=PRECISION)
    if OUTPUT:
        _put_tile(hT_ptr + state, h, K, V, i_v, V, BK, BV)


@triton.jit
def _scan_back(
    q_ptr, k_ptr, do_ptr, rows_ptr, a_ptr, m_ptr, dhT_ptr, dy_ptr, dh_ptr, dh0_ptr, first_ptr, cu_ptr,
    T, q_t, q_h, k_t, k_h, do_t, do_h, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dY (without beta dX, which then is dv) and the gradient of the state behind each chunk.  Grid (rows · H · cdiv(V, BV),),
    owned as in `_scan`, chunks from the last to the first."""
    n_v = (V + BV - 1) // BV
    i_v, i_sh = tl.program_id(0) % n_v * BV, tl.program_id(0) // n_v
    i_s, i_h = i_sh // H, (i_sh % H).to(tl.int64)
    first, n_chunks, begin, length = _span(i_s, T, first_ptr, cu_ptr, C, PACKED)
    state = (i_s * H + i_h) * K * V
    dh = tl.zeros([BK, BV], dtype=tl.float32)
    if dhT_ptr is not None:
        dh = _tile(dhT_ptr + state, K, V, i_v, V, BK, BV).to(tl.float32)
    for back in tl.range(0, n_chunks, num_stages=STAGES):
        c = n_chunks - 1 - back
        block = (first + c) * H + i_h
        token = begin + c * C
        n = length - c * C
        G, q_norm, k_norm, beta, end = _row_factors(rows_ptr + block * 4 * C, C)
        q = _tile(q_ptr + token * q_t + i_h * q_h, n, q_t, 0, K, C, BK).to(DOT)
        k = _tile(k_ptr + token * k_t + i_h * k_h, n, k_t, 0, K, C, BK).to(DOT)
        do = _tile(do_ptr + token * do_t + i_h * do_h, n, do_t, i_v, V, C, BV).to(DOT)
        _put_tile(dh_ptr + block * K * V, dh, K, V, i_v, V, BK, BV)
        dx = tl.dot(k, dh.to(DOT), input_precision=PRECISION) * (tl.exp(end - G) * k_norm)[:, None]
        dx = tl.dot(tl.trans(_square(a_ptr + block * C * C, C, DOT)), do, dx, input_precision=PRECISION)
        read = do.to(tl.float32) * (scale * tl.exp(G) * q_norm)[:, None]
        dh = tl.dot(tl.trans(q), read.to(DOT), dh * tl.exp(end), input_precision=PRECISION)
        if m_ptr is not None:
            dy = tl.dot(tl.trans(_square(m_ptr + block * C * C, C, DOT)), dx.to(DOT), input_precision=PRECISION)
            held = dy * (-beta * tl.exp(G) * k_norm)[:, None]
            dh = tl.dot(tl.trans(k), held.to(DOT), dh, input_precision=PRECISION)
            _put_tile(dy_ptr + block * C * V, dy, C, V, i_v, V, C, BV)
        else:
            _put_tile(dy_ptr + (token * H + i_h) * V, dx, n, H * V, i_v, V, C, BV)
    if dh0_ptr is not None:
        _put_tile(dh0_ptr + state, dh, K, V, i_v, V, BK, BV)


@triton.jit
def _gradients(
    q_ptr, k_ptr, v_ptr, do_ptr, rows_ptr, x_ptr, dy_ptr, h_ptr, dh_ptr,
    dq_ptr, dk_ptr, dv_ptr, dg_ptr, dbeta_ptr, owner_ptr, first_ptr, cu_ptr,
    T, q_t, q_h, k_t, k_h, v_t, v_h, do_t, do_h, scale,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    NORM: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, PACKED: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of q, k, g, and with beta of v and beta, from both states of a chunk.  Grid (N, H): one program owns one
    chunk of one head and all its channels, because the norms' gradients sum over K and those of g and beta over V too.

    Products in the loop over V take their factors as they lie in memory; what scales the products' rows is behind it.

    G_t collects what each factor e^{G_t - G_s} meets: + for the row that reads, - for the row that is read. With
    B = dA ∘ A and D = -beta dL ∘ (K K^T ∘ Γ) of all pairs inside the chunk, dL = dY X^T below the diagonal, what a key
    reads R = e^G dY h^T and what it writes E = e^{G_C-G} X dh'^T:

        dG_t = Σ_s (B + D)_ts - Σ_s (B + D)_st + q_t·(scale e^G dO h^T)_t - beta k_t·R_t - k_t·E_t
        dG_C += e^{G_C} <h, dh'> + Σ_t k_t·E_t

    Each of these sums of one sign reappears with the other, from the same fp32 numbers: what must cancel in the sums of
    dG that make dg, does. Then dbeta = dY·v - k·R - Σ_s (dL ∘ K K^T ∘ Γ)_ts.
    """
    i_n, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    token, n = _chunk(i_n, T, owner_ptr, first_ptr, cu_ptr, C, PACKED)
    block = i_n * H + i_h
    t = tl.arange(0, C)
    da, dl = tl.zeros([C, C], dtype=tl.float32), tl.zeros([C, C], dtype=tl.float32)
    dq, written, read = (
        tl.zeros([C, BK], dtype=tl.float32),
        tl.zeros([C, BK], dtype=tl.float32),
        tl.zeros([C, BK], dtype=tl.float32),
    )
    dbeta, kept = tl.zeros([C], dtype=tl.float32), tl.zeros([BK], dtype=tl.float32)
    for i_v in tl.range(0, V, BV, num_stages=STAGES):
        do = _tile(do_ptr + token * do_t + i_h * do_h, n, do_t, i_v, V, C, BV).to(DOT)
        h = _tile(h_ptr + block * K * V, K, V, i_v, V, BK, BV).to(DOT)
        dh = _tile(dh_ptr + block * K * V, K, V, i_v, V, BK, BV).to(DOT)
        if x_ptr is not None:
            x = _tile(x_ptr + block * C * V, C, V, i_v, V, C, BV).to(DOT)
            dy = _tile(dy_ptr + block * C * V, C, V, i_v, V, C, BV).to(DOT)
            dl = tl.dot(dy, tl.trans(x), dl, input_precision=PRECISION)
            read = tl.dot(dy, tl.trans(h), read, input_precision=PRECISION)
        else:
            x = _tile(v_ptr + token * v_t + i_h * v_h, n, v_t, i_v, V, C, BV).to(DOT)
        da = tl.dot(do, tl.trans(x), da, input_precision=PRECISION)
        dq = tl.dot(do, tl.trans(h), dq, input_precision=PRECISION)
        written = tl.dot(x, tl.trans(dh), written, input_precision=PRECISION)
        kept += tl.sum(h.to(tl.float32) * dh.to(tl.float32), 1)
        if x_ptr is not None:
            v = _tile(v_ptr + token * v_t + i_h * v_h, n, v_t, i_v, V, C, BV).to(tl.float32)
            wide = dy.to(tl.float32)
            dbeta += tl.sum(wide * v, 1)
            beta = tl.load(rows_ptr + (block * 4 + 3) * C + t)
            _put_tile(dv_ptr + (token * H + i_h) * V, wide * beta[:, None], n, H * V, i_v, V, C, BV)

    G, q_norm, k_norm, beta, end = _row_factors(rows_ptr + block * 4 * C, C)
    q = _tile(q_ptr + token * q_t + i_h * q_h, n, q_t, 0, K, C, BK).to(DOT)
    k = _tile(k_ptr + token * k_t + i_h * k_h, n, k_t, 0, K, C, BK).to(DOT)
    gamma = _decay(G, C) * k_norm[None, :]
    wide = q.to(tl.float32)
    dq *= (scale * tl.exp(G) * q_norm)[:, None]
    dG = tl.sum(wide * dq, 1)
    da *= gamma * (scale * q_norm)[:, None]
    pairs = da * tl.dot(q, tl.trans(k), input_precision=PRECISION)
    dG += tl.sum(pairs, 1) - tl.sum(pairs, 0)
    dq = tl.dot(da.to(DOT), k, dq, input_precision=PRECISION)
    if NORM:
        dq -= wide * (tl.sum(wide * dq, 1) * q_norm * q_norm)[:, None]
    _put_tile(dq_ptr + (token * H + i_h) * K, dq, n, H * K, 0, K, C, BK)

    wide = k.to(tl.float32)
    written *= (tl.exp(end - G) * k_norm)[:, None]
    faded = tl.sum(wide * written, 1)
    dG += tl.where(t == C - 1, tl.sum(kept, 0) * tl.exp(end) + tl.sum(faded, 0), 0.0) - faded
    dk = tl.dot(tl.trans(da.to(DOT)), q, written, input_precision=PRECISION)
    if x_ptr is not None:
        read *= (tl.exp(G) * k_norm)[:, None]
        held = tl.sum(wide * read, 1)
        dk -= read * beta[:, None]
        dl = tl.where(t[:, None] > t[None, :], dl, 0.0) * gamma * k_norm[:, None]
        pairs = dl * tl.dot(k, tl.trans(k), input_precision=PRECISION)
        later = tl.sum(pairs, 1)
        tl.store(dbeta_ptr + (token + t) * H + i_h, dbeta - held - later, mask=t < n)
        dG -= beta * (held + later) - tl.sum(beta[:, None] * pairs, 0)
        dl = (dl * -beta[:, None]).to(DOT)
        dk = tl.dot(dl, k, dk, input_precision=PRECISION)
        dk = tl.dot(tl.trans(dl), k, dk, input_precision=PRECISION)
    if dg_ptr is not None:
        tl.store(dg_ptr + (token + t) * H + i_h, tl.cumsum(dG, 0, reverse=True), mask=t < n)
    if NORM:
        dk -= wide * (tl.sum(wide * dk, 1) * k_norm * k_norm)[:, None]
    _put_tile(dk_ptr + (token * H + i_h) * K, dk, n, H * K, 0, K, C, BK)


class _Chunks(NamedTuple):
    """How tokens fall into chunks: rows of equal length, or documents with tables of where each begins."""

    n_chunks: int
    n_rows: int  # rows or documents
    owner: Tensor | None = None  # [N] document of each chunk
    first: Tensor | None = None  # [documents + 1] first chunk of each
    cu_seqlens: Tensor | None = None

    @classmethod
    def of(cls, B: int, T: int, cu_seqlens: Tensor | None) -> "_Chunks":
        if cu_seqlens is None:
            return cls(B * triton.cdiv(T, CHUNK), B)
        # The number of chunks must be read off the GPU, which waits: kept on the tensor, whose every layer asks the same.
        if torch.compiler.is_compiling() or cu_seqlens.is_inference():
            return cls._of_documents(cu_seqlens)
        version, chunks = vars(cu_seqlens).get("_chunks", (None, None))
        if version != cu_seqlens._version:
            chunks = cls._of_documents(cu_seqlens)
            vars(cu_seqlens)["_chunks"] = cu_seqlens._version, chunks
        return chunks

    @classmethod
    def _of_documents(cls, cu_seqlens: Tensor) -> "_Chunks":
        cu_seqlens = cu_seqlens.to(torch.int32)
        counts = (cu_seqlens.diff() + CHUNK - 1) // CHUNK
        first = torch.nn.functional.pad(counts.cumsum(0, dtype=torch.int32), (1, 0))
        owner = torch.repeat_interleave(torch.arange(len(counts), dtype=torch.int32, device=first.device), counts)
        return cls(len(owner), len(counts), owner, first, cu_seqlens)


def _tiles(tiles: dict, K: int, V: int) -> dict:
    """`tiles` for heads of K key and V value channels. Of 16 value channels eight warps would make two products of 8."""
    BV = min(tiles["BV"], _power_of_two(V))
    return tiles | {"BK": _power_of_two(K), "BV": BV, "num_warps": tiles["num_warps"] if BV > 16 else 4}


def _is_large(K: int, dtype: torch.dtype) -> bool:
    """Whether the state of a scan and its factors leave registers and shared memory for one chunk at a time only."""
    return K > 128 or dtype == torch.float32


def _power_of_two(width: int) -> int:
    """The smallest width of a tile that holds `width` columns; a product takes at least 16."""
    return max(16, triton.next_power_of_2(width))


class _GatedDeltaRule(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, scale, qk_l2norm, cu_seqlens):
        B, T, H, K = q.shape
        V, device = v.shape[-1], q.device
        chunks = _Chunks.of(B, T, cu_seqlens)
        N = chunks.n_chunks
        (q, q_t, q_h), (k, k_t, k_h), (v, v_t, v_h) = (token_strides(x) for x in (q, k, v))
        g, beta, state = (None if x is None else x.contiguous() for x in (g, beta, state))
        dots = dot_format(v.dtype)

        rows = torch.empty(N, H, 4, CHUNK, dtype=torch.float32, device=device)
        a = torch.empty(N, H, CHUNK, CHUNK, dtype=v.dtype, device=device)
        lower = None if beta is None else torch.empty_like(a, dtype=torch.float32)
        tables = {"first_ptr": chunks.first, "cu_ptr": chunks.cu_seqlens, "PACKED": cu_seqlens is not None}
        _prepare[(N, H)](
            q, k, g, beta, rows, a, lower, chunks.owner,
            T=T, q_t=q_t, q_h=q_h, k_t=k_t, k_h=k_h, scale=scale,
            H=H, K=K, C=CHUNK, BK=_power_of_two(K), NORM=qk_l2norm, num_warps=4, **dots, **tables,
        )  # fmt: skip
        inverse = None if beta is None else invert(lower, v.dtype)

        o = torch.empty(B, T, H, V, dtype=v.dtype, device=device)
        last = torch.empty(chunks.n_rows, H, K, V, dtype=torch.float32, device=device)
        options = _tiles(SCAN_LARGE if _is_large(K, v.dtype) else SCAN, K, V)
        _scan[(chunks.n_rows * H * triton.cdiv(V, options["BV"]),)](
            q, k, v, rows, a, inverse, state, o, last, None, None,
            T=T, q_t=q_t, q_h=q_h, k_t=k_t, k_h=k_h, v_t=v_t, v_h=v_h, scale=scale,
            H=H, K=K, V=V, C=CHUNK, OUTPUT=True, **options, **dots, **tables,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, g, beta, state, rows, a, inverse, *chunks[2:])
        ctx.options = scale, qk_l2norm, chunks[:2]
        return o, last

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dlast):
        q, k, v, g, beta, state, rows, a, inverse, *tables = ctx.saved_tensors
        scale, qk_l2norm, counts = ctx.options
        chunks = _Chunks(*counts, *tables)
        N, delta = chunks.n_chunks, beta is not None
        (B, T, H, K), V, device = q.shape, v.shape[-1], q.device
        (q, q_t, q_h), (k, k_t, k_h), (v, v_t, v_h), (do, do_t, do_h) = (token_strides(x) for x in (q, k, v, do))
        strides = {"T": T, "q_t": q_t, "q_h": q_h, "k_t": k_t, "k_h": k_h}
        sizes = {"H": H, "K": K, "V": V, "C": CHUNK}
        tables = {"first_ptr": chunks.first, "cu_ptr": chunks.cu_seqlens, "PACKED": chunks.owner is not None}
        dots, large = dot_format(v.dtype), _is_large(K, v.dtype)
        options = _tiles(SCAN_LARGE if large else SCAN, K, V)
        grid = (chunks.n_rows * H * triton.cdiv(V, options["BV"]),)

        states = torch.empty(N, H, K, V, dtype=v.dtype, device=device)
        x = torch.empty(N, H, CHUNK, V, dtype=v.dtype, device=device) if delta else None
        _scan[grid](
            q, k, v, rows, a, inverse, state, None, None, x, states,
            v_t=v_t, v_h=v_h, scale=scale, OUTPUT=False, **strides, **sizes, **options, **dots, **tables,
        )  # fmt: skip

        dstates = torch.empty_like(states)
        dstate = None if state is None else torch.empty_like(state, dtype=torch.float32)
        dv = torch.empty(B, T, H, V, dtype=v.dtype, device=device)
        dy = torch.empty_like(x) if delta else None
        options = _tiles(SCAN_LARGE if large else SCAN_BACK, K, V)
        grid = (chunks.n_rows * H * triton.cdiv(V, options["BV"]),)
        _scan_back[grid](
            q, k, do, rows, a, inverse, dlast.contiguous(), dy if delta else dv, dstates, dstate,
            do_t=do_t, do_h=do_h, scale=scale, **strides, **sizes, **options, **dots, **tables,
        )  # fmt: skip

        dq, dk = (torch.empty(B, T, H, K, dtype=v.dtype, device=device) for _ in range(2))
        dg, dbeta = (
            None if gate is None else torch.empty(B, T, H, dtype=torch.float32, device=device) for gate in (g, beta)
        )
        _gradients[(N, H)](
            q, k, v, do, rows, x, dy, states, dstates, dq, dk, dv, dg, dbeta, chunks.owner,
            v_t=v_t, v_h=v_h, do_t=do_t, do_h=do_h, scale=scale,
            NORM=qk_l2norm, **strides, **sizes, **_tiles(GRADIENTS_LARGE if large else GRADIENTS, K, V), **dots, **tables,
        )  # fmt: skip
        dg, dbeta = (None if x is None else x.to(gate.dtype) for x, gate in ((dg, g), (dbeta, beta)))
        dstate = None if state is None else dstate.to(state.dtype)
        return dq, dk, dv, dg, dbeta, dstate, None, None, None


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """Outputs o [B,T,H,V] in v's dtype and the state after the last token in fp32, as `jetlab.ops.gated_delta_rule`.

    Without `beta` the values are written as they come: `jetlab.ops.gated_linear_attention` with one decay a head.
    q, k, v are bf16, fp16 or fp32, of one dtype and any strides; K ≤ 256, in fp32 ≤ 128, and no width need be a power of
    two. Log-decays below -50 count as -50. The gradient can be taken once. The caller has checked that shapes fit together.
    Raises ValueError for another dtype, another device than a GPU's, or a wider head.
    """
    check_device(q, k, v, g, beta, state, cu_seqlens)
    check_format(v)
    K, limit = q.shape[-1], MAX_HEAD_DIM[v.dtype]
    if limit < K:
        raise ValueError(
            f"a head of the Triton kernels has K ≤ {limit} in {v.dtype}, got {K}; use more heads, or backend='chunked'"
        )
    scale = float(K**-0.5 if scale is None else scale)
    with torch.cuda.device_of(v):
        return _GatedDeltaRule.apply(q, k, v, g, beta, state, scale, qk_l2norm, cu_seqlens)
