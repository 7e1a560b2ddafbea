"""JetBlock (arXiv:2508.15884, Sec. 2.4): Gated DeltaNet whose only convolution is a dynamic one, on the values.

q, k = SiLU(W_q x), SiLU(W_k x)
kappa_t = w2 SiLU(w1 x_t) + bias               W taps per token and value channel, made from the block's input
v_t = SiLU(Σ_j kappa_t[:, j] · (W_v x)_{t-W+1+j})
o = gated_delta_rule(l2(q), l2(k), v, g, beta)          y = W_o (RMSNorm(o) · SiLU(W_g x))
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import decay_and_write, real_tokens
from jetlab.layers.init import OUTPUT_GAIN, bare, decay_parameters, linear, reuse_attention, short_kernel
from jetlab.layers.norm import GatedRMSNorm
from jetlab.layers.projections import is_plain, project
from jetlab.layers.state import RecurrentState, recurrent_state_bytes
from jetlab.ops import dynamic_conv, gated_delta_rule, short_conv

CONV_V = ("none", "static", "dynamic")


class KernelGenerator(nn.Module):
    """Kernels [B,T,Vd,W] from x [B,T,D] through a bottleneck of R units.

    `w2` starts at zero and its bias as a static kernel, so the block begins exactly as one with a static convolution;
    `w1` starts at N(0, 0.02²), so w2 has a gradient at the first step and w1 from the second. Were both zero, neither
    would ever move.
    """

    def __init__(self, dims: BlockDims, hidden: int, generator: torch.Generator | None = None):
        super().__init__()
        self.conv_size = dims.conv_size
        self.w1 = bare(nn.Linear, dims.d_model, hidden, bias=False)
        self.w2 = bare(nn.Linear, hidden, dims.value_dim * dims.conv_size)
        nn.init.normal_(self.w1.weight, std=0.02, generator=generator)
        nn.init.zeros_(self.w2.weight)
        with torch.no_grad():
            self.w2.bias.copy_(short_kernel(dims.value_dim, dims.conv_size, generator).flatten())

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.silu(self.w1(x))
        if hidden.numel() < hidden.shape[-1] ** 2 or not is_plain(self.w2):
            # Few tokens, for which reordering w2 would cost more than it saves, or a layer that must be called.
            return self.w2(hidden).unflatten(-1, (-1, self.conv_size))
        # Rows of w2 are [Vd, W] with the tap fastest; computing them as [W, Vd] makes every tap contiguous.
        weight = self.w2.weight.unflatten(0, (-1, self.conv_size)).transpose(0, 1).flatten(0, 1)
        bias = self.w2.bias.view(-1, self.conv_size).T.flatten()
        kernels = F.linear(hidden, weight, bias)
        return kernels.unflatten(-1, (self.conv_size, -1)).transpose(-1, -2)


class DynamicConv(nn.Module):
    """Dynamic convolution of v [B,T,Vd] with kernels made from x [B,T,D]."""

    def __init__(self, dims: BlockDims, hidden: int, generator: torch.Generator | None = None):
        super().__init__()
        self.kernel_generator = KernelGenerator(dims, hidden, generator)

    def forward(self, v: Tensor, x: Tensor, **options) -> tuple[Tensor, Tensor]:
        return dynamic_conv(v, self.kernel_generator(x), **options)


class JetBlock(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers; x, y [B,T,D].

    conv_v           convolution on the values: "dynamic" as published, "static" (one kernel per channel) or "none"
    conv_qk          static convolution on queries and keys as well; the published block has none
    generator_hidden units of the kernel generator, Vd // 8 as in the released models if None
    Raises ValueError if `conv_v` is unknown or `generator_hidden` is not positive.
    """

    def __init__(
        self,
        dims: BlockDims,
        *,
        conv_v: Literal["none", "static", "dynamic"] = "dynamic",
        conv_qk: bool = False,
        generator_hidden: int | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        hidden = _generator_hidden(dims, conv_v, generator_hidden)
        self.dims, self.conv_v, self.backend = dims, conv_v, backend
        D, H, Kd, Vd = dims.d_model, dims.n_heads, dims.key_dim, dims.value_dim
        self.q_proj = linear(D, Kd, generator)
        self.k_proj = linear(D, Kd, generator)
        self.v_proj = linear(D, Vd, generator)
        self.g_proj = linear(D, Vd, generator)
        self.a_proj = linear(D, H, generator)
        self.b_proj = linear(D, H, generator)
        self.A_log, self.dt_bias = decay_parameters(H, generator)
        self.o_norm = GatedRMSNorm(dims.head_dim_v)
        self.o_proj = linear(Vd, D, generator, gain=OUTPUT_GAIN)
        # The convolutions are drawn last, so that variants share every other weight at a given seed.
        self.v_conv = self.qk_conv = self.dynamic_conv1d = None
        if conv_v == "dynamic":
            self.dynamic_conv1d = DynamicConv(dims, hidden, generator)
        elif conv_v == "static":
            self.v_conv = nn.Parameter(short_kernel(Vd, dims.conv_size, generator))
        if conv_qk:
            self.qk_conv = nn.Parameter(short_kernel(2 * Kd, dims.conv_size, generator))

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "JetBlock":
        """A block in place of `attention`; see `reuse_attention` for the weights that it takes over."""
        mixer = cls(dims, **options)
        reuse_attention(mixer, attention)
        return mixer

    @classmethod
    def n_params(
        cls, dims: BlockDims, *, conv_v: str = "dynamic", conv_qk: bool = False, generator_hidden: int | None = None
    ) -> int:
        """D (2 Kd + 3 Vd) + 2 D H + 2 H + V, with R D + W Vd (R + 1) for the generator of R units.

        A static convolution on the values counts W Vd instead, one on queries and keys 2 W Kd more.
        """
        R = _generator_hidden(dims, conv_v, generator_hidden)
        D, H, W, Kd, Vd = dims.d_model, dims.n_heads, dims.conv_size, dims.key_dim, dims.value_dim
        conv = {"none": 0, "static": W * Vd, "dynamic": R * D + W * Vd * (R + 1)}[conv_v] + 2 * W * Kd * conv_qk
        return D * (2 * Kd + 3 * Vd) + 2 * D * H + 2 * H + dims.head_dim_v + conv

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length."""
        channels = (self.conv_v != "none") * self.dims.value_dim + (self.qk_conv is not None) * 2 * self.dims.key_dim
        return recurrent_state_bytes(self.dims, channels, dtype)

    def forward(self, x, state=None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `RecurrentState`. Padding (mask 0) writes nothing; `positions` and `shared` are not used."""
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H, Kd = self.dims.n_heads, self.dims.key_dim
        layers = ((self.q_proj, self.k_proj), (self.v_proj,), (self.g_proj,), (self.a_proj,), (self.b_proj,))
        qk, v, z, a, b = project(x, *layers)

        carried = [] if state is None else list(state.conv)  # in the order of the calls below
        n_convs = (self.qk_conv is not None) + (self.conv_v != "none")
        if state is not None and len(carried) != n_convs:
            raise ValueError(
                f"state must come from a JetBlock with as many convolutions, {n_convs}, got one with {len(carried)}; "
                "pass what an earlier call of this block returned, or None"
            )
        conv = []

        def options():
            past = carried.pop(0) if carried else None
            return {"state": past, "activation": "silu", "mask": mask, "cu_seqlens": cu_seqlens}

        if self.qk_conv is None:
            qk = F.silu(qk)
        else:
            qk, last = short_conv(qk, self.qk_conv.to(x.dtype), **options())
            conv.append(last)
        if self.conv_v == "none":
            v = F.silu(v)
        elif self.conv_v == "static":
            v, last = short_conv(v, self.v_conv.to(x.dtype), **options())
            conv.append(last)
        else:
            v, last = self.dynamic_conv1d(v, x, **options())
            conv.append(last)

        q, k = (part.unflatten(-1, (H, -1)) for part in qk.split(Kd, dim=-1))
        g, beta = decay_and_write(a, b, self.A_log, self.dt_bias, mask)
        o, recurrent = gated_delta_rule(
            q,
            k,
            v.unflatten(-1, (H, -1)),
            g,
            beta,
            state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            qk_l2norm=True,
            backend=self.backend,
        )
        y = self.o_proj(self.o_norm(o, z.unflatten(-1, (H, -1))).flatten(-2))
        return y, RecurrentState(recurrent, tuple(conv))


def _generator_hidden(dims: BlockDims, conv_v: str, hidden: int | None) -> int:
    if conv_v not in CONV_V:
        raise ValueError(f"conv_v must be one of {', '.join(CONV_V)}, got {conv_v!r}; the published block is 'dynamic'")
    if hidden is None:
        return max(1, dims.value_dim // 8)
    if hidden < 1:
        raise ValueError(f"generator_hidden must be at least 1, got {hidden}; use conv_v='static' to have no generator")
    return hidden
