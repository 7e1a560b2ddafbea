"""One decoder layer of Jet-Nemotron: norm, attention or a linear mixer, norm, MLP.

    x ← x + mix(RMSNorm(x))        x ← x + W_down (SiLU(W_gate x̂) · W_up x̂),  x̂ = RMSNorm(x)

Attention is Qwen2's: grouped key and value heads, biases on q, k, v, plain rotary positions, the full context or a
window that includes the current token. Linear layers are the mixers of `jetlab.layers`, most of which know no positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from jetlab.hf.cache_jet_nemotron import JetNemotronCache
from jetlab.hf.configuration_jet_nemotron import ATTENTION_KINDS, JetNemotronConfig
from jetlab.layers import MIXERS
from jetlab.layers.norm import RMSNorm

LINEAR = "linear"  # key of the mask that all linear layers share


class JetNemotronMLP(nn.Module):
    """W_down (act(W_gate x) · W_up x)."""

    def __init__(self, config: JetNemotronConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def rotary_tables(config: JetNemotronConfig, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """cos and sin [B,1,T,head_dim] of position · theta^(-2i / head_dim), computed in fp32, in x's dtype.

    Computed at each call, once for all layers: a table in a buffer would have to survive meta devices and casts.
    """
    core = torch.promote_types(x.dtype, torch.float32)
    channel = torch.arange(0, config.head_dim, 2, device=x.device).to(core)
    angle = positions[:, None, :, None].to(core) / config.rope_theta ** (channel / config.head_dim)
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos().to(x.dtype), angle.sin().to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates the pairs (x_i, x_{i + head_dim/2}) of x [B,H,T,head_dim] by their angles."""
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def eager_attention(
    module: nn.Module, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float, dropout: float = 0.0, **_
) -> tuple[Tensor, Tensor]:
    """softmax(scaling · q kᵀ + mask) v with the softmax in fp32, and the weights [B,H,T,S]; the result is [B,T,H,d]."""
    k, v = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * scaling
    if mask is not None:
        scores = scores + mask
    weights = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32)).to(q.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return (weights @ v).transpose(1, 2).contiguous(), weights


class JetNemotronAttention(nn.Module):
    """Grouped-query attention with rotary positions over all tokens before, or over the last `sliding_window` keys."""

    is_causal = True

    def __init__(self, config: JetNemotronConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.sliding_window = config.sliding_window if config.layer_kinds[layer_idx] == "sliding_attention" else None
        n_q, n_kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, n_q, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, n_kv, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, n_kv, bias=config.attention_bias)
        self.o_proj = nn.Linear(n_q, config.hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: JetNemotronCache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        q, k, v = (
            layer(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for layer in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, *position_embeddings), rotate(k, *position_embeddings)
        if past_key_values is not None:
            k, v = past_key_values.update(k, v, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention)
        y, weights = attend(
            self,
            q,
            k,
            v,
            attention_mask,
            dropout=self.config.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            **kwargs,
        )
        return self.o_proj(y.flatten(-2)), weights


def linear_mixer(config: JetNemotronConfig, layer_idx: int) -> nn.Module:
    """The mixer of a linear layer, with the start that its own constructor draws.

    It is drawn on the CPU and moved, so that a seed gives the same start on every device; "meta" has shapes alone.
    """
    kind = config.layer_kinds[layer_idx]
    options = config.block_options(kind)
    if getattr(MIXERS[kind], "depends_on_depth", False):
        first = layer_idx == config.layer_kinds.index(kind)
        options |= {"layer_idx": layer_idx, "n_layers": config.num_hidden_layers, "first": first}
    device = torch.get_default_device()
    with torch.device(device if device.type == "meta" else "cpu"):
        try:
            mixer = MIXERS[kind](config.block_dims(kind), **options).to(device)
        except (TypeError, ValueError) as error:
            raise ValueError(f"layer {layer_idx}, efficient_attention_config[{kind!r}]: {error}") from error
    eps = config.norm_eps(kind)
    for module in mixer.modules():
        module._is_hf_initialized = True  # Transformers would draw its N(0, initializer_range) over it
        if eps is not None and hasattr(module, "eps"):
            module.eps = eps
    return mixer


class JetNemotronDecoderLayer(GradientCheckpointingLayer):
    """x + mix(norm(x)), then x + mlp(norm(x)); hidden_states [B,T,D]."""

    def __init__(self, config: JetNemotronConfig, layer_idx: int):
        super().__init__()
        self.kind, self.layer_idx = config.layer_kinds[layer_idx], layer_idx
        attention = self.kind in ATTENTION_KINDS
        self.self_attn = JetNemotronAttention(config, layer_idx) if attention else linear_mixer(config, layer_idx)
        self.mlp = JetNemotronMLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_states: Tensor,
        *,
        masks: dict[str, Tensor | None],
        position_ids: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None,
        past_key_values: JetNemotronCache | None = None,
        cu_seqlens: Tensor | None = None,
        shared: dict | None = None,
        **kwargs,
    ) -> Tensor:
        normed = self.input_layernorm(hidden_states)
        if self.kind in ATTENTION_KINDS:
            y, _ = self.self_attn(
                normed,
                position_embeddings=position_embeddings,
                attention_mask=masks[self.kind],
                past_key_values=past_key_values,
                position_ids=position_ids,  # flash attention sees in them where packed documents begin
                **kwargs,
            )
        else:
            cache = None if past_key_values is None else past_key_values.layers[self.layer_idx]
            y, state = self.self_attn(
                normed,
                None if cache is None else cache.state,
                mask=masks[LINEAR],
                positions=position_ids,
                cu_seqlens=cu_seqlens,
                shared=shared,
            )
            if cache is not None:
                cache.update(state, normed.shape[1])
        hidden_states = hidden_states + y
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
