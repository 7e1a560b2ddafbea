"""Gated linear attention (arXiv:2312.06635, Sec. 4): every key channel fades at a rate of its own, chosen by each token.

q, k, v = W_q x, W_k x, W_v x                  g = log sigmoid(W_2 W_1 x + bias) / 16        one log-decay per key channel
o = gated_linear_attention(q, k, v, g)         y = W_o (RMSNorm(o) · SiLU(W_g x))
"""

import torch
from torch import nn
from torch.nn import functional as F

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import real_tokens, zero_padding
from jetlab.layers.init import OUTPUT_GAIN, linear, reuse_attention
from jetlab.layers.norm import GatedRMSNorm
from jetlab.layers.projections import project
from jetlab.layers.state import RecurrentState, recurrent_state_bytes
from jetlab.ops import gated_linear_attention
from jetlab.ops.recurrence import core_dtype

DECAY_TEMPERATURE = 16  # divides the log-decay: without it a sigmoid forgets half of the state at every token


class GLA(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers; x, y [B,T,D]. It has no convolution.

    low_rank  units between the two maps of the decay, 16 as published
    Raises ValueError if `low_rank` is not positive.
    """

    def __init__(
        self, dims: BlockDims, *, low_rank: int = 16, backend: str = "auto", generator: torch.Generator | None = None
    ):
        super().__init__()
        if low_rank < 1:
            raise ValueError(f"low_rank must be at least 1, got {low_rank}; the published block has 16")
        self.dims, self.backend = dims, backend
        D, Kd, Vd = dims.d_model, dims.key_dim, dims.value_dim
        self.q_proj = linear(D, Kd, generator)
        self.k_proj = linear(D, Kd, generator)
        self.v_proj = linear(D, Vd, generator)
        self.g_proj = linear(D, Vd, generator)
        self.gk_proj = nn.Sequential(linear(D, low_rank, generator), linear(low_rank, Kd, generator))
        self.gk_proj[1].bias = nn.Parameter(torch.zeros(Kd))
        self.o_norm = GatedRMSNorm(dims.head_dim_v, backend=backend)
        self.o_proj = linear(Vd, D, generator, gain=OUTPUT_GAIN)

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "GLA":
        """A block in place of `attention`; see `take_over` for the weights that it starts from."""
        mixer = cls(dims, **options)
        reuse_attention(mixer, attention)
        return mixer

    @classmethod
    def n_params(cls, dims: BlockDims, *, low_rank: int = 16) -> int:
        """D (2 Kd + 3 Vd) + r (D + Kd) + Kd + V with r units in the decay."""
        D, Kd, Vd = dims.d_model, dims.key_dim, dims.value_dim
        return D * (2 * Kd + 3 * Vd) + low_rank * (D + Kd) + Kd + dims.head_dim_v

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length."""
        return recurrent_state_bytes(self.dims, 0, dtype)

    def forward(self, x, state=None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `RecurrentState`. Padding (mask 0) writes nothing; `positions` and `shared` are not used."""
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H = self.dims.n_heads
        narrow, wide = self.gk_proj
        q, k, v, z, low = project(x, (self.q_proj,), (self.k_proj,), (self.v_proj,), (self.g_proj,), (narrow,))
        q, k, v, z = (part.unflatten(-1, (H, -1)) for part in (q, k, v, z))
        g = F.logsigmoid(wide(low).to(core_dtype(x))) / DECAY_TEMPERATURE
        o, recurrent = gated_linear_attention(
            q,
            k,
            zero_padding(v, mask),
            zero_padding(g, mask).unflatten(-1, (H, -1)),
            state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        return self.o_proj(self.o_norm(o, z).flatten(-2)), RecurrentState(recurrent)
