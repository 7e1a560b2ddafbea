"""One token through a JetBlock (arXiv:2508.15884, Sec. 2.4), from its projections to what the output projection takes.

    v = SiLU(Σ_j kappa_j · [conv_state, v]_j)               q, k = l2(SiLU(q)), l2(SiLU(k))
    g = -exp(A_log) · softplus(a + dt_bias)                 beta = sigmoid(b)
    S = exp(g) S;   S = S + beta k (v - S^T k)^T;   o = scale · S^T q
    y = o / sqrt(mean(o²) + eps) · weight · SiLU(z)

Reference: jetlab.ops.jetblock_step.jetblock_step_reference.

A step costs what it costs to read and write the state, so everything around it goes along in the one launch: a program
owns a head, takes its state BV value channels at a time through registers, and keeps the few outputs until the mean of
their squares is known. The state may be overwritten in place: each number is read and written by one and the same thread.

Shapes: B batch, H heads, K key width, V value width, W taps.
q, k [B,H,K] · v, z [B,H,V] · kappa [B,H·V,W] · a, b [B,H] · A_log, dt_bias [H] · weight [V] · S [B,H,K,V] in fp32, bf16 or
fp16 · conv_state [B,H·V,W-1], oldest input first
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jetlab_kernels.launch import check_device, check_format

# Value channels that a program takes at a time, warps. Few heads fill the GPU only if each loads its state in few steps. From
# records/h100/kernels/tuning.csv, µs of a step with a state in fp32 and in bf16:
MANY = {"BV": 64, "num_warps": 2}  # batch 128: 118, 73; (128, 4) 117, 90
FEW = {"BV": 128, "num_warps": 4}  # batch 1: 10.1, 10.7; batch 16: 20, 17; (64, 2) 13, 13 and 21, 18
FEW_HEADS = 264  # two for each multiprocessor of an H100
L2_EPS: tl.constexpr = tl.constexpr(1e-6)


@triton.jit
def _unit(ptr, K: tl.constexpr, BK: tl.constexpr):
    """l2(SiLU(x)) of K numbers, zeros behind them."""
    i = tl.arange(0, BK)
    x = tl.load(ptr + i, mask=i < K, other=0.0).to(tl.float32)
    x *= tl.sigmoid(x)
    return x * tl.rsqrt(tl.sum(x * x, 0) + L2_EPS)


@triton.jit
def _jetblock_step(
    q_ptr, k_ptr, v_ptr, kappa_ptr, a_ptr, b_ptr, z_ptr, A_log_ptr, dt_bias_ptr, weight_ptr,
    state_ptr, conv_ptr, new_state_ptr, new_conv_ptr, y_ptr,
    q_b, k_b, v_b, kappa_b, a_b, b_b, z_b, scale, eps,
    H: tl.constexpr, K: tl.constexpr, V: tl.constexpr, W: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Grid (H, B): one program owns one head of one sequence."""
    i_h, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    q = _unit(q_ptr + i_b * q_b + i_h * K, K, BK) * scale
    k = _unit(k_ptr + i_b * k_b + i_h * K, K, BK)
    qk = tl.sum(q * k, 0)
    a = tl.load(a_ptr + i_b * a_b + i_h).to(tl.float32) + tl.load(dt_bias_ptr + i_h).to(tl.float32)
    softplus = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    decay = tl.exp(-tl.exp(tl.load(A_log_ptr + i_h).to(tl.float32)) * softplus)
    beta = tl.sigmoid(tl.load(b_ptr + i_b * b_b + i_h).to(tl.float32))

    row = tl.arange(0, BK)
    state_at = (i_b * H + i_h) * K * V
    squares = 0.0
    outputs = ()
    for i in tl.static_range((V + BV - 1) // BV):
        c = i * BV + tl.arange(0, BV)
        real = c < V
        channel = i_h * V + c
        at = state_at + row[:, None] * V + c[None, :]
        inside = (row < K)[:, None] & real[None, :]
        S = tl.load(state_ptr + at, mask=inside, other=0.0).to(tl.float32) * decay

        kappa_at = i_b * kappa_b + channel * W
        conv_at = (i_b * H * V + channel) * (W - 1)
        now = tl.load(v_ptr + i_b * v_b + channel, mask=real, other=0.0)
        v = now.to(tl.float32) * tl.load(kappa_ptr + kappa_at + W - 1, mask=real, other=0.0).to(tl.float32)
        for j in tl.static_range(W - 1):
            past = tl.load(conv_ptr + conv_at + j, mask=real, other=0.0)
            v += past.to(tl.float32) * tl.load(kappa_ptr + kappa_at + j, mask=real, other=0.0).to(tl.float32)
            if j > 0:
                tl.store(new_conv_ptr + conv_at + j - 1, past.to(new_conv_ptr.dtype.element_ty), mask=real)
        if W > 1:
            tl.store(new_conv_ptr + conv_at + W - 2, now.to(new_conv_ptr.dtype.element_ty), mask=real)
        v *= tl.sigmoid(v)

        # o = (S + k write^T)^T q, from two sums over the old S that need not wait for each other.
        write = beta * (v - tl.sum(S * k[:, None], 0))
        o = tl.sum(S * q[:, None], 0) + qk * write
        S += k[:, None] * write[None, :]
        tl.store(new_state_ptr + at, S.to(new_state_ptr.dtype.element_ty), mask=inside)
        squares += tl.sum(o * o, 0)
        outputs += (o,)

    norm = tl.rsqrt(squares / V + eps)
    for i in tl.static_range((V + BV - 1) // BV):
        c = i * BV + tl.arange(0, BV)
        real = c < V
        z = tl.load(z_ptr + i_b * z_b + i_h * V + c, mask=real, other=0.0).to(tl.float32)
        weight = tl.load(weight_ptr + c, mask=real, other=0.0).to(tl.float32)
        y = outputs[i] * norm * weight * z * tl.sigmoid(z)
        tl.store(y_ptr + (i_b * H + i_h) * V + c, y.to(y_ptr.dtype.element_ty), mask=real)


def jetblock_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kernels: Tensor,
    a: Tensor,
    b: Tensor,
    z: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    weight: Tensor,
    *,
    state: Tensor,
    conv_state: Tensor,
    eps: float = 1e-5,
    scale: float | None = None,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,H,V] in v's dtype, the state in the dtype it came in, and the convolution's inputs, as above.

    `kernels` are kappa [B,H·V,W], bias included. With `in_place` the state is overwritten and returned. There is no
    gradient.
    Raises ValueError if shapes do not fit together, for a dtype other than bf16, fp16 and fp32, for another device than a
    GPU's, or if a state to be overwritten is not contiguous.
    """
    check_device(q, k, v, kernels, a, b, z, A_log, dt_bias, weight, state, conv_state)
    for x in (v, state):
        check_format(x)
    (B, H, K), V, W = q.shape, v.shape[-1], kernels.shape[-1]
    for name, x, expected in (
        ("k", k, (B, H, K)),
        ("v", v, (B, H, V)),
        ("kernels", kernels, (B, H * V, W)),
        ("a", a, (B, H)),
        ("b", b, (B, H)),
        ("z", z, (B, H, V)),
        ("A_log", A_log, (H,)),
        ("dt_bias", dt_bias, (H,)),
        ("weight", weight, (V,)),
        ("state", state, (B, H, K, V)),
        ("conv_state", conv_state, (B, H * V, W - 1)),
    ):
        if x.shape != expected:
            raise ValueError(
                f"{name} must be {list(expected)} beside q {[B, H, K]}, v {list(v.shape)} and {W} taps, got {list(x.shape)}; "
                "pass one token's projections and the states that an earlier call returned"
            )
    if in_place and not state.is_contiguous():
        raise ValueError(
            f"a state to be overwritten must be contiguous, got strides {state.stride()}; leave in_place out, or "
            "pass the state as an earlier call returned it"
        )
    rows = [x if x[0].is_contiguous() else x.contiguous() for x in (q, k, v, kernels, a, b, z)]
    A_log, dt_bias, weight = A_log.contiguous(), dt_bias.contiguous(), weight.contiguous()
    state, conv_state = state.contiguous(), conv_state.contiguous()
    y = torch.empty(B, H, V, dtype=v.dtype, device=v.device)
    new_state = state if in_place else torch.empty_like(state)
    new_conv = torch.empty_like(conv_state)
    tiles = MANY if B * H > FEW_HEADS else FEW
    BK, BV = max(16, triton.next_power_of_2(K)), min(tiles["BV"], max(16, triton.next_power_of_2(V)))
    if BK > 128:  # more rows, fewer columns: what a thread holds stays the same
        BV = min(BV, tiles["BV"] // 2)
    with torch.cuda.device_of(v):
        _jetblock_step[(H, B)](
            *rows, A_log, dt_bias, weight, state, conv_state, new_state, new_conv, y, *(x.stride(0) for x in rows),
            float(K**-0.5 if scale is None else scale), eps,
            # At least eight numbers a thread: with fewer than a vector, several threads would read what one overwrites.
            H=H, K=K, V=V, W=W, BK=BK, BV=BV, num_warps=min(tiles["num_warps"], BK * BV // 256),
        )  # fmt: skip
    return y, new_state, new_conv
