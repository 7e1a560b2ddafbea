"""Two roads to a fast hybrid on one measuring stick: Jet-Nemotron converts a transformer, Nemotron Nano 2 prunes a hybrid.

Both start from a model that masters the study's tasks. What they arrive at is compared at equal bytes: those that a budget
of memory counts, and those that one decoded token moves.
"""

import dataclasses
from collections.abc import Mapping

from transformers import PreTrainedConfig

from jetlab.compress.budget import Budget, bytes_per_token, needed
from jetlab.models.zoo import LinearDims, Shape, n_params


def transformer_shape(config: PreTrainedConfig, name: str = "transformer") -> Shape:
    """The shape of the study's teacher. Raises ValueError for another family than Qwen2."""
    if config.model_type != "qwen2":
        raise ValueError(f"the study's teachers are Qwen2, got a model of type {config.model_type}; give such a folder")
    return Shape(
        name=name,
        family="qwen2",
        d_model=config.hidden_size,
        n_layers=config.num_hidden_layers,
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        d_ff=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied=config.tie_word_embeddings,
        layer_kinds=("attention",) * config.num_hidden_layers,
        attention_bias=True,
    )


def hybrid_shape(transformer: Shape, choice: Mapping, name: str = "hybrid") -> Shape:
    """What stage distill made of it; `choice` is that stage's choice.json: `layer_kinds` and the `dims` of its block."""
    dims = choice["dims"]
    values = dims["n_heads"] * dims["head_dim_v"]
    linear = LinearDims(**dims, generator_dim=values // 8)  # the published share, of JetBlocks; others have none
    return dataclasses.replace(transformer, name=name, layer_kinds=tuple(choice["layer_kinds"]), linear=linear)


def sizes(shape: Shape, budget: Budget) -> dict:
    """Parameters, and in bytes what the model takes at the budget's context and batch and what a decoded token moves.

    The columns that short convolutions carry are counted in Mamba2 layers alone: in a JetBlock of ours they are 0.1 %.
    """
    found = needed(shape, budget)
    return {
        "model": shape.name,
        "n_params": n_params(shape),
        "weight_bytes": found.weights,
        "kv_bytes": found.kv_cache,
        "state_bytes": found.states + found.conv,
        "bytes": found.total,
        "bytes_per_token": bytes_per_token(shape, budget),
    }
