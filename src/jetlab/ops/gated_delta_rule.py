"""Gated delta rule (arXiv:2412.06464).

    S_t = exp(g_t) S_{t-1} + beta_t k_t (v_t - exp(g_t) S_{t-1}^T k_t)^T        o_t = scale · S_t^T q_t

Decay first, then correct: the value held under k_t is read from the decayed state. Without `g` this is the delta rule.

Shapes: B batch, T time, H heads, K key width, V value width.
q, k [B,T,H,K] · v, o [B,T,H,V] · g, beta [B,T,H] · S [B,H,K,V]
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from jetlab.ops.chunks import chunk_length, default_chunk_size, from_chunks, head_decay, to_chunks
from jetlab.ops.recurrence import L2_EPS, check_gate, core_dtype, l2_normalize, recur


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
    every exponent is ≤ 0 whatever g is.
    Raises ValueError if shapes do not fit together or `backend` or `chunk_size` is not a choice that exists.
    """
    for name, gate in (("g", g), ("beta", beta)):
        check_gate(name, gate, q, hint="a decay per key channel takes dplr_delta_rule")
    return recur(
        gated_delta_rule_reference,
        gated_delta_rule_chunked,
        {"q": q, "k": k, "v": v, "g": g, "beta": beta},
        scale=scale,
        state=state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        backend=backend,
    )


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
    """Chunkwise-parallel form (UT/WY): see `_ChunkedGatedDeltaRule`. A single token takes the plain step.

    The gradient is analytic and can be taken once: for second derivatives use `gated_delta_rule_reference`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    T = q.shape[1]
    if T == 1:
        return _step(q, k, v, g, beta, scale, state, qk_l2norm)
    C = chunk_length(T, chunk_size or default_chunk_size(q.shape[-1], v.shape[-1]))
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
    """Chunks of C tokens, all solved in parallel; two small products per chunk carry the state.

    Inside a chunk, with G_t = Σ_{s≤t} g_s, Γ_ts = exp(G_t - G_s) for s ≤ t and 0 above, and h the state before it:

        L = strictlower(diag(beta) (K K^T ∘ Γ))                [C,C]
        [U | W] = (I + L)^-1 diag(beta) [V | e^G K]            for every chunk at once
        X = U - W h                                            the writes: chunk after chunk, as
        h' = e^{G_C} h + D^T X,   D = e^{G_C - G} K            each needs the state before it
        o = scale (A X + e^G Q h),   A = Q K^T ∘ Γ

    Every exponent is ≤ 0. (I + L)^-1 comes from forward substitution, which stays exact where matrix powers explode
    (repeated keys, beta = 1).
    """

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, scale, qk_l2norm, C):
        ctx.dtypes = [None if x is None else x.dtype for x in (q, k, v, g, beta, state)]
        core = core_dtype(q, v, state)
        B, T, H, K = k.shape
        V = v.shape[-1]
        N = -(-T // C)
        b = B * H * N
        with torch.autocast(q.device.type, enabled=False):
            # What q and k have in common is done once, on [b,2,C,K].
            qk = torch.stack([to_chunks(q, C, core), to_chunks(k, C, core)], 1)
            v, beta = to_chunks(v, C, core), to_chunks(beta[..., None], C, core)
            qk_norm = None
            if qk_l2norm:
                qk_norm = torch.rsqrt(qk.square().sum(-1, keepdim=True).add_(L2_EPS))
                qk.mul_(qk_norm)
            q, k = qk.unbind(1)
            g = beta.new_zeros(b, C, 1, dtype=torch.float64) if g is None else to_chunks(g[..., None], C, torch.float64)
            gamma, from_start, to_end = head_decay(g, core)

            a, kk = torch.bmm(qk.flatten(1, 2), k.mT).view(b, 2, C, C).mul_(gamma[:, None]).unbind(1)
            identity = torch.eye(C, dtype=core, device=q.device).expand(b, C, C)
            inverse = torch.linalg.solve_triangular(kk * beta, identity, upper=False, unitriangular=True)
            right = torch.cat([v, k * from_start], -1)
            uw = torch.bmm(inverse, right * beta)  # [U | W]
            q_start, d = q * from_start, k * to_end

            before, x = v.new_empty(B * H, N, K, V), v.new_empty(B * H, N, C, V)
            h = v.new_zeros(B * H, K, V) if state is None else state.to(core).reshape(B * H, K, V)
            each = [t.view(B * H, N, *t.shape[1:]).unbind(1) for t in (uw, d, from_start[:, -1:])]
            for n, (uw_n, d_n, decay_n) in enumerate(zip(*each, strict=True)):
                before[:, n] = h
                x[:, n] = torch.baddbmm(uw_n[..., :V], uw_n[..., V:], h, alpha=-1)
                h = torch.baddbmm(h * decay_n, d_n.mT, x[:, n])
            before, x = before.view(b, K, V), x.view(b, C, V)
            o = torch.baddbmm(torch.bmm(a, x), q_start, before).mul_(scale)

        ctx.save_for_backward(
            *(qk, qk_norm, beta, gamma, from_start, to_end, a, kk, inverse, right, uw, q_start, d, x, before)
        )
        ctx.shape, ctx.scale = (B, T, H, N), scale
        return from_chunks(o, ctx.shape).to(ctx.dtypes[2]), h.view(B, H, K, V)

    @staticmethod
    @once_differentiable
    def backward(ctx, do, dh):
        qk, qk_norm, beta, gamma, from_start, to_end, a, kk, inverse, *solved = ctx.saved_tensors
        right, uw, q_start, d, x, before = solved
        k = qk[:, 1]
        B, _, H, N = ctx.shape
        b, C, K = k.shape
        V = before.shape[-1]
        with torch.autocast(do.device.type, enabled=False):
            do = to_chunks(do, C, qk.dtype) * ctx.scale

            # From the last chunk to the first: the gradients of the writes, and `after`, those of the state behind them.
            after, dx = before.new_empty(B * H, N, K, V), before.new_empty(B * H, N, C, V)
            dh = dh.to(qk.dtype).reshape(B * H, K, V)
            reads = torch.bmm(q_start.mT, do), torch.bmm(a.mT, do)
            each = [t.view(B * H, N, *t.shape[1:]).unbind(1) for t in (*reads, uw, d, from_start[:, -1:])]
            for n, (read_n, dx_n, uw_n, d_n, decay_n) in reversed(list(enumerate(zip(*each, strict=True)))):
                after[:, n] = dh
                dx[:, n] = torch.baddbmm(dx_n, d_n, dh)
                dh = torch.baddbmm(read_n + dh * decay_n, uw_n[..., V:].mT, dx[:, n], alpha=-1)
            after, dx = after.view(b, K, V), dx.view(b, C, V)
            dread = torch.bmm(do, before.mT)
            dk_end = torch.bmm(x, after.mT).mul_(to_end)

            # [U | W] = (I + L)^-1 R:  dR = (I + L)^-T d[U | W],  dL = -strictlower(dR [U | W]^T)
            dright = torch.bmm(inverse.mT, torch.cat([dx, -torch.bmm(dx, before.mT)], -1))
            dl = torch.bmm(dright, uw.mT).neg_()
            dl.diagonal(dim1=-2, dim2=-1).zero_()
            dbeta = (dl * kk).sum(-1, keepdim=True).add_(torch.linalg.vecdot(dright, right)[..., None])
            dright.mul_(beta)

            # Gradients of q and k as they stand on the left of A, L and R (times e^G), then of k on the right of A, L
            # and D (times e^-G): so each G_t collects left · dleft - right · dright.
            dpairs = torch.stack([torch.bmm(do, x.mT), dl.mul_(beta)], 1).mul_(gamma[:, None]).view(b, 2 * C, C)
            dqk = torch.bmm(dpairs, k).view(b, 2, C, K)
            dqk[:, 0].addcmul_(dread, from_start)
            dqk[:, 1].addcmul_(dright[..., V:], from_start)
            dk_right = torch.baddbmm(dk_end, dpairs.mT, qk.view(b, 2 * C, K))
            on_left, on_right = torch.linalg.vecdot(dqk, qk), torch.linalg.vecdot(dk_right, k)

            dg = None
            if ctx.needs_input_grad[3]:
                dG = on_left.sum(1) - on_right
                whole = (after * before).sum((1, 2)) * from_start[:, -1, 0]
                dG[:, -1] += whole + torch.linalg.vecdot(dk_end, k).sum(-1)
                dg = dG.flip(-1).cumsum(-1).flip(-1)[..., None]

            dqk[:, 1] += dk_right
            if qk_norm is not None:
                on_left[:, 1] += on_right
                dqk.addcmul_(qk, on_left[..., None], value=-1).mul_(qk_norm)

        dq, dk = dqk.unbind(1)
        grads = [None if x is None else from_chunks(x, ctx.shape) for x in (dq, dk, dright[..., :V], dg, dbeta)]
        grads = [x.squeeze(-1) if i > 2 and x is not None else x for i, x in enumerate(grads)]
        grads.append(dh.view(B, H, K, V))
        wanted = zip(grads, ctx.dtypes, ctx.needs_input_grad, strict=False)
        return *(x.to(dtype) if x is not None and needed else None for x, dtype, needed in wanted), None, None, None
