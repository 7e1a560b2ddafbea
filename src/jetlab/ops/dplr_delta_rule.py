"""Delta rule with a free correction (RWKV7, arXiv:2503.14456): the transition is diagonal plus low rank (DPLR).

    S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T        o_t = scale · S_t^T q_t

The correction reads the state before it decays. With a = -exp(g) k, b = beta k and values beta v it is the gated delta rule.

Shapes: B batch, T time, H heads, K key width, V value width.
q, k, g, a, b [B,T,H,K] · v, o [B,T,H,V] · S [B,H,K,V]
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from jetlab.ops.chunks import chunk_length, default_chunk_size, from_chunks, power_of_two, to_chunks, until_end
from jetlab.ops.decay import decayed_products
from jetlab.ops.recurrence import check_gate, check_values, core_dtype, l2_normalize, recur


def dplr_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    a: Tensor,
    b: Tensor,
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

    `g` is the log-decay per key channel (≤ 0, -inf forgets everything; None is no decay), `a` what the correction reads
    and `b` what it writes under. `scale` defaults to K^-1/2, which RWKV7 sets to 1. `qk_l2norm` divides q and k by
    sqrt(Σx² + 1e-6) per head first. With `cu_seqlens` [N+1] the row (B = 1) holds N documents, each starting from its own
    state: `state` in and out is [N,H,K,V]. `chunk_size` is the number of tokens solved together by the chunked form,
    rounded up to a power of two; it changes the speed and not the result. `g_min`, a bound on g that other forms use to
    split exponentials, has no effect: here no exponent is positive whatever g is.
    Raises ValueError if shapes do not fit together or `backend` or `chunk_size` is not a choice that exists.
    """
    check_values(q, k, v)
    for name, gate in (("g", g), ("a", a), ("b", b)):
        rule = {"needed": name != "g", "per_head": False, "per_channel": True}
        check_gate(name, gate, q, **rule, hint="a number per head takes expand_as(k)")
    return recur(
        dplr_delta_rule_reference,
        dplr_delta_rule_chunked,
        {"q": q, "k": k, "v": v, "g": g, "a": a, "b": b},
        scale=scale,
        state=state,
        cu_seqlens=cu_seqlens,
        qk_l2norm=qk_l2norm,
        chunk_size=chunk_size,
        backend=backend,
    )


def dplr_delta_rule_reference(q, k, v, g, a, b, *, scale=None, state=None, qk_l2norm=False):
    """Token-by-token definition in fp32 (fp64 stays fp64). Returns (o, final state)."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    dtype, core = v.dtype, core_dtype(q, v, state)
    q, k, v, a, b = (x.to(core) for x in (q, k, v, a, b))
    g = torch.zeros_like(k) if g is None else g.to(core)
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    B, T, H, K = k.shape
    S = k.new_zeros(B, H, K, v.shape[-1]) if state is None else state.to(core)
    outputs = []
    for t in range(T):
        held = torch.einsum("bhkv,bhk->bhv", S, a[:, t])  # read before the decay [B,H,V]
        S = S * g[:, t, :, :, None].exp()
        S = S + torch.einsum("bhk,bhv->bhkv", b[:, t], held) + torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        outputs.append(torch.einsum("bhkv,bhk->bhv", S, scale * q[:, t]))
    return torch.stack(outputs, dim=1).to(dtype), S


def dplr_delta_rule_chunked(q, k, v, g, a, b, *, scale=None, state=None, qk_l2norm=False, chunk_size=None):
    """Chunkwise-parallel form: see `_solve`. A single token takes the plain step."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if q.shape[1] == 1:
        return _step(q, k, v, g, a, b, scale, state, qk_l2norm)
    dtype, core = v.dtype, core_dtype(q, v, state)
    B, T, H, K = q.shape
    V = v.shape[-1]
    C = power_of_two(chunk_length(T, chunk_size or default_chunk_size(K, V, q.device)))
    N = -(-T // C)
    with torch.autocast(q.device.type, enabled=False):
        if qk_l2norm:
            q, k = l2_normalize(q.to(core)), l2_normalize(k.to(core))
        g = torch.zeros_like(k) if g is None else g
        q, k, v, g, a, b = (to_chunks(x, C, core) for x in (q, k, v, g, a, b))
        q = q * scale
        move, write, read, intra = _solve(q, k, v, g, a, b)
        h = v.new_zeros(B * H, K, V) if state is None else state.to(core).reshape(B * H, K, V)
        before = []
        moves, writes = move.view(N, B * H, K, K).unbind(), write.view(N, B * H, K, V).unbind()
        for move_n, write_n in zip(moves, writes, strict=True):
            before.append(h)
            h = torch.baddbmm(write_n, move_n, h)
        o = torch.baddbmm(intra, read, torch.cat(before))
    return from_chunks(o, (B, T, H, N)).to(dtype), h.view(B, H, K, V)


def _solve(q, k, v, g, a, b):
    """What each chunk does to the state before it, h: h' = move h + write and o = read h + intra.

    With G_t = Σ_{s≤t} g_s inside a chunk of C tokens, the correction x_t = S_{t-1}^T a_t that token t writes under b_t is

        x_t = (e^{G_{t-1}} a_t) h + Σ_{s<t} (a_t · e^{G_{t-1} - G_s} k_s) v_s + Σ_{s<t} (a_t · e^{G_{t-1} - G_s} b_s) x_s
        (I - A_ab) [W | U] = [e^{G_{t-1}} a | A_ak V]                        x = W h + U

    and then o_t and h' are sums over v_s under k_s and x_s under b_s as in gated linear attention. So a_t asks the state
    as a query at token t - 1 would: shifted up by one token it shares the products of q, and every exponent is ≤ 0.
    """
    C, K = q.shape[1:]
    asked = F.pad(a[:, 1:], (0, 0, 0, 1))
    products = decayed_products(torch.stack([q, asked], 2), torch.stack([k, b], 2), g)
    (q_k, q_b), (a_k, a_b) = (by_query.unbind(1) for by_query in products.unbind(1))
    a_k, a_b = (F.pad(x[:, :-1], (0, 0, 1, 0)) for x in (a_k, a_b))
    G = g.cumsum(1)
    right = torch.cat([a * F.pad(G[:, :-1], (0, 0, 1, 0)).exp(), torch.bmm(a_k, v)], -1)
    identity = torch.eye(C, dtype=q.dtype, device=q.device)
    wu = torch.linalg.solve_triangular(identity - a_b, right, upper=False, unitriangular=True)
    to_end = until_end(g).exp()
    move, write = torch.bmm((b * to_end).mT, wu).split([K, v.shape[-1]], -1)
    read, intra = torch.bmm(q_b, wu).split([K, v.shape[-1]], -1)
    move = move + torch.diag_embed(G[:, -1].exp())
    return (
        move,
        torch.baddbmm(write, (k * to_end).mT, v),
        torch.addcmul(read, q, G.exp()),
        torch.baddbmm(intra, q_k, v),
    )


def _step(q, k, v, g, a, b, scale, state, qk_l2norm):
    """One token. A large state is what a step costs: a and q read the old one in one pass, o follows from what they read."""
    dtype, core = v.dtype, core_dtype(q, v, state)
    B, _, H, K = q.shape
    V = v.shape[-1]
    q, k = (x.to(core) for x in (q, k))
    if qk_l2norm:
        q, k = l2_normalize(q), l2_normalize(k)
    q, k, v = q.reshape(B * H, 1, K) * scale, k.reshape(B * H, 1, K), v.to(core).reshape(B * H, 1, V)
    if state is None:
        o, S = torch.bmm(q, k.mT) * v, torch.bmm(k.mT, v)
    else:
        old = state.to(core).reshape(B * H, K, V)
        decay = q.new_ones(1, 1, 1) if g is None else g.to(core).reshape(B * H, K, 1).exp()
        a, b = (x.to(core).reshape(B * H, 1, K) for x in (a, b))
        held, read = torch.bmm(torch.cat([a, q * decay.mT], 1), old).split(1, dim=1)
        o = read + torch.bmm(q, k.mT) * v + torch.bmm(q, b.mT) * held
        # Sums of outer products: a fifth faster than one product with an inner dimension of two.
        S = (k.mT * v).addcmul_(b.mT, held).addcmul_(old, decay)
    return o.view(B, 1, H, V).to(dtype), S.view(B, H, K, V)
