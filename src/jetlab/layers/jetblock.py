"""JetBlock (arXiv:2508.15884, Sec. 2.4): Gated DeltaNet whose only convolution is a dynamic one, on the values.

q, k = SiLU(W_q x), SiLU(W_k x)
kappa_t = w2 SiLU(w1 x_t) + bias               W taps per token and value channel, made from the block's input
v_t = SiLU(Σ_j kappa_t[:, j] · (W_v x)_{t-W+1+j})
o = gated_delta_rule(l2(q), l2(k), v, g, beta)          y = W_o (RMSNorm(o) · SiLU(W_g x))

Every other convolution that the section weighs, and the controls that it leaves out, are options of the same block.
"""

from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import decay_and_write, real_tokens
from jetlab.layers.init import OUTPUT_GAIN, bare, decay_parameters, linear, reuse_attention, short_kernel
from jetlab.layers.norm import GatedRMSNorm
from jetlab.layers.projections import is_plain, project
from jetlab.layers.state import RecurrentState, recurrent_state_bytes
from jetlab.ops import dynamic_conv, gated_delta_rule, generated_conv, jetblock_step, resolve_backend, short_conv

Conv = Literal["none", "static", "dynamic"]
CONVS = get_args(Conv)
START_STD = 0.02  # of the generator's random weights, as of the released bias
# What the study compares: options of `JetBlock` by name, and the taps of its convolutions where they are not 4.
VARIANTS: dict[str, dict] = {
    "none": {"conv_v": "none"},
    "static": {"conv_v": "static"},
    "dynamic": {},  # as published
    "static_qk": {"conv_v": "static", "conv_q": "static", "conv_k": "static"},
    "dynamic_static_qk": {"conv_q": "static", "conv_k": "static"},
    "dynamic_also_q": {"conv_q": "dynamic"},
    "dynamic_also_k": {"conv_k": "dynamic"},
    "dynamic_also_qk": {"conv_q": "dynamic", "conv_k": "dynamic"},
    "static_2_taps": {"conv_v": "static", "conv_size": 2},
    "static_8_taps": {"conv_v": "static", "conv_size": 8},
    "dynamic_2_taps": {"conv_size": 2},
    "dynamic_3_taps": {"conv_size": 3},
    "dynamic_8_taps": {"conv_size": 8},
    "dynamic_2_units": {"generator_hidden": 2},
    "dynamic_4_units": {"generator_hidden": 4},
    "dynamic_16_units": {"generator_hidden": 16},
    "dynamic_32_units": {"generator_hidden": 32},
    "dynamic_random_start": {"random_start": True},
    "static_equal_params": {"conv_v": "static", "value_branch": True},
}


class KernelGenerator(nn.Module):
    """Kernels [B,T,C,W] of C channels from x [B,T,D] through a bottleneck of R units.

    `w2` starts at zero and its bias as a static kernel, so the block begins exactly as one with a static convolution;
    `w1` starts at N(0, 0.02²), so w2 has a gradient at the first step and w1 from the second. Were both zero, neither
    would ever move. With `random_start` w2 starts at N(0, 0.02²) too.
    """

    def __init__(
        self,
        d_model: int,
        n_channels: int,
        conv_size: int,
        hidden: int,
        *,
        random_start: bool = False,
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        self.conv_size = conv_size
        self.w1 = bare(nn.Linear, d_model, hidden, bias=False)
        self.w2 = bare(nn.Linear, hidden, n_channels * conv_size)
        nn.init.normal_(self.w1.weight, std=START_STD, generator=generator)
        nn.init.zeros_(self.w2.weight)
        with torch.no_grad():
            self.w2.bias.copy_(short_kernel(n_channels, conv_size, generator).flatten())
        if random_start:
            nn.init.normal_(self.w2.weight, std=START_STD, generator=generator)

    def hidden(self, x: Tensor) -> Tensor:
        """What the bottleneck holds, [B,T,R]."""
        return F.silu(self.w1(x))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.hidden(x)
        if hidden.numel() < hidden.shape[-1] ** 2 or not is_plain(self.w2):
            # Few tokens, for which reordering w2 would cost more than it saves, or a layer that must be called.
            return self.w2(hidden).unflatten(-1, (-1, self.conv_size))
        # Rows of w2 are [C, W] with the tap fastest; computing them as [W, C] makes every tap contiguous.
        weight = self.w2.weight.unflatten(0, (-1, self.conv_size)).transpose(0, 1).flatten(0, 1)
        bias = self.w2.bias.view(-1, self.conv_size).T.flatten()
        kernels = F.linear(hidden, weight, bias)
        return kernels.unflatten(-1, (self.conv_size, -1)).transpose(-1, -2)


class DynamicConv(nn.Module):
    """Dynamic convolution of v [B,T,C] with kernels made from x [B,T,D]; `options` of `KernelGenerator` after C and W.

    With Triton the kernels are made where they are used, unless the generator's last layer must be called.
    """

    def __init__(self, d_model: int, n_channels: int, conv_size: int, hidden: int, *, backend: str = "auto", **options):
        super().__init__()
        self.backend = backend
        self.kernel_generator = KernelGenerator(d_model, n_channels, conv_size, hidden, **options)

    def forward(self, v: Tensor, x: Tensor, **options) -> tuple[Tensor, Tensor]:
        generator = self.kernel_generator
        backend = resolve_backend(self.backend, v, x, taps=generator.conv_size)
        if backend != "triton" or not is_plain(generator.w2):
            return dynamic_conv(v, generator(x), **options)
        hidden = generator.hidden(x)
        weight, bias = generator.w2.weight.to(hidden.dtype), generator.w2.bias.to(hidden.dtype)
        return generated_conv(v, hidden, weight, bias, backend="triton", **options)


class ValueBranch(nn.Module):
    """A static convolution's control at equal parameters: u2 SiLU(u1 x) [B,T,Vd], added to the values before it.

    Its R' = ⌊R (D + W Vd) / (D + Vd)⌉ units give it as many weights as a kernel generator of R units has beyond the
    static kernel, from the same input, through the same nonlinearity, with the same zero start; only it moves no kernel.
    """

    def __init__(self, dims: BlockDims, hidden: int, generator: torch.Generator | None = None):
        super().__init__()
        units = self.n_units(dims, hidden)
        self.u1 = bare(nn.Linear, dims.d_model, units, bias=False)
        self.u2 = bare(nn.Linear, units, dims.value_dim, bias=False)
        nn.init.normal_(self.u1.weight, std=START_STD, generator=generator)
        nn.init.zeros_(self.u2.weight)

    @staticmethod
    def n_units(dims: BlockDims, hidden: int) -> int:
        D, Vd = dims.d_model, dims.value_dim
        return max(1, round(hidden * (D + dims.conv_size * Vd) / (D + Vd)))

    def forward(self, x: Tensor) -> Tensor:
        return self.u2(F.silu(self.u1(x)))


class JetBlock(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers; x, y [B,T,D].

    conv_v           convolution on the values: "dynamic" as published, "static" (one kernel per channel) or "none"
    conv_q, conv_k   convolution on the queries and on the keys, likewise; the published block has none
    generator_hidden units of each kernel generator, Vd // 8 as in the released models if None
    random_start     the generator's last matrix starts at random instead of at zero
    value_branch     beside a static `conv_v`: as many further parameters on the values as a generator would have
    Raises ValueError if a convolution is unknown, `generator_hidden` is not positive, or `value_branch` stands beside
    another convolution than a static one.
    """

    def __init__(
        self,
        dims: BlockDims,
        *,
        conv_v: Conv = "dynamic",
        conv_q: Conv = "none",
        conv_k: Conv = "none",
        generator_hidden: int | None = None,
        random_start: bool = False,
        value_branch: bool = False,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        hidden = _generator_hidden(dims, generator_hidden)
        _check_convs(conv_v, conv_q, conv_k, value_branch)
        self.dims, self.backend = dims, backend
        self.conv_q, self.conv_k, self.conv_v = conv_q, conv_k, conv_v
        D, H, Kd, Vd = dims.d_model, dims.n_heads, dims.key_dim, dims.value_dim
        self.q_proj = linear(D, Kd, generator)
        self.k_proj = linear(D, Kd, generator)
        self.v_proj = linear(D, Vd, generator)
        self.g_proj = linear(D, Vd, generator)
        self.a_proj = linear(D, H, generator)
        self.b_proj = linear(D, H, generator)
        self.A_log, self.dt_bias = decay_parameters(H, generator)
        self.o_norm = GatedRMSNorm(dims.head_dim_v, backend=backend)
        self.o_proj = linear(Vd, D, generator, gain=OUTPUT_GAIN)
        # The convolutions are drawn last, so that blocks with other ones share every other weight at a given seed.
        options = {"random_start": random_start, "generator": generator, "backend": backend}
        for name, kind, width in (("v", conv_v, Vd), ("q", conv_q, Kd), ("k", conv_k, Kd)):
            static = nn.Parameter(short_kernel(width, dims.conv_size, generator)) if kind == "static" else None
            dynamic = DynamicConv(D, width, dims.conv_size, hidden, **options) if kind == "dynamic" else None
            setattr(self, f"{name}_conv", static)
            setattr(self, _dynamic(name), dynamic)
        self.value_branch = ValueBranch(dims, hidden, generator) if value_branch else None

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "JetBlock":
        """A block in place of `attention`; see `reuse_attention` for the weights that it takes over."""
        mixer = cls(dims, **options)
        reuse_attention(mixer, attention)
        return mixer

    @classmethod
    def n_params(
        cls,
        dims: BlockDims,
        *,
        conv_v: Conv = "dynamic",
        conv_q: Conv = "none",
        conv_k: Conv = "none",
        generator_hidden: int | None = None,
        random_start: bool = False,
        value_branch: bool = False,
    ) -> int:
        """D (2 Kd + 3 Vd) + 2 D H + 2 H + V, and what the convolutions have.

        One of C channels has W C if it is static, R D + W C (R + 1) if dynamic. A `value_branch` of R' units adds R' (D + Vd).
        """
        _check_convs(conv_v, conv_q, conv_k, value_branch)
        R = _generator_hidden(dims, generator_hidden)
        D, H, W, Kd, Vd = dims.d_model, dims.n_heads, dims.conv_size, dims.key_dim, dims.value_dim
        conv = sum(
            {"none": 0, "static": W * C, "dynamic": R * D + W * C * (R + 1)}[kind]
            for kind, C in ((conv_v, Vd), (conv_q, Kd), (conv_k, Kd))
        )
        branch = value_branch * ValueBranch.n_units(dims, R) * (D + Vd)
        return D * (2 * Kd + 3 * Vd) + 2 * D * H + 2 * H + dims.head_dim_v + conv + branch

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length."""
        widths = {"q": self.dims.key_dim, "k": self.dims.key_dim, "v": self.dims.value_dim}
        channels = sum(width for name, width in widths.items() if self._kind(name) != "none")
        return recurrent_state_bytes(self.dims, channels, dtype)

    def _kind(self, name: str) -> str:
        return getattr(self, f"conv_{name}")

    def forward(self, x, state=None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `RecurrentState`. Padding (mask 0) writes nothing; `positions` is not used.

        Where `shared` has "overwrite_state" the matrix of `state` may be overwritten by the new one, and is where one kernel
        takes the step.
        """
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H, Kd = self.dims.n_heads, self.dims.key_dim
        layers = ((self.q_proj, self.k_proj), (self.v_proj,), (self.g_proj,), (self.a_proj,), (self.b_proj,))
        qk, v, z, a, b = project(x, *layers)
        if self._takes_a_step(x, state, mask):
            generator = self.dynamic_conv1d.kernel_generator
            y, recurrent, conv = jetblock_step(
                *(part.view(len(x), H, -1) for part in (*qk.split(Kd, dim=-1), v)),
                generator.w2(generator.hidden(x)).view(len(x), -1, self.dims.conv_size),
                *(part.view(len(x), H) for part in (a, b)),
                z.view(len(x), H, -1),
                self.A_log,
                self.dt_bias,
                self.o_norm.weight,
                state=state.recurrent,
                conv_state=state.conv[0],
                eps=self.o_norm.eps,
                in_place=bool(shared and shared.get("overwrite_state")),
                backend="triton",
            )
            return self.o_proj(y.view(len(x), 1, -1)), RecurrentState(recurrent, (conv,))
        if self.value_branch is not None:
            v = v + self.value_branch(x)

        carried = [] if state is None else list(state.conv)  # in the order of the calls below
        n_convs = sum(self._kind(name) != "none" for name in "qkv")
        if state is not None and len(carried) != n_convs:
            raise ValueError(
                f"state must come from a JetBlock with as many convolutions, {n_convs}, got one with {len(carried)}; "
                "pass what an earlier call of this block returned, or None"
            )
        conv = []

        def convolved(name: str, values: Tensor) -> Tensor:
            kind = self._kind(name)
            if kind == "none":
                return F.silu(values)
            past = carried.pop(0) if carried else None
            options = {"state": past, "activation": "silu", "mask": mask, "cu_seqlens": cu_seqlens}
            if kind == "static":
                y, last = short_conv(values, getattr(self, f"{name}_conv").to(x.dtype), **options)
            else:
                y, last = getattr(self, _dynamic(name))(values, x, **options)
            conv.append(last)
            return y

        if self.conv_q == self.conv_k == "none":  # one activation for both
            q, k = F.silu(qk).split(Kd, dim=-1)
        else:
            q, k = (convolved(name, part) for name, part in zip("qk", qk.split(Kd, dim=-1), strict=True))
        v = convolved("v", v)
        q, k, v = (part.unflatten(-1, (H, -1)) for part in (q, k, v))
        g, beta = decay_and_write(a, b, self.A_log, self.dt_bias, mask)
        o, recurrent = gated_delta_rule(
            q,
            k,
            v,
            g,
            beta,
            state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            qk_l2norm=True,
            backend=self.backend,
        )
        y = self.o_proj(self.o_norm(o, z.unflatten(-1, (H, -1))).flatten(-2))
        return y, RecurrentState(recurrent, tuple(conv))

    def _takes_a_step(self, x: Tensor, state: RecurrentState | None, mask: Tensor | None) -> bool:
        """Whether one kernel does all between the projections: one token, no gradient, the block as published."""
        published = (self.conv_v, self.conv_q, self.conv_k) == ("dynamic", "none", "none") and self.value_branch is None
        single = x.shape[1] == 1 and state is not None and mask is None and not torch.is_grad_enabled()
        return published and single and resolve_backend(self.backend, x, *state) == "triton"


def _dynamic(name: str) -> str:
    """Attribute of a dynamic convolution; that on the values has the name of the released checkpoints."""
    return "dynamic_conv1d" if name == "v" else f"dynamic_conv1d_{name}"


def _check_convs(conv_v: str, conv_q: str, conv_k: str, value_branch: bool) -> None:
    for name, conv in (("conv_v", conv_v), ("conv_q", conv_q), ("conv_k", conv_k)):
        if conv not in CONVS:
            raise ValueError(
                f"{name} must be one of {', '.join(CONVS)}, got {conv!r}; the published block has a dynamic one on the "
                "values alone"
            )
    if value_branch and conv_v != "static":
        raise ValueError(f"value_branch is the control beside conv_v='static', got {conv_v!r}; leave one of them out")


def _generator_hidden(dims: BlockDims, hidden: int | None) -> int:
    if hidden is None:
        return max(1, dims.value_dim // 8)
    if hidden < 1:
        raise ValueError(f"generator_hidden must be at least 1, got {hidden}; use conv_v='static' to have no generator")
    return hidden
