"""Gated delta rule (arXiv:2412.06464).

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = scale · S_t^T q_t

Decay first, then correct: the value held under k_t is read from the decayed state. Without `g` this is the delta rule.

Shapes: B batch, T time, H heads, K key width, V value width.
q, k [B,T,H,K] · v, o [B,T,H,V] · g, beta [B,T,H] · S [B,H,K,V]
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jetlab.ops.chunks import chunk_length, default_chunk_size, from_chunks, head_decay, put_chunks, to_chunks
from jetlab.ops.recurrence import L2_EPS, check_gate, check_values, core_dtype, l2_normalize, recur


def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
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

    `g` is the log-decay (≤ 0, -inf forgets everything; None is no decay) and `beta` the write strength. `scale`
    defaults to K^-1/2. `qk_l2norm` divides q and k by sqrt(Σx² + 1e-6) per head first. With `cu_seqlens` [N+1] the row
    (B = 1) holds N documents, each starting from its own state: `state` in and out is [N,H,K,V]. `chunk_size` is the
    number of tokens solved together by the chunked form; it changes the speed and not the result. `g_min`, a bound on
    g that other recurrences use to choose a cheaper form, has no effect on a decay of one number per head, because
    every exponent is ≤ 0 whatever g is. `backend="triton"` takes bf16, fp16 and fp32 on a GPU, K ≤ 256 (fp32: 128).
    Raises ValueError if shapes do not fit together, `backend` or `chunk_size` is not a choice that exists, or a kernel
    does not take these inputs.
    """
    check_values(q, k, v)
    check_gate("g", g, q, hint="a decay per key channel takes dplr_delta_rule")
    check_gate("beta", beta, q, needed=True, hint="one write strength serves all channels of a head")
    return recur(
        gated_delta_rule_reference,
        gated_delta_rule_chunked,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        kernel=_kernel,
        scale=scale,
        state=state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        backend=backend,
    )


def _kernel():
    from jetlab_kernels.gated_delta_rule import gated_delta_rule as kernel

    return kernel


def gated_delta_rule_reference(q, k, v, g, beta, *, scale=None, state=None, qk_l2norm=False):
    """Token-by-token definition in fp32 (fp64 stays fp64). Returns (o, final state)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, core = v.dtype, core_dtype(q, v, state)
    q, k, v, beta = (x.to(core) for x in (q, k, v, beta))
    g = torch.zeros_like(beta) if g is None else g.to(core)
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    B, T, H, K = k.shape
    S = k.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(core)
    outputs = []
    for t in range(T):
        S = S * g[:, t, :, None, None].exp()  # forget           [B,H,K,V]
        held = torch.einsum("bhkv,bhk->bhv", S, k[:, t])  # stored under k_t [B,H,V]
        write = beta[:, t, :, None] * (v[:, t] - held)  # the correction   [B,H,V]
        S = S + torch.einsum("bhk,bhv->bhkv", k[:, t], write)
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return torch.stack(outputs, dim=1).to(dtype), S


def gated_delta_rule_chunked(q, k, v, g, beta, *, scale=None, state=None, qk_l2norm=False, chunk_size=None):
    """Chunkwise-parallel form: see `_ChunkedGatedDeltaRule`. A single token takes the plain step.

    The gradient is analytic and can be taken once: for second derivatives use `gated_delta_rule_reference`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    T = q.shape[1]
    if T == 1:
        return _step(q, k, v, g, beta, scale, state, qk_l2norm)
    C = chunk_length(T, chunk_size or default_chunk_size(q.shape[-1], v.shape[-1], q.device))
    return _ChunkedGatedDeltaRule.apply(q, k, v, g, beta, state, scale, qk_l2norm, C)


def _step(q, k, v, g, beta, scale, state, qk_l2norm):
    """One token. A large state is what a step costs: k and q read the old one in one pass, o follows from what they read."""
    dtype, core = v.dtype, core_dtype(q, v, state)
    B, _, H, K = k.shape
    V = v.shape[-1]
    q, k = (x.to(core) for x in (q, k))
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    q, k, v = q.reshape(B * H, 1, K) * scale, k.reshape(B * H, 1, K), v.to(core).reshape(B * H, 1, V)
    beta = beta.to(core).reshape(B * H, 1, 1)
    if state is None:
        write = beta * v
        o, S = torch.bmm(q, k.mT) * write, torch.bmm(k.mT, write)
    else:
        old = state.to(core).reshape(B * H, K, V)
        decay = q.new_ones(1, 1, 1) if g is None else g.to(core).reshape(B * H, 1, 1).exp()
        held, read = (torch.bmm(torch.cat([k, q], 1), old) * decay).split(1, dim=1)
        write = beta * (v - held)
        o = read + torch.bmm(q, k.mT) * write
        S = (old * decay).baddbmm_(k.mT, write)
    return o.view(B, 1, H, V).to(dtype), S.view(B, H, K, V)


class _ChunkedGatedDeltaRule(torch.autograd.Function):
    """Chunks of C tokens; what needs no state is done for all at once, four small products per chunk carry it on.

    Inside a chunk, with G_t = Σ_{s≤t} g_s, Γ_ts = exp(G_t - G_s) for s ≤ t and 0 above, and h the state before it:

        A = Q K^T ∘ Γ,   P = K K^T ∘ Γ                         [C,C], P below the diagonal alone
        R = V - e^G K h                                        what each value adds to what the state holds
        X = (I + diag(beta) P)^-1 diag(beta) R                 the writes: what earlier ones changed is taken off
        h' = e^{G_C} h + D^T X,   D = e^{G_C - G} K
        o = scale (e^G Q h + A X)

    Every exponent is ≤ 0. The inverse M of I + diag(beta) P comes from forward substitution, which stays exact where
    matrix powers explode (repeated keys, beta = 1).
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, scale, qk_l2norm, C):
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, g, beta, state)]
        core = core_dtype(q, v, state)
        B, T, H, K = k.shape
        V, N, rows = v.shape[-1], -(-T // C), B * H
        b = N * rows
        with torch.autocast(q.device.type, enabled=False):
            # What q and k have in common is done once, on [b,2,C,K].
            qk = torch.empty(b, 2, C, K, dtype=core, device=q.device)
            put_chunks(qk[:, 0], q)
            put_chunks(qk[:, 1], k)
            v, beta = to_chunks(v, C, core), to_chunks(beta[..., None], C, core)
            qk_norm = None
            if qk_l2norm:
                qk_norm = torch.linalg.vecdot(qk, qk).add_(L2_EPS).rsqrt_()[..., None]
                qk.mul_(qk_norm)
            k = qk[:, 1]
            g = beta.new_zeros(b, C, 1, dtype=torch.float64) if g is None else to_chunks(g[..., None], C, torch.float64)
            gamma, from_start, to_end = head_decay(g, core)

            pairs = torch.bmm(qk.view(b, 2 * C, K), k.mT).view(b, 2, C, C).mul_(gamma[:, None])
            a, p = pairs.unbind(1)
            identity = torch.eye(C, dtype=core, device=q.device).expand(b, C, C)
            inverse = torch.linalg.solve_triangular(p * beta, identity, upper=False, unitriangular=True)

            # Scan: [e^G Q h, R] in one buffer, because one product reads the state for both.
            queries = (qk * torch.stack([from_start, -from_start], 1)).view(N, rows, 2 * C, K)
            solve, d = (inverse * beta.mT).view(N, rows, C, C), (k * to_end).view(N, rows, C, K)
            v, last = v.view(N, rows, C, V), from_start.view(N, rows, C, 1)[:, :, -1:]
            states, reads, x = (v.new_empty(*s, V) for s in ((N + 1, rows, K), (N, rows, 2 * C), (N, rows, C)))
            states[0] = 0 if state is None else state.reshape(rows, K, V)
            for n in range(N):
                torch.bmm(queries[n], states[n], out=reads[n])
                torch.bmm(solve[n], reads[n, :, C:].add_(v[n]), out=x[n])
                torch.mul(states[n], last[n], out=states[n + 1])
                states[n + 1].baddbmm_(d[n].mT, x[n])
            reads, x = reads.view(b, 2, C, V), x.view(b, C, V)
            o = torch.baddbmm(reads[:, 0], a, x).mul_(scale)

        ctx.save_for_backward(qk, qk_norm, beta, gamma, from_start, to_end, pairs, inverse, reads, d, x, states)
        ctx.shape, ctx.scale = (B, T, H, N), scale
        return from_chunks(o, ctx.shape).to(ctx.dtypes[2]), states[N].clone().view(B, H, K, V)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dh):
        qk, qk_norm, beta, gamma, from_start, to_end, pairs, inverse, reads, d, x, states = ctx.saved_tensors
        k, (a, p) = qk[:, 1], pairs.unbind(1)
        B, _, H, N = ctx.shape
        b, _, C, K = qk.shape
        V, rows = x.shape[-1], B * H
        with torch.autocast(do.device.type, enabled=False):
            # [do, dY] in one buffer with dY = M^T dX, so that dR = beta dY and d(diag(beta) P) = -strictlower(dY X^T).
            dboth = x.new_empty(b, 2, C, V)
            do = put_chunks(dboth[:, 0], do).mul_(ctx.scale)
            on_reads = torch.stack([from_start, -from_start * beta], 1)  # how q and k enter [e^G Q h, R], beta for dR
            queries = (qk * on_reads).view(N, rows, 2 * C, K)
            dx = torch.bmm(a.mT, do).view(N, rows, C, V)
            scan, solve = dboth.view(N, rows, 2 * C, V), inverse.view(N, rows, C, C).mT
            last = from_start.view(N, rows, C, 1)[:, :, -1:]
            dstates = torch.empty_like(states)
            dstates[N] = dh.reshape(rows, K, V)
            for n in reversed(range(N)):
                dx[n].baddbmm_(d[n], dstates[n + 1])
                scan[n, :, C:] = torch.bmm(solve[n], dx[n])
                torch.mul(dstates[n + 1], last[n], out=dstates[n])
                dstates[n].baddbmm_(queries[n].mT, scan[n])
            before, after = states[:-1].view(b, K, V), dstates[1:].view(b, K, V)
            dy, dboth = dboth[:, 1], dboth.view(b, 2 * C, V)
            dk_end = torch.bmm(x, after.mT).mul_(to_end)

            dpairs = torch.bmm(dboth, x.mT).view(b, 2, C, C)
            dp = dpairs[:, 1]
            dp.diagonal(dim1=-2, dim2=-1).zero_()
            dbeta = torch.linalg.vecdot(dy, reads[:, 1]).sub_(torch.linalg.vecdot(dp, p))[..., None]
            dp.mul_(-beta)
            dpairs = dpairs.mul_(gamma[:, None]).view(b, 2 * C, C)

            # Gradients of q and k as they stand on the left of A and P and in the reads (times e^G), then of k on the
            # right of A, P and D (times e^-G): so each G_t collects left · dleft - right · dright.
            dqk = torch.bmm(dboth, before.mT).view(b, 2, C, K).mul_(on_reads)
            dqk.view(b, 2 * C, K).baddbmm_(dpairs, k)
            dk_right = torch.baddbmm(dk_end, dpairs.mT, qk.view(b, 2 * C, K))
            on_left, on_right = torch.linalg.vecdot(dqk, qk), torch.linalg.vecdot(dk_right, k)

            dg = None
            if ctx.needs_input_grad[3]:
                dG = on_left.sum(1) - on_right
                whole = torch.linalg.vecdot(after.flatten(1), before.flatten(1)) * from_start[:, -1, 0]
                dG[:, -1] += whole + torch.linalg.vecdot(dk_end, k).sum(-1)
                dg = dG.flip(-1).cumsum(-1).flip(-1)[..., None]

            dqk[:, 1] += dk_right
            if qk_norm is not None:
                on_left[:, 1] += on_right
                dqk.addcmul_(qk, on_left[..., None], value=-1).mul_(qk_norm)
            dv = dy * beta

        dq, dk, dv, dbeta = (from_chunks(x, ctx.shape) for x in (*dqk.unbind(1), dv, dbeta))
        dg = None if dg is None else from_chunks(dg, ctx.shape)[..., 0]
        grads = (dq, dk, dv, dg, dbeta[..., 0], dstates[0].view(B, H, K, V))
        wanted = zip(grads, ctx.dtypes, ctx.needs_input_grad[: len(grads)], strict=True)
        return *(x.to(dtype) if needed else None for x, dtype, needed in wanted), None, None, None
