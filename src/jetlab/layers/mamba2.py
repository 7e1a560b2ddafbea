"""Mamba2 (arXiv:2405.21060): a state-space model with one decay per head, written as gated linear attention.

z, xBC, dt = W_in x                            x, B, C = SiLU(conv(xBC) + bias)
Δ = softplus(dt + dt_bias)                     g = -exp(A_log) · Δ
o = gated_linear_attention(C, B, Δ · x, g) + D · x                        y = W_out RMSNorm(o · SiLU(z))

B and C are shared by the heads of a group. Unlike the other blocks the gate comes before the norm, and the norm runs over
all heads of a group together. Parameter names are those of the published models.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import real_tokens, zero_padding
from jetlab.layers.init import OUTPUT_GAIN, bare, decay_parameters, linear, short_kernel, take_over
from jetlab.layers.state import RecurrentState, recurrent_state_bytes
from jetlab.ops import gated_linear_attention, short_conv
from jetlab.ops.recurrence import core_dtype


class GroupedRMSNorm(nn.Module):
    """y = RMSNorm(o · SiLU(z)) · w over each of `n_groups` parts of o and z [..., I], in fp32, then in z's dtype."""

    def __init__(self, width: int, n_groups: int, eps: float = 1e-5):
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, o: Tensor, z: Tensor) -> Tensor:
        core = core_dtype(o, z)
        o = (o.to(core) * F.silu(z.to(core))).unflatten(-1, (self.n_groups, -1))
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + self.eps)
        return (o.flatten(-2) * self.weight.to(core)).to(z.dtype)


class ShortConv(nn.Conv1d):
    """`short_conv` with the weight [channels, 1, W] and the bias of a depthwise Conv1d, as checkpoints hold them."""

    def forward(self, x: Tensor, **options) -> tuple[Tensor, Tensor]:
        return short_conv(x, self.weight.squeeze(1).to(x.dtype), bias=self.bias.to(x.dtype), **options)


class Mamba2(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers; x, y [B,T,D].

    In the paper's terms N = head_dim is the state size, P = head_dim_v the head size and I = n_heads · head_dim_v the
    inner width. `n_groups` is the number of B and C, each serving n_heads / n_groups heads in a row.
    Raises ValueError if n_groups does not divide n_heads.
    """

    def __init__(
        self, dims: BlockDims, *, n_groups: int = 1, backend: str = "auto", generator: torch.Generator | None = None
    ):
        super().__init__()
        if n_groups < 1 or dims.n_heads % n_groups:
            raise ValueError(f"n_groups must divide n_heads, got {n_groups} and {dims.n_heads}; use n_groups=1")
        self.dims, self.n_groups, self.backend = dims, n_groups, backend
        D, H, inner, channels = dims.d_model, dims.n_heads, dims.value_dim, _conv_channels(dims, n_groups)
        self.in_proj = linear(D, inner + channels + H, generator)  # rows of z, x, B, C, dt in turn
        self.conv1d = bare(ShortConv, channels, channels, dims.conv_size, groups=channels)
        with torch.no_grad():
            self.conv1d.weight.copy_(short_kernel(channels, dims.conv_size, generator)[:, None])
            self.conv1d.bias.zero_()
        self.A_log, self.dt_bias = decay_parameters(H, generator, lowest_rate=1.0)
        self.D = nn.Parameter(torch.ones(H))
        self.norm = GroupedRMSNorm(inner, n_groups)
        self.out_proj = linear(inner, D, generator, gain=OUTPUT_GAIN)

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "Mamba2":
        """A block in place of `attention`: C acts as query, B as key, x as value; see `take_over` for their start."""
        mixer = cls(dims, **options)
        inner, shared = dims.value_dim, mixer.n_groups * dims.head_dim
        _, v, k, q, _ = mixer.in_proj.weight.detach().split([inner, inner, shared, shared, dims.n_heads])
        take_over(attention, dims, q=q, k=k, v=v, o=mixer.out_proj.weight)
        return mixer

    @classmethod
    def n_params(cls, dims: BlockDims, *, n_groups: int = 1) -> int:
        """D (2 I + 2 G N + H) + (W + 1)(I + 2 G N) + 3 H + I + I D."""
        D, H, inner, channels = dims.d_model, dims.n_heads, dims.value_dim, _conv_channels(dims, n_groups)
        return D * (inner + channels + H) + (dims.conv_size + 1) * channels + 3 * H + inner + inner * D

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length."""
        return recurrent_state_bytes(self.dims, _conv_channels(self.dims, self.n_groups), dtype)

    def forward(self, x, state=None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `RecurrentState`. Padding (mask 0) writes nothing; `positions` and `shared` are not used."""
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H, G, inner, core = self.dims.n_heads, self.n_groups, self.dims.value_dim, core_dtype(x)
        z, xbc, dt = self.in_proj(x).split([inner, _conv_channels(self.dims, G), H], dim=-1)
        past = None if state is None else state.conv[0]
        xbc, conv = self.conv1d(xbc, state=past, activation="silu", mask=mask, cu_seqlens=cu_seqlens)
        v, k, q = xbc.split([inner, G * self.dims.head_dim, G * self.dims.head_dim], dim=-1)
        v = v.unflatten(-1, (H, -1))
        q, k = (part.unflatten(-1, (G, -1)).repeat_interleave(H // G, dim=2) for part in (q, k))
        # No step at padding: then nothing is written, though its convolution is not 0, and nothing decays.
        step = zero_padding(F.softplus(dt.to(core) + self.dt_bias.to(core)), mask)
        o, recurrent = gated_linear_attention(
            q,
            k,
            (step[..., None] * v).to(x.dtype),
            -self.A_log.to(core).exp() * step,
            scale=1.0,
            state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        o = o + self.D.to(core)[:, None] * v
        return self.out_proj(self.norm(o.flatten(-2), z)), RecurrentState(recurrent, (conv,))


def _conv_channels(dims: BlockDims, n_groups: int) -> int:
    return dims.value_dim + 2 * n_groups * dims.head_dim
