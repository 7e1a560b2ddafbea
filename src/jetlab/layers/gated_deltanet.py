"""Gated DeltaNet (arXiv:2412.06464): gated delta rule behind short convolutions on queries, keys and values.

q, k, v = SiLU(conv(W_q x, W_k x, W_v x))      beta = sigmoid(W_b x)      g = -exp(A_log) · softplus(W_a x + dt_bias)
o = gated_delta_rule(l2(q), l2(k), v, g, beta)                            y = W_o (RMSNorm(o) · SiLU(W_g x))
"""

import torch
from torch import nn

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import decay_and_write, real_tokens
from jetlab.layers.init import OUTPUT_GAIN, decay_parameters, linear, reuse_attention, short_kernel
from jetlab.layers.norm import GatedRMSNorm
from jetlab.layers.projections import project
from jetlab.layers.state import RecurrentState, recurrent_state_bytes
from jetlab.ops import gated_delta_rule, short_conv


class GatedDeltaNet(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers; x, y [B,T,D]."""

    def __init__(self, dims: BlockDims, *, backend: str = "auto", generator: torch.Generator | None = None):
        super().__init__()
        self.dims, self.backend = dims, backend
        D, H, Kd, Vd = dims.d_model, dims.n_heads, dims.key_dim, dims.value_dim
        self.q_proj = linear(D, Kd, generator)
        self.k_proj = linear(D, Kd, generator)
        self.v_proj = linear(D, Vd, generator)
        self.g_proj = linear(D, Vd, generator)
        self.a_proj = linear(D, H, generator)
        self.b_proj = linear(D, H, generator)
        self.conv = nn.Parameter(short_kernel(2 * Kd + Vd, dims.conv_size, generator))  # channels of q, k, v in turn
        self.A_log, self.dt_bias = decay_parameters(H, generator)
        self.o_norm = GatedRMSNorm(dims.head_dim_v, backend=backend)
        self.o_proj = linear(Vd, D, generator, gain=OUTPUT_GAIN)

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "GatedDeltaNet":
        """A block in place of `attention`; see `reuse_attention` for the weights that it takes over."""
        mixer = cls(dims, **options)
        reuse_attention(mixer, attention)
        return mixer

    @classmethod
    def n_params(cls, dims: BlockDims) -> int:
        """D (2 Kd + 3 Vd) + 2 D H + 2 H + W (2 Kd + Vd) + V."""
        D, H, Kd, Vd = dims.d_model, dims.n_heads, dims.key_dim, dims.value_dim
        return D * (2 * Kd + 3 * Vd) + 2 * D * H + 2 * H + dims.conv_size * (2 * Kd + Vd) + dims.head_dim_v

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length."""
        return recurrent_state_bytes(self.dims, 2 * self.dims.key_dim + self.dims.value_dim, dtype)

    def forward(self, x, state=None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `RecurrentState`. Padding (mask 0) writes nothing; `positions` and `shared` are not used."""
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H, Kd, Vd = self.dims.n_heads, self.dims.key_dim, self.dims.value_dim
        qkv = (self.q_proj, self.k_proj, self.v_proj)
        qkv, z, a, b = project(x, qkv, (self.g_proj,), (self.a_proj,), (self.b_proj,))
        qkv, conv = short_conv(
            qkv,
            self.conv.to(x.dtype),
            state=None if state is None else state.conv[0],
            activation="silu",
            mask=mask,
            cu_seqlens=cu_seqlens,
        )
        q, k, v = (part.unflatten(-1, (H, -1)) for part in qkv.split([Kd, Kd, Vd], dim=-1))
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
        return y, RecurrentState(recurrent, (conv,))
