"""Mamba2 layers of Transformers in the engine: what a mixer computes while `engaged`, over the engine's states.

Transformers' own forward reads and writes the state once for every factor of a step, knows no rows of a cache, takes other
bounds on the time step in a chunk of one token, and reads a prompt through fp32 copies of keys and queries for all heads. Its
weights and formulas are kept: a token goes through `ops.mamba2_step`, a prompt's chunk through `ops.gated_linear_attention`.
"""

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedConfig

from jetlab.layers.state import RecurrentState
from jetlab.ops import gated_linear_attention, mamba2_step, short_conv
from jetlab.ops.recurrence import core_dtype

if TYPE_CHECKING:
    from jetlab.inference.cache import EngineCache

MODELS = ("mamba2", "nemotron_h")  # model types whose Mamba2 layers are Transformers'


class Mamba2Widths(NamedTuple):
    """Widths of a Mamba2 layer: V numbers of each head's output, K of its state's other side, G groups that share k and q."""

    n_heads: int
    head_dim_v: int
    head_dim: int
    n_groups: int
    conv_size: int

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Mamba2Widths":
        """Raises ValueError if the layer's activation is not the SiLU that the engine computes."""
        hybrid = config.model_type == "nemotron_h"
        activation = config.mamba_hidden_act if hybrid else config.hidden_act
        if activation not in ("silu", "swish"):
            raise ValueError(
                f"a Mamba2 layer's activation must be silu, got {activation!r} in {type(config).__name__}; use the model's own "
                "generate"
            )
        heads = (config.mamba_num_heads, config.mamba_head_dim) if hybrid else (config.num_heads, config.head_dim)
        state_size = config.ssm_state_size if hybrid else config.state_size
        return cls(*heads, state_size, config.n_groups, config.conv_kernel)

    @property
    def value_dim(self) -> int:
        return self.n_heads * self.head_dim_v

    @property
    def channels(self) -> int:
        """Of the convolution: v, k and q."""
        return self.value_dim + 2 * self.n_groups * self.head_dim

    @property
    def state_size(self) -> int:
        return self.value_dim * self.head_dim

    def empty_state(self, dtype: torch.dtype, device: torch.device) -> RecurrentState:
        """What a sequence begins with: matrices [1,H,V,K] in fp32, inputs of the convolution [1,C,W-1]."""
        matrices = torch.zeros(1, self.n_heads, self.head_dim_v, self.head_dim, dtype=torch.float32, device=device)
        return RecurrentState(
            matrices, (torch.zeros(1, self.channels, self.conv_size - 1, dtype=dtype, device=device),)
        )

    def state_bytes(self, dtype: torch.dtype, state_dtype: torch.dtype | None) -> int:
        """Bytes of `empty_state`, its matrices in `state_dtype`."""
        matrix = (state_dtype or torch.float32).itemsize
        return matrix * self.state_size + dtype.itemsize * self.channels * (self.conv_size - 1)

    def activation_bytes(self, hidden_size: int, dtype: torch.dtype) -> int:
        """About what a token of a prompt takes in the layer at most: (3 D + 3 H·V + 2 C + 2 H·K) numbers, k and q of every head
        among them, and the outputs in fp32. At Nemotron Nano 9B 244 kB, of which an H100 was seen to need 228.
        """
        numbers = 3 * hidden_size + 3 * self.value_dim + 2 * self.channels + 2 * self.n_heads * self.head_dim
        return dtype.itemsize * numbers + torch.float32.itemsize * self.value_dim


def mix(mixer: nn.Module, x: Tensor, cache_params: "EngineCache", **_) -> Tensor:
    """What takes the place of a mixer's forward: y [B,T,D] of the tokens x [B,T,D] of the cache's rows."""
    cache, layer = cache_params, cache_params.layers[mixer.layer_idx]
    if cache.decoding:
        return _step(mixer, x, layer.state)
    y, state = _read(mixer, x, layer.state, cache.real(x.shape[1]))
    layer.update(state, x.shape[1])
    return y


def _project(mixer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """z, the convolution's inputs and dt."""
    inner, H = mixer.num_heads * mixer.head_dim, mixer.num_heads
    return mixer.in_proj(x).split([inner, inner + 2 * mixer.n_groups * mixer.ssm_state_size, H], dim=-1)


def _step(mixer: nn.Module, x: Tensor, state: RecurrentState) -> Tensor:
    """One token a row; `state` is overwritten. The time step has no bounds here, as in Transformers."""
    z, xbc, dt = _project(mixer, x[:, 0])
    y, _, _ = mamba2_step(
        xbc,
        z,
        dt,
        mixer.conv1d.weight[:, 0],
        mixer.conv1d.bias,
        mixer.dt_bias,
        mixer.A_log,
        mixer.D,
        mixer.norm.weight,
        state=state.recurrent,
        conv_state=state.conv[0],
        n_groups=mixer.n_groups,
        norm_groups=z.shape[-1] // mixer.norm.group_size,
        eps=mixer.norm.variance_epsilon,
        in_place=True,
    )
    return mixer.out_proj(y)[:, None]


def _read(mixer: nn.Module, x: Tensor, state: RecurrentState, real: Tensor | None) -> tuple[Tensor, RecurrentState]:
    """A chunk of a prompt, `real` [B,T] of its tokens not being padding: y and the state behind it."""
    H, G, core = mixer.num_heads, mixer.n_groups, core_dtype(x)
    keep = (lambda values: values) if real is None else (lambda values: values * real[..., None])
    z, xbc, dt = _project(mixer, keep(x))
    xbc, conv = short_conv(
        xbc, mixer.conv1d.weight[:, 0], bias=mixer.conv1d.bias, state=state.conv[0], activation="silu"
    )
    v, k, q = keep(xbc).split([z.shape[-1], *(G * mixer.ssm_state_size,) * 2], dim=-1)
    v = v.unflatten(-1, (H, -1))
    dt = F.softplus(dt.to(core) + mixer.dt_bias.to(core)).clamp(*mixer.time_step_limit)
    o, recurrent = gated_linear_attention(
        *(part.unflatten(-1, (G, -1)).repeat_interleave(H // G, dim=2) for part in (q, k)),
        (dt[..., None] * v).to(x.dtype),
        -mixer.A_log.to(core).exp() * dt,
        scale=1.0,
        state=state.recurrent.mT,
    )
    o = (o + mixer.D.to(core)[:, None] * v).flatten(-2)
    return mixer.out_proj(mixer.norm(o, z).to(x.dtype)), RecurrentState(recurrent.mT, (conv,))
