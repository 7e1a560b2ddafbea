"""One token through a Mamba2 layer (arXiv:2405.21060), from its input projection to what the output projection takes.

    v, k, q = SiLU(Σ_j conv_weight_j · [conv_state, xbc]_j + conv_bias)        (x, B and C of the paper)
    dt = softplus(dt + dt_bias)                         S = exp(-exp(A_log) dt) S + dt v k^T
    o = (S q + D v) · SiLU(z)                           y = o / sqrt(mean over its group of o² + eps) · weight

Reference: jetlab.ops.mamba2_step.mamba2_step_reference.

A step costs what it costs to read and write the state, each once. Its rows need nothing of each other, so a program owns BV of
them and the GPU is full at small batches too. Before it the convolution has to be done, whose k and q all heads of a group
read; behind it the mean needs every head of a group: three launches, what passes between them in fp32 and about a hundredth
of the state's bytes.

Shapes: B batch, H heads, V value width (the paper's P), K state size (its N), G groups, W taps, C = H·V + 2·G·K channels.
xbc [B,C] · z, y [B,H·V] · dt [B,H] · conv_weight [C,W] · conv_bias [C] · dt_bias, A_log, D [H] · weight [H·V] ·
S [B,H,V,K] in fp32, bf16 or fp16 · conv_state [B,C,W-1], oldest input first
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from jetlab_kernels.launch import check_device, check_format

CONV = {"BC": 256, "num_warps": 4}
# One H100, 128 heads × 80 × 128 in 8 groups, µs of a step (all three launches) with a state in fp32 and in bf16. Batch 250:
# 918, 495; (16, 2) 921, 482; (8, 2) 919, 494; (32, 4) 913, 502; (32, 8) 967, 591. Batch 8: 35.5, 20.7; others 35.5 to 37.0,
# 20.7 to 22.3. Reading and writing the fp32 state at copy speed (3.02 TB/s) takes 868 and 27.8.
STATE = {"BV": 16, "num_warps": 4}
WIDE_GROUP = 2048  # channels of a group from which on the norm takes eight warps instead of four


@triton.jit
def _mamba2_conv(
    xbc_ptr, weight_ptr, bias_ptr, conv_ptr, new_conv_ptr, mixed_ptr, xbc_b,
    C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """v, k and q in fp32, and the inputs moved on by one.  Grid (cdiv(C, BC), B): one program owns BC channels of a row."""
    i_b = tl.program_id(1).to(tl.int64)
    c = tl.program_id(0) * BC + tl.arange(0, BC)
    real = c < C
    conv_at = (i_b * C + c) * (W - 1)
    now = tl.load(xbc_ptr + i_b * xbc_b + c, mask=real, other=0.0)
    y = now.to(tl.float32) * tl.load(weight_ptr + c * W + W - 1, mask=real, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + c, mask=real, other=0.0).to(tl.float32)
    inputs = ()
    for j in tl.static_range(W - 1):
        past = tl.load(conv_ptr + conv_at + j, mask=real, other=0.0)
        y += past.to(tl.float32) * tl.load(weight_ptr + c * W + j, mask=real, other=0.0).to(tl.float32)
        inputs += (past,)
    tl.store(mixed_ptr + i_b * C + c, y * tl.sigmoid(y), mask=real)
    if W > 1:
        tl.debug_barrier()  # in place a column goes where another one lay, which another thread may read
        for j in tl.static_range(W - 2):
            tl.store(new_conv_ptr + conv_at + j, inputs[j + 1].to(new_conv_ptr.dtype.element_ty), mask=real)
        tl.store(new_conv_ptr + conv_at + W - 2, now.to(new_conv_ptr.dtype.element_ty), mask=real)


@triton.jit
def _mamba2_state(
    mixed_ptr, z_ptr, dt_ptr, dt_bias_ptr, A_log_ptr, D_ptr, state_ptr, new_state_ptr, gated_ptr, z_b, dt_b,
    H: tl.constexpr, V: tl.constexpr, K: tl.constexpr, G: tl.constexpr, BV: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The new state and o.  Grid (H · cdiv(V, BV), B): one program owns BV value channels of one head of a row."""
    n_v: tl.constexpr = (V + BV - 1) // BV
    i_h, i_b = tl.program_id(0) // n_v, tl.program_id(1).to(tl.int64)  # int64: B·H·V·K passes 2^31
    c, i = tl.program_id(0) % n_v * BV + tl.arange(0, BV), tl.arange(0, BK)
    real = c < V
    channel = i_h * V + c
    at = (i_b * (H * V) + channel)[:, None] * K + i[None, :]
    inside = real[:, None] & (i < K)[None, :]
    S = tl.load(state_ptr + at, mask=inside, other=0.0).to(tl.float32)  # first, as it takes longest

    mixed_at = mixed_ptr + i_b * (H * V + 2 * G * K)
    key_at = mixed_at + H * V + i_h // (H // G) * K + i
    k = tl.load(key_at, mask=i < K, other=0.0)
    q = tl.load(key_at + G * K, mask=i < K, other=0.0)
    v = tl.load(mixed_at + channel, mask=real, other=0.0)
    a = tl.load(dt_ptr + i_b * dt_b + i_h).to(tl.float32) + tl.load(dt_bias_ptr + i_h).to(tl.float32)
    dt = tl.where(a > 20.0, a, tl.log(1.0 + tl.exp(tl.minimum(a, 20.0))))
    decay = tl.exp(-tl.exp(tl.load(A_log_ptr + i_h).to(tl.float32)) * dt)

    S = S * decay + (dt * v)[:, None] * k[None, :]
    tl.debug_barrier()  # in place no thread may write what another one, should it read with it, has yet to see
    tl.store(new_state_ptr + at, S.to(new_state_ptr.dtype.element_ty), mask=inside)
    z = tl.load(z_ptr + i_b * z_b + channel, mask=real, other=0.0).to(tl.float32)
    o = tl.sum(S * q[None, :], 1) + tl.load(D_ptr + i_h).to(tl.float32) * v
    tl.store(gated_ptr + i_b * (H * V) + channel, o * z * tl.sigmoid(z), mask=real)


@triton.jit
def _mamba2_norm(gated_ptr, weight_ptr, y_ptr, eps, G: tl.constexpr, X: tl.constexpr, BX: tl.constexpr):
    """y.  Grid (G, B): one program owns the X channels of one group of a row."""
    i_g, i_b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    i = tl.arange(0, BX)
    at = (i_b * G + i_g) * X + i
    o = tl.load(gated_ptr + at, mask=i < X, other=0.0)
    weight = tl.load(weight_ptr + i_g * X + i, mask=i < X, other=0.0).to(tl.float32)
    y = o * tl.rsqrt(tl.sum(o * o, 0) / X + eps) * weight
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=i < X)


def mamba2_step(
    xbc: Tensor,
    z: Tensor,
    dt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor,
    A_log: Tensor,
    D: Tensor,
    weight: Tensor,
    *,
    state: Tensor,
    conv_state: Tensor,
    n_groups: int = 1,
    norm_groups: int | None = None,
    eps: float = 1e-5,
    in_place: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """y [B,H·V] in z's dtype, the state in the dtype it came in, and the convolution's inputs, as above.

    The norm's groups are those of k and q unless `norm_groups` says otherwise. With `in_place` both states are overwritten
    and returned. There is no gradient.
    Raises ValueError if shapes do not fit together, for a dtype other than bf16, fp16 and fp32, for another device than a
    GPU's, or if a state to be overwritten is not contiguous.
    """
    check_device(xbc, z, dt, conv_weight, conv_bias, dt_bias, A_log, D, weight, state, conv_state)
    for x in (xbc, z, state, conv_state):
        check_format(x)
    (B, H), G, K, W = dt.shape, n_groups, state.shape[-1], conv_weight.shape[-1]
    norm_groups = G if norm_groups is None else norm_groups
    for name, n, of, whole in (("n_groups", G, "heads", H), ("norm_groups", norm_groups, "channels of z", z.shape[-1])):
        if n < 1 or whole % n:
            raise ValueError(
                f"{name} must divide the {of}, got {n} and {whole}; take it from the layer's configuration"
            )
    V = z.shape[-1] // H
    C = H * V + 2 * G * K
    for name, x, expected in (
        ("xbc", xbc, (B, C)),
        ("z", z, (B, H * V)),
        ("conv_weight", conv_weight, (C, W)),
        ("conv_bias", conv_bias, (C,)),
        ("dt_bias", dt_bias, (H,)),
        ("A_log", A_log, (H,)),
        ("D", D, (H,)),
        ("weight", weight, (H * V,)),
        ("state", state, (B, H, V, K)),
        ("conv_state", conv_state, (B, C, W - 1)),
    ):
        if x is not None and x.shape != expected:
            raise ValueError(
                f"{name} must be {list(expected)} beside dt {[B, H]}, z {list(z.shape)}, a state of {K}, {G} groups and {W} "
                f"taps, got {list(x.shape)}; pass one token's projections and the states that an earlier call returned"
            )
    for name, x in (("state", state), ("conv_state", conv_state)):
        if in_place and not x.is_contiguous():
            raise ValueError(
                f"a {name} to be overwritten must be contiguous, got strides {x.stride()}; leave in_place out, or pass it as "
                "an earlier call returned it"
            )
    xbc, z, dt = (x if x[0].is_contiguous() else x.contiguous() for x in (xbc, z, dt))
    conv_weight, dt_bias, A_log, D, weight = (x.contiguous() for x in (conv_weight, dt_bias, A_log, D, weight))
    conv_bias = None if conv_bias is None else conv_bias.contiguous()
    state, conv_state = state.contiguous(), conv_state.contiguous()
    new_state, new_conv = (x if in_place else torch.empty_like(x) for x in (state, conv_state))
    mixed = torch.empty(B, C, dtype=torch.float32, device=z.device)
    gated = torch.empty(B, H * V, dtype=torch.float32, device=z.device)
    y = torch.empty(B, H * V, dtype=z.dtype, device=z.device)
    X = H * V // norm_groups
    BK, BV = triton.next_power_of_2(K), min(STATE["BV"], triton.next_power_of_2(V))
    with torch.cuda.device_of(z):
        _mamba2_conv[(triton.cdiv(C, CONV["BC"]), B)](
            xbc, conv_weight, conv_bias, conv_state, new_conv, mixed, xbc.stride(0), C=C, W=W, **CONV
        )
        _mamba2_state[(H * triton.cdiv(V, BV), B)](
            mixed, z, dt, dt_bias, A_log, D, state, new_state, gated, z.stride(0), dt.stride(0),
            H=H, V=V, K=K, G=G, BV=BV, BK=BK, num_warps=STATE["num_warps"],
        )  # fmt: skip
        _mamba2_norm[(norm_groups, B)](
            gated, weight, y, eps,
            G=norm_groups, X=X, BX=triton.next_power_of_2(X), num_warps=4 if X < WIDE_GROUP else 8,
        )  # fmt: skip
    return y, new_state, new_conv
