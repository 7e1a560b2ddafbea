"""Jet-Nemotron (arXiv:2508.15884): a decoder whose layers mix tokens by JetBlock, attention or any other mixer.

    x = E[ids]        each layer in turn        logits = W RMSNorm(x),  W = E where the embeddings are tied

Parameter names and the order of operations are those of the released checkpoints.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationMixin, PreTrainedModel
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from jetlab.hf.cache_jet_nemotron import JetNemotronCache
from jetlab.hf.configuration_jet_nemotron import ATTENTION_KINDS, JetNemotronConfig
from jetlab.hf.layer_jet_nemotron import (
    LINEAR,
    JetNemotronAttention,
    JetNemotronDecoderLayer,
    rotary_tables,
)
from jetlab.layers.norm import RMSNorm


def create_masks(
    config: JetNemotronConfig,
    inputs_embeds: Tensor,
    attention_mask: Tensor | None,
    past_key_values: JetNemotronCache | None,
    position_ids: Tensor | None = None,
) -> dict[str, Tensor | None]:
    """The mask of each kind of layer that `config` has: for attention as its implementation wants it, and one [B,T]
    of the current tokens for all linear layers. None where nothing is hidden.
    """
    kinds, T, masks = config.layer_kinds, inputs_embeds.shape[1], {}
    builders = {"attention": create_causal_mask, "sliding_attention": create_sliding_window_causal_mask}
    for kind, build in builders.items():
        if kind in kinds:
            masks[kind] = build(
                config=config,
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                past_key_values=past_key_values,
                position_ids=position_ids,
                layer_idx=kinds.index(kind),
            )
    if not set(kinds) <= set(ATTENTION_KINDS):
        if attention_mask is not None and attention_mask.ndim != 2:
            raise ValueError(
                f"attention_mask must be [B, T] for a model with linear layers, got {list(attention_mask.shape)}; "
                "a recurrence knows padding but no arbitrary pattern of visible tokens"
            )
        tokens = None if attention_mask is None else attention_mask[:, -T:]
        if tokens is not None and not torch.compiler.is_compiling() and bool(tokens.all()):
            tokens = None  # mixers are faster without, and a compiled graph must not depend on values
        masks[LINEAR] = tokens
    return masks


@torch.compiler.disable  # the graph breaks here, since it must not depend on values
def packed_documents(position_ids: Tensor) -> Tensor | None:
    """cu_seqlens of a row in which positions start afresh, the way that Transformers packs documents; None if none do.

    Raises ValueError for packed documents in a batch of several rows.
    """
    starts = position_ids.diff() != 1
    if not bool(starts.any()):
        return None
    if len(position_ids) != 1:
        raise ValueError(
            "position_ids must rise by 1 in each row of a batch (documents packed behind one another need batch size "
            f"1), got {list(position_ids.shape)}; put all documents in one row, or give an attention_mask"
        )
    edges = starts[0].nonzero().flatten() + 1
    return torch.cat([edges.new_zeros(1), edges, edges.new_tensor([position_ids.shape[1]])])


class JetNemotronPreTrainedModel(PreTrainedModel):
    """Loading, saving and starting values of the models below."""

    config_class = JetNemotronConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _is_stateful = True  # no assisted generation: a recurrent state cannot take tokens back
    _no_split_modules = ("JetNemotronDecoderLayer",)
    _skip_keys_device_placement = ("past_key_values", "shared")
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    _can_record_outputs = {  # noqa: RUF012 - Transformers reads a plain dictionary
        "hidden_states": JetNemotronDecoderLayer,
        "attentions": JetNemotronAttention,
    }

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """The model of a folder or hub id, as in Transformers, except that every tensor must be there and fit.

        Raises ValueError that names tensors which are missing, not expected or of another shape, where Transformers
        would draw, drop or warn, and if `ignore_mismatched_sizes` is asked for.
        """
        if kwargs.pop("ignore_mismatched_sizes", False):
            raise ValueError(
                "ignore_mismatched_sizes must be False, got True: the tensors that do not fit would be drawn at random; "
                "build the model with from_config and load the tensors that you mean with load_state_dict"
            )
        with_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, *model_args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        wrong = {
            "missing": sorted(info["missing_keys"]),
            "not expected": sorted(info["unexpected_keys"]),
            "of another shape": [
                f"{name} {list(found)} for {list(wanted)}" for name, found, wanted in sorted(info["mismatched_keys"])
            ],
        }
        if any(wrong.values()):
            listed = "; ".join(f"{what}: {', '.join(names)}" for what, names in wrong.items() if names)
            raise ValueError(
                f"every tensor of {pretrained_model_name_or_path} must fit its config.json, got tensors {listed}; "
                "correct config.json (layer_types, efficient_attention_config, widths) or fetch the weights again"
            )
        head = model.get_output_embeddings()
        if (
            head is not None
            and model.config.tie_word_embeddings
            and head.weight is not model.get_input_embeddings().weight
        ):
            raise ValueError(
                f"lm_head.weight of {pretrained_model_name_or_path} must equal the embeddings, because config.json ties "
                "the two, got another one; set tie_word_embeddings to false in config.json, or remove the tensor"
            )
        return (model, info) if with_info else model

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **kwargs):
        """Recompute each layer in the backward pass, or stop doing so; every public switch ends here.

        Raises ValueError for `use_reentrant=True`, which would lose the gradient of what a layer hands to later ones
        beside its output (RWKV7's first value).
        """
        if enable and getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "use_reentrant must be False, got True: values that layers share would have no gradient; leave it out"
            )
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **kwargs)


class JetNemotronModel(JetNemotronPreTrainedModel):
    """The decoder without head."""

    _keys_to_ignore_on_load_unexpected = (r"^lm_head\.",)  # the head of an untied checkpoint is no part of this model

    def __init__(self, config: JetNemotronConfig):
        super().__init__(config)
        config.check()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList(JetNemotronDecoderLayer(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: JetNemotronCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Hidden states [B,T,D] after the last norm, and the cache.

        `attention_mask` [B, past + T] is 0 at padding; `generate` may hand over the result of `create_masks`.
        `position_ids` [B or 1, T] count tokens, padding left out, and are computed where absent. Positions that start
        afresh in a row, without mask and cache, mark packed documents: no token then sees another document, and no
        cache is returned. `cu_seq_lens_q` [N+1], the ends of N documents in the row, says the same.
        Raises ValueError for both or neither of input_ids and inputs_embeds, for a cache of another class or of another
        architecture, and for a mask or positions of another shape.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give one of input_ids and inputs_embeds, got both or neither; leave the other one None")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        T = x.shape[1]

        if position_ids is None and kwargs.get("cu_seq_lens_q") is not None:
            begins = kwargs["cu_seq_lens_q"][:-1].long()
            position_ids = torch.arange(T, device=x.device)[None]
            position_ids = position_ids - begins.repeat_interleave(kwargs["cu_seq_lens_q"].diff().long())
        if position_ids is not None and (position_ids.ndim != 2 or position_ids.shape[1] != T):
            raise ValueError(
                f"position_ids must be [B or 1, T] with T = {T} new tokens, got {list(position_ids.shape)}; leave them out"
            )
        cu_seqlens = None
        if position_ids is not None and attention_mask is None and past_key_values is None:
            cu_seqlens = packed_documents(position_ids)
        if past_key_values is None and use_cache and cu_seqlens is None:
            past_key_values = JetNemotronCache(self.config)
        if past_key_values is not None and not isinstance(past_key_values, JetNemotronCache):
            raise ValueError(
                f"past_key_values must be a JetNemotronCache, got a {type(past_key_values).__name__}; pass "
                "JetNemotronCache(model.config), or None to have one made"
            )
        if past_key_values is not None and past_key_values.layer_kinds != self.config.layer_kinds:
            raise ValueError(
                "past_key_values must be made for this model's layer_kinds, "
                f"{self.config.layer_kinds}, got a cache for {past_key_values.layer_kinds}; pass JetNemotronCache(model.config)"
            )
        past = 0 if past_key_values is None else past_key_values.get_seq_length()
        padded = isinstance(attention_mask, Tensor) and attention_mask.ndim == 2
        if isinstance(attention_mask, Tensor) and (attention_mask.ndim < 2 or attention_mask.shape[0] != len(x)):
            raise ValueError(
                f"attention_mask must be [B, past + T] with B = {len(x)} rows, got {list(attention_mask.shape)}; "
                "give each row a mask of its own"
            )
        if padded and isinstance(past, int) and attention_mask.shape[1] != past + T:
            raise ValueError(
                f"attention_mask must have a column for each of {past} tokens in the cache and {T} new ones, got "
                f"{list(attention_mask.shape)}; append the mask of the new tokens to that of the earlier ones"
            )
        if position_ids is None:
            if padded:
                position_ids = (attention_mask.long().cumsum(-1) - 1).clamp_min(0)[:, -T:]
            else:
                position_ids = (torch.arange(T, device=x.device) + past)[None]

        masks = attention_mask
        if not isinstance(masks, dict):
            masks = create_masks(self.config, x, attention_mask, past_key_values, position_ids)
        position_embeddings = None
        if not set(ATTENTION_KINDS).isdisjoint(self.config.layer_kinds):
            position_embeddings = rotary_tables(self.config, x, position_ids)
        position_ids = position_ids.expand(len(x), -1)
        shared = {"overwrite_state": getattr(past_key_values, "overwrites_states", False)}
        for layer in self.layers:
            x = layer(
                x,
                masks=masks,
                position_ids=position_ids,
                position_embeddings=position_embeddings,
                past_key_values=past_key_values,
                cu_seqlens=cu_seqlens,
                shared=shared,
                **kwargs,
            )
        return BaseModelOutputWithPast(
            last_hidden_state=self.norm(x), past_key_values=past_key_values if use_cache else None
        )


class JetNemotronForCausalLM(JetNemotronPreTrainedModel, GenerationMixin):
    """The language model: logits over the vocabulary, tied to the embeddings in the released checkpoints."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012 - read as a dictionary

    def __init__(self, config: JetNemotronConfig):
        super().__init__(config)
        self.model = JetNemotronModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | dict | None = None,
        position_ids: Tensor | None = None,
        past_key_values: JetNemotronCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast:
        """Logits [B, T, vocabulary] of all tokens, of the last `logits_to_keep` or of those with these indices.

        With `labels` [B,T] (−100: not scored) also the mean cross-entropy of each next token; the shift is done here.
        Otherwise as `JetNemotronModel`.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @staticmethod
    def create_masks_for_generate(
        config, inputs_embeds, attention_mask, past_key_values, position_ids=None, **_
    ) -> dict[str, Tensor | None]:
        """`create_masks`, which `generate` calls outside the graph that it compiles for a static cache."""
        return create_masks(config, inputs_embeds, attention_mask, past_key_values, position_ids)

    def _prepare_cache_for_generation(self, generation_config, model_kwargs, mode, batch_size, max_cache_length):
        """The cache that `generate` starts with: `JetNemotronCache`, static if `cache_implementation="static"`.

        Raises ValueError for other implementations, which hold keys and values only.
        """
        if model_kwargs.get("past_key_values") is not None or generation_config.use_cache is False:
            return super()._prepare_cache_for_generation(
                generation_config, model_kwargs, mode, batch_size, max_cache_length
            )
        wanted = generation_config.cache_implementation
        if wanted not in (None, "dynamic", "static"):
            raise ValueError(
                f"cache_implementation must be 'dynamic' or 'static', got {wanted!r}; recurrent states are small and "
                "stay as they are on the device"
            )
        if wanted == "static":
            max_cache_length = max(max_cache_length, getattr(generation_config, "max_cache_len", None) or 0)
        else:
            max_cache_length = None
        model_kwargs["past_key_values"] = JetNemotronCache(self.config, max_cache_length)
