"""Gated linear attention (arXiv:2312.06635): a sum of key-value products that fades.

    S_t = diag(exp(g_t)) S_{t-1} + k_t v_t^T        o_t = scale · S_t^T q_t

One log-decay per head serves RetNet (arXiv:2307.08621, constant) and Mamba2 (arXiv:2405.21060), one per key channel GLA.

Shapes: B batch, T time, H heads, K key width, V value width.
q, k [B,T,H,K] · v, o [B,T,H,V] · g [B,T,H] or [B,T,H,K] · S [B,H,K,V]
"""

from functools import partial

import torch
from torch import Tensor

from jetlab.ops.chunks import (
    chunk_length,
    default_chunk_size,
    from_chunks,
    head_decay,
    power_of_two,
    to_chunks,
    until_end,
)
from jetlab.ops.decay import decayed_products
from jetlab.ops.recurrence import check_gate, check_values, core_dtype, l2_normalize, recur

CHUNK_PER_CHANNEL = 64  # within 5 % of the fastest of 8 … 64 on one CPU thread at key widths 8, 16, 64, 128


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    *,
    scale: float | None = None,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    qk_l2norm: bool = False,
    g_min: float | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Outputs o [B,T,H,V] in v's dtype, and the state after the last token [B,H,K,V] in fp32 (fp64 stays fp64).

    `g` is the log-decay (≤ 0, -inf forgets everything; None is no decay). `scale` defaults to K^-1/2. `qk_l2norm` divides
    q and k by sqrt(Σx² + 1e-6) per head first. With `cu_seqlens` [N+1] the row (B = 1) holds N documents, each starting
    from its own state: `state` in and out is [N,H,K,V]. `chunk_size` is the number of tokens solved together by the
    chunked form, rounded up to a power of two for a decay per channel; it changes the speed and not the result. `g_min`,
    a bound on g that other forms use to split exponentials, has no effect: here no exponent is positive whatever g is.
    `backend="triton"` takes one decay per head, bf16, fp16 and fp32 on a GPU, K ≤ 256 (fp32: 128).
    Raises ValueError if shapes do not fit together, `backend` or `chunk_size` is not a choice that exists, or a kernel
    does not take these inputs.
    """
    check_values(q, k, v)
    check_gate("g", g, q, per_channel=True)
    return recur(
        gated_linear_attention_reference,
        gated_linear_attention_chunked,
        {"q": q, "k": k, "v": v, "g": g},
        kernel=None if g is not None and g.ndim == 4 else _kernel,
        scale=scale,
        state=state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        backend=backend,
    )


def _kernel():
    from jetlab_kernels.gated_delta_rule import gated_delta_rule

    return partial(gated_delta_rule, beta=None)


def gated_linear_attention_reference(q, k, v, g, *, scale=None, state=None, qk_l2norm=False):
    """Token-by-token definition in fp32 (fp64 stays fp64). Returns (o, final state)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, core = v.dtype, core_dtype(q, v, state)
    q, k, v = (x.to(core) for x in (q, k, v))
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    B, T, H, K = k.shape
    g = k.new_zeros(B, T, H) if g is None else g.to(core)
    g = (g if g.ndim == 4 else g[..., None]).expand_as(k)
    S = k.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(core)
    outputs = []
    for t in range(T):
        S = S * g[:, t, :, :, None].exp()  # forget [B,H,K,V]
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return torch.stack(outputs, dim=1).to(dtype), S


def gated_linear_attention_chunked(q, k, v, g, *, scale=None, state=None, qk_l2norm=False, chunk_size=None):
    """Chunkwise-parallel form: inside a chunk a product of queries and keys, between chunks the state.

    With G_t = Σ_{s≤t} g_s inside a chunk of C tokens and h the state before it:

        o_t = scale (q_t e^{G_t} h + Σ_{s≤t} (q_t · e^{G_t - G_s} k_s) v_s)        h' = e^{G_C} h + Σ_s e^{G_C - G_s} k_s v_s^T

    Every exponent is ≤ 0. A decay of one number per head scales a matrix product, one per channel takes
    `decayed_products`. A single token takes the plain step.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] == 1:
        return _step(q, k, v, g, scale, state, qk_l2norm)
    dtype, core = v.dtype, core_dtype(q, v, state)
    B, T, H, K = q.shape
    V = v.shape[-1]
    g = v.new_zeros(B, T, H) if g is None else g
    per_channel = g.ndim == 4
    C = chunk_length(T, chunk_size or (CHUNK_PER_CHANNEL if per_channel else default_chunk_size(K, V, q.device)))
    C = power_of_two(C) if per_channel else C
    N = -(-T // C)
    with torch.autocast(q.device.type, enabled=False):
        if qk_l2norm:
            q, k = l2_normalize(q.to(core)), l2_normalize(k.to(core))
        q, k, v = (to_chunks(x, C, core) for x in (q, k, v))
        q = q * scale
        if per_channel:
            g = to_chunks(g, C, core)
            products = decayed_products(q[:, :, None], k[:, :, None], g).view(-1, C, C)
            from_start, to_end = g.cumsum(1).exp(), until_end(g).exp()
        else:
            gamma, from_start, to_end = head_decay(to_chunks(g[..., None], C, torch.float64), core)
            products = torch.bmm(q, k.mT) * gamma
        writes = torch.bmm((k * to_end).mT, v)
        h = v.new_zeros(B * H, K, V) if state is None else state.to(core).reshape(B * H, K, V)
        before = []
        whole = from_start[:, -1, :, None].view(N, B * H, -1, 1).unbind()
        for decay, write in zip(whole, writes.view(N, B * H, K, V).unbind(), strict=True):
            before.append(h)
            h = torch.addcmul(write, decay, h)
        before = torch.cat(before)
        o = torch.baddbmm(torch.bmm(products, v), q * from_start, before)
    return from_chunks(o, (B, T, H, N)).to(dtype), h.view(B, H, K, V)


def _step(q, k, v, g, scale, state, qk_l2norm):
    """One token. A large state is what a step costs: o = (q e^g) S + (q · k) v reads the old one, without a second pass."""
    dtype, core = v.dtype, core_dtype(q, v, state)
    B, _, H, K = q.shape
    V = v.shape[-1]
    q, k = (x.to(core) for x in (q, k))
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    q, k, v = q.reshape(B * H, 1, K) * scale, k.reshape(B * H, K, 1), v.to(core).reshape(B * H, 1, V)
    o = torch.bmm(q, k) * v
    if state is None:
        S = torch.bmm(k, v)
    else:
        old = state.to(core).reshape(B * H, K, V)
        decay = q.new_ones(1, 1, 1) if g is None else g.to(core).reshape(B * H, -1, 1).exp()
        o = o + torch.bmm(q * decay.mT, old)
        S = (old * decay).baddbmm_(k, v)
    return o.view(B, 1, H, V).to(dtype), S.view(B, H, K, V)
