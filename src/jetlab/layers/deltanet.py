"""DeltaNet (arXiv:2406.06484): the delta rule without decay, behind short convolutions on queries, keys and values.

q, k, v = SiLU(conv(W_q x, W_k x, W_v x))      beta = sigmoid(W_b x)
o = gated_delta_rule(l2(q), l2(k), v, None, beta)                         y = W_o RMSNorm(o)
"""

import torch
from torch import nn

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import real_tokens, zero_padding
from jetlab.layers.init import OUTPUT_GAIN, linear, reuse_attention, short_kernel
from jetlab.layers.norm import RMSNorm
from jetlab.layers.projections import project
from jetlab.layers.state import RecurrentState, recurrent_state_bytes
from jetlab.ops import gated_delta_rule, short_conv
from jetlab.ops.recurrence import core_dtype


class DeltaNet(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers; x, y [B,T,D]."""

    def __init__(self, dims: BlockDims, *, backend: str = "auto", generator: torch.Generator | None = None):
        super().__init__()
        self.dims, self.backend = dims, backend
        D, H, Kd, Vd = dims.d_model, dims.n_heads, dims.key_dim, dims.value_dim
        self.q_proj = linear(D, Kd, generator)
        self.k_proj = linear(D, Kd, generator)
        self.v_proj = linear(D, Vd, generator)
        self.b_proj = linear(D, H, generator)
        self.conv = nn.Parameter(short_kernel(2 * Kd + Vd, dims.conv_size, generator))  # channels of q, k, v in turn
        self.o_norm = RMSNorm(dims.head_dim_v)
        self.o_proj = linear(Vd, D, generator, gain=OUTPUT_GAIN)

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "DeltaNet":
        """A block in place of `attention`; see `take_over` for the weights that it starts from."""
        mixer = cls(dims, **options)
        reuse_attention(mixer, attention)
        return mixer

    @classmethod
    def n_params(cls, dims: BlockDims) -> int:
        """D (2 Kd + 2 Vd) + D H + W (2 Kd + Vd) + V."""
        D, H, Kd, Vd = dims.d_model, dims.n_heads, dims.key_dim, dims.value_dim
        return D * (2 * Kd + 2 * Vd) + D * H + dims.conv_size * (2 * Kd + Vd) + dims.head_dim_v

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length."""
        return recurrent_state_bytes(self.dims, 2 * self.dims.key_dim + self.dims.value_dim, dtype)

    def forward(self, x, state=None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `RecurrentState`. Padding (mask 0) writes nothing; `positions` and `shared` are not used."""
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H, Kd, Vd = self.dims.n_heads, self.dims.key_dim, self.dims.value_dim
        qkv, b = project(x, (self.q_proj, self.k_proj, self.v_proj), (self.b_proj,))
        qkv, conv = short_conv(
            qkv,
            self.conv.to(x.dtype),
            state=None if state is None else state.conv[0],
            activation="silu",
            mask=mask,
            cu_seqlens=cu_seqlens,
        )
        q, k, v = (part.unflatten(-1, (H, -1)) for part in qkv.split([Kd, Kd, Vd], dim=-1))
        o, recurrent = gated_delta_rule(
            q,
            k,
            v,
            None,
            zero_padding(torch.sigmoid(b.to(core_dtype(x))), mask),
            state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            qk_l2norm=True,
            backend=self.backend,
        )
        return self.o_proj(self.o_norm(o).flatten(-2)), RecurrentState(recurrent, (conv,))
