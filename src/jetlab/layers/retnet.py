"""RetNet (arXiv:2307.08621, Sec. 2): retention, attention without softmax whose heads fade at fixed rates.

q, k, v = R_t W_q x, R_t W_k x, W_v x          R_t rotates by the absolute position t (RoPE, base 10000)
g_h = log(1 - 2^(-5-h))                        one constant per head: head 0 halves in 22 tokens, every next in twice as many
o = gated_linear_attention(q, k, v, g)         y = W_o (RMSNorm(o) · SiLU(W_g x))
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import real_tokens, zero_padding
from jetlab.layers.init import OUTPUT_GAIN, linear, reuse_attention
from jetlab.layers.norm import GatedRMSNorm
from jetlab.layers.projections import project
from jetlab.layers.state import recurrent_state_bytes, token_positions
from jetlab.ops import gated_linear_attention
from jetlab.ops.recurrence import core_dtype


class RetNetState(NamedTuple):
    """`recurrent` [B,H,K,V] in fp32 and the position of the next token, [B]."""

    recurrent: Tensor
    position: Tensor


class RetNet(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers; x, y [B,T,D]. It has no convolution.

    Raises ValueError if head_dim is odd.
    """

    def __init__(self, dims: BlockDims, *, backend: str = "auto", generator: torch.Generator | None = None):
        super().__init__()
        if dims.head_dim % 2:
            raise ValueError(
                f"head_dim must be even, because retention rotates pairs of key channels, got {dims.head_dim}; "
                f"use {dims.head_dim + 1}"
            )
        self.dims, self.backend = dims, backend
        D, Kd, Vd = dims.d_model, dims.key_dim, dims.value_dim
        self.q_proj = linear(D, Kd, generator)
        self.k_proj = linear(D, Kd, generator)
        self.v_proj = linear(D, Vd, generator)
        self.g_proj = linear(D, Vd, generator)
        self.o_norm = GatedRMSNorm(dims.head_dim_v, backend=backend)
        self.o_proj = linear(Vd, D, generator, gain=OUTPUT_GAIN)

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "RetNet":
        """A block in place of `attention`; see `take_over` for the weights that it starts from."""
        mixer = cls(dims, **options)
        reuse_attention(mixer, attention)
        return mixer

    @classmethod
    def n_params(cls, dims: BlockDims) -> int:
        """D (2 Kd + 3 Vd) + V: the decay is not learned."""
        return dims.d_model * (2 * dims.key_dim + 3 * dims.value_dim) + dims.head_dim_v

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length: the matrix, and 8 for the position."""
        return recurrent_state_bytes(self.dims, 0, dtype) + torch.long.itemsize

    def forward(self, x, state: RetNetState | None = None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `RetNetState`. Padding (mask 0) writes nothing; `shared` is not used.

        Without `positions` tokens are counted from the first one that the state has seen; only differences matter.
        """
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H = self.dims.n_heads
        past, recurrent = (None, None) if state is None else (state.position, state.recurrent)
        positions, position = token_positions(x, past, positions=positions, mask=mask, cu_seqlens=cu_seqlens)
        qk, v, z = project(x, (self.q_proj, self.k_proj), (self.v_proj,), (self.g_proj,))
        q, k = rotate(qk.unflatten(-1, (2 * H, -1)), positions).chunk(2, dim=-2)
        g = log_decay(H, dtype=core_dtype(x), device=x.device).expand(*x.shape[:2], H)
        o, recurrent = gated_linear_attention(
            q,
            k,
            zero_padding(v, mask).unflatten(-1, (H, -1)),
            zero_padding(g, mask),
            state=recurrent,
            cu_seqlens=cu_seqlens,
            backend=self.backend,
        )
        y = self.o_proj(self.o_norm(o, z.unflatten(-1, (H, -1))).flatten(-2))
        return y, RetNetState(recurrent, position)


def log_decay(n_heads: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """g_h = log(1 - 2^(-5-h)) for h = 0 … n_heads - 1."""
    return torch.log1p(-torch.exp2(-5 - torch.arange(n_heads, dtype=dtype, device=device)))


def rotate(x: Tensor, positions: Tensor, base: float = 10_000.0) -> Tensor:
    """Rotary embedding of x [B,T,H,K] at `positions` [B,T], in fp32 (fp64 stays fp64), then in x's dtype.

    Channels i and i + K/2 form a pair that turns by positions · base^(-2i/K).
    """
    core, half = core_dtype(x), x.shape[-1] // 2
    speed = base ** (-torch.arange(half, dtype=core, device=x.device) / half)
    angle = positions[..., None, None].to(core) * speed
    cos, sin = angle.cos(), angle.sin()
    first, second = x.to(core).split(half, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
