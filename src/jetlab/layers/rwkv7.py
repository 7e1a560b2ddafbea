"""RWKV7's time mixing (arXiv:2503.14456, Sec. 4): a delta rule whose decay, removal and writing each have their own gate.

x^i = x_t + (x_{t-1} - x_t) · mu^i             one mixture with the previous token for each i of r, w, k, v, a, g
r, k, v = W_r x^r, W_k x^k, W_v x^v            LR(x) = W_2 act(W_1 x) + bias, maps through a few units
g = -e^(-1/2) · sigmoid(LR_w(x^w))             a = sigmoid(LR_a(x^a))            gate = LR_g(x^g)
v ← v + (v_first - v) · sigmoid(LR_v(x^v))     v_first: the v of the first such layer at the same token
κ = k · k_k / |k · k_k|                        k̃ = k · (1 + (a - 1) · k_a)
o = dplr_delta_rule(r, k̃, v, g, -κ, κ · a)     y = W_o ((GroupNorm(o) + (r · k̃ · r_k) v) · gate)

Published with Kd = Vd = D; here r, w, k, a act on Kd channels, v and the gate on Vd.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from jetlab.layers.dims import BlockDims
from jetlab.layers.gates import real_tokens, zero_padding
from jetlab.layers.init import OUTPUT_GAIN, bare, linear, take_over
from jetlab.layers.state import RecurrentState, recurrent_state_bytes
from jetlab.ops import dplr_delta_rule, short_conv
from jetlab.ops.recurrence import core_dtype

G_MIN = -math.exp(-0.5)  # a decay below e^G_MIN = 0.545 per token is out of reach
V_FIRST = "rwkv7_v_first"


class LowRank(nn.Module):
    """LR(x) = W_2 act(W_1 x) + bias. W_1 starts at 0 and W_2 orthogonal · 0.1, so that the bias alone speaks at first."""

    def __init__(
        self,
        n_in: int,
        rank: int,
        n_out: int,
        activation: Callable,
        bias: Tensor | None,
        generator: torch.Generator | None,
    ):
        super().__init__()
        self.activation = activation
        self.w1 = bare(nn.Linear, n_in, rank, bias=False)
        self.w2 = _orthogonal(rank, n_out, 0.1, generator)
        nn.init.zeros_(self.w1.weight)
        self.w2.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.activation(self.w1(x)))


class HeadNorm(nn.GroupNorm):
    """Mean 0 and variance 1 over the values of each head, then a weight and a bias per channel; o [B,T,H,V], y in fp32."""

    def forward(self, o: Tensor) -> Tensor:
        core = core_dtype(o)
        y = o.to(core).flatten(0, 1).flatten(1)
        return F.group_norm(y, self.num_groups, self.weight.to(core), self.bias.to(core), self.eps).view_as(o)


class RWKV7(nn.Module):
    """Token mixer with a state of n_heads · head_dim · head_dim_v numbers and the last input; x, y [B,T,D].

    layer_idx, n_layers  depth of the layer and of the model, from which decays and mixtures start
    first                whether this is the model's first RWKV7 layer: then it has no LR_v
    ranks                pairs of map (w, a, v, g) and units, in place of `default_ranks`
    Starting values are the published ones, but for W_o: 0 there, small here, as in every block of the study.
    Raises ValueError if layer_idx is not below n_layers, or a rank has no such map or is not positive.
    """

    depends_on_depth = True

    def __init__(
        self,
        dims: BlockDims,
        *,
        layer_idx: int = 0,
        n_layers: int = 1,
        first: bool = True,
        ranks: tuple[tuple[str, int], ...] | None = None,
        backend: str = "auto",
        generator: torch.Generator | None = None,
    ):
        super().__init__()
        if not 0 <= layer_idx < n_layers:
            raise ValueError(f"layer_idx must be 0 … n_layers - 1, got {layer_idx} of {n_layers}; count layers from 0")
        rank = _ranks(dims, ranks)
        self.dims, self.layer_idx, self.backend = dims, layer_idx, backend
        D, H, K, V = dims.d_model, dims.n_heads, dims.head_dim, dims.head_dim_v
        Kd, Vd = dims.key_dim, dims.value_dim
        depth = layer_idx / max(n_layers - 1, 1)
        place, place_v = torch.linspace(0, 1, Kd), torch.linspace(0, 1, Vd)  # of a channel among all
        zigzag = torch.linspace(-1, 1, K).repeat(H)
        zigzag = zigzag * zigzag.abs()

        power = torch.tensor([0.2, 0.9, 0.7, 0.7, 0.9, 0.2])[:, None] * (1 - layer_idx / n_layers)  # r, w, k, v, a, g
        self.mu = nn.Parameter(1 - (torch.arange(D) / D) ** power)
        self.r_proj = _orthogonal(D, Kd, 1.0, generator)
        self.k_proj = _orthogonal(D, Kd, 0.1, generator)
        self.v_proj = _orthogonal(D, Vd, 1.0, generator)
        w_bias = -5.5 + 6 * place ** (1 + depth**0.3) + 2.5 * zigzag
        a_bias = -0.19 + 0.3 * zigzag + 0.4 * (place - 0.5)
        self.w_lora = LowRank(D, rank["w"], Kd, torch.tanh, w_bias, generator)
        self.a_lora = LowRank(D, rank["a"], Kd, nn.Identity(), a_bias, generator)
        self.g_lora = LowRank(D, rank["g"], Vd, torch.sigmoid, None, generator)
        self.k_k = nn.Parameter(0.71 - 0.1 * (place - 0.5))
        self.k_a = nn.Parameter(torch.full((Kd,), 1.02))
        self.r_k = nn.Parameter(torch.full((H, K), -0.04))
        self.o_norm = HeadNorm(H, Vd, eps=V * 1e-5)
        nn.init.constant_(self.o_norm.weight, ((layer_idx + 1) / n_layers) ** 0.7)
        self.o_proj = linear(Vd, D, generator, gain=OUTPUT_GAIN)
        # Drawn last, so that a layer shares every other weight whether it is the first or not.
        v_bias = 0.73 - 0.4 * (place_v - 0.5)
        self.v_lora = None if first else LowRank(D, rank["v"], Vd, nn.Identity(), v_bias, generator)

    @classmethod
    def from_attention(cls, attention: nn.Module, dims: BlockDims, **options) -> "RWKV7":
        """A block in place of `attention`: r acts as query; see `take_over` for the weights that it starts from."""
        mixer = cls(dims, **options)
        q, k, v, o = (layer.weight for layer in (mixer.r_proj, mixer.k_proj, mixer.v_proj, mixer.o_proj))
        take_over(attention, dims, q=q, k=k, v=v, o=o)
        return mixer

    @classmethod
    def n_params(
        cls,
        dims: BlockDims,
        *,
        layer_idx: int = 0,
        n_layers: int = 1,
        first: bool = True,
        ranks: tuple[tuple[str, int], ...] | None = None,
    ) -> int:
        """D (2 Kd + 2 Vd) + 6 D + 3 Kd + 2 Vd, and the maps: r_w (D + Kd) + Kd, a alike, r_g (D + Vd).

        Every layer but the first has r_v (D + Vd) + Vd more. Depth changes starting values alone.
        """
        D, Kd, Vd, r = dims.d_model, dims.key_dim, dims.value_dim, _ranks(dims, ranks)
        maps = (r["w"] + r["a"]) * (D + Kd) + 2 * Kd + r["g"] * (D + Vd) + (not first) * (r["v"] * (D + Vd) + Vd)
        return D * (2 * Kd + 2 * Vd) + 6 * D + 3 * Kd + 2 * Vd + maps

    def become_first(self) -> None:
        """Drop LR_v: for the first RWKV7 layer of an architecture, which has no earlier value to mix with."""
        self.v_lora = None

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of state per sequence, the same at every length: the matrix, and the last input of D channels."""
        return recurrent_state_bytes(self.dims, 0, dtype) + dtype.itemsize * self.dims.d_model

    def forward(self, x, state=None, *, mask=None, positions=None, cu_seqlens=None, shared: dict | None = None):
        """y and the new `RecurrentState`. Padding (mask 0) writes nothing; `positions` is not used.

        The first layer to run with a given `shared` leaves its v there, and layers behind it mix that v into theirs.
        An LR_v changes nothing in the first one to run, nor without `shared`: v mixed with itself is v.
        """
        x = real_tokens(x, mask, cu_seqlens, self.dims.d_model)
        H, core = self.dims.n_heads, core_dtype(x)
        only_before = F.pad(x.new_ones(x.shape[-1], 1), (0, 1))  # taps 1, 0
        previous, last = short_conv(
            x,
            only_before,  # across calls and padding
            state=None if state is None else state.conv[0],
            mask=mask,
            cu_seqlens=cu_seqlens,
        )
        x_r, x_w, x_k, x_v, x_a, x_g = (x + (previous - x) * self.mu.to(x.dtype)[:, None, None]).unbind()
        r, k, v = self.r_proj(x_r), self.k_proj(x_k), self._mix_first(self.v_proj(x_v), x_v, shared)
        g = G_MIN * torch.sigmoid(self.w_lora(x_w).to(core))
        a = torch.sigmoid(self.a_lora(x_a).to(core))
        key = k.to(core)
        kappa = F.normalize((key * self.k_k.to(core)).unflatten(-1, (H, -1)), dim=-1, eps=1e-12)
        k = (key * (1 + (a - 1) * self.k_a.to(core))).to(x.dtype)
        g, removal = zero_padding(g, mask), kappa * zero_padding(a, mask).unflatten(-1, (H, -1))
        r, k, g = (part.unflatten(-1, (H, -1)) for part in (r, k, g))
        v = zero_padding(v, mask).unflatten(-1, (H, -1))
        o, recurrent = dplr_delta_rule(
            r,
            k,
            v,
            g,
            -kappa,
            removal,
            scale=1.0,
            state=None if state is None else state.recurrent,
            cu_seqlens=cu_seqlens,
            g_min=G_MIN,
            backend=self.backend,
        )
        bonus = (r.to(core) * k.to(core) * self.r_k.to(core)).sum(-1, keepdim=True)
        y = (self.o_norm(o) + bonus * v.to(core)).flatten(-2).to(x.dtype) * self.g_lora(x_g)
        return self.o_proj(y), RecurrentState(recurrent, (last,))

    def _mix_first(self, v: Tensor, x_v: Tensor, shared: dict | None) -> Tensor:
        """v with its share of the first layer's v; the layer that is the first to run mixes its v with itself."""
        v_first = v if shared is None else shared.setdefault(V_FIRST, v)
        if self.v_lora is None:
            return v
        return v + (v_first.to(v.device) - v) * torch.sigmoid(self.v_lora(x_v))  # layers may lie on several devices


def default_ranks(dims: BlockDims) -> dict[str, int]:
    """Units of each map: c √D rounded to a multiple of 32, at least 32; c = 2.5 for w and a, 1.7 for v, 5 for g.

    All but g's are multiplied by the width of a head over 64 first. At D = 1536 and heads of 64: 96, 96, 64, 192.
    """
    root = math.sqrt(dims.d_model)
    wanted = {
        "w": 2.5 * root * dims.head_dim / 64,
        "a": 2.5 * root * dims.head_dim / 64,
        "v": 1.7 * root * dims.head_dim_v / 64,
        "g": 5 * root,
    }
    return {name: max(32, 32 * round(units / 32)) for name, units in wanted.items()}


def _ranks(dims: BlockDims, chosen: tuple[tuple[str, int], ...] | None) -> dict[str, int]:
    ranks = default_ranks(dims)
    for name, rank in chosen or ():
        if name not in ranks or rank < 1:
            raise ValueError(f"ranks must be pairs of w, a, v or g and a number ≥ 1, got {name!r}: {rank}")
        ranks[name] = rank
    return ranks


def _orthogonal(n_in: int, n_out: int, gain: float, generator: torch.Generator | None) -> nn.Linear:
    """Projection without bias whose shorter side is orthogonal, times `gain`."""
    layer = bare(nn.Linear, n_in, n_out, bias=False)
    drawn = torch.empty(n_out, n_in, dtype=torch.float32)  # whatever the default: orthogonal vectors need the digits
    with torch.no_grad():
        layer.weight.copy_(nn.init.orthogonal_(drawn, gain, generator=generator))
    return layer
