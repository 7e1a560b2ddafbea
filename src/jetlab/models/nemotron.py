"""NemotronH of Transformers in the words of the study: its layer string, its shape, its configuration.

A layer holds one thing, a Mamba2 mixer, an MLP or full attention without positions (arXiv:2508.14444, Sec 2.1); the layer
string has a letter for each. Nothing here computes: the model is Transformers' NemotronHForCausalLM.
"""

from collections.abc import Sequence

from transformers import NemotronHConfig, PreTrainedConfig

from jetlab.models.zoo import PATTERN_KINDS, LinearDims, Shape, require_groups

HF_TYPES = {"mamba2": "linear_attention", "mlp": "mlp", "attention": "full_attention"}
MIXER_KINDS = ("mamba2", "attention")  # layers that mix tokens


def layer_string(kinds: Sequence[str]) -> str:
    """The string of these layers; `zoo.layer_kinds` reads it."""
    letters = {kind: letter for letter, kind in PATTERN_KINDS.items()}
    return "".join(letters[kind] for kind in kinds)


def _refuse_tied(tied: bool) -> None:
    if tied:
        raise ValueError(
            "a NemotronH of Transformers never ties its embeddings, got tie_word_embeddings=True; set it to False, or its "
            "parameters would be counted too low"
        )


def config_of(shape: Shape, *, norm_eps: float = 1e-5, **keys) -> NemotronHConfig:
    """The configuration of a shape; `keys` are further ones of Transformers (tokens, positions, chunk_size).

    Raises ValueError for Mamba heads that do not fill the groups, for an attention that its key-value heads do not divide, and
    for tied embeddings.
    """
    dims = shape.linear
    _refuse_tied(shape.tied)
    require_groups(dims.n_heads, dims.n_groups)
    if shape.n_heads % shape.n_kv_heads:
        raise ValueError(
            f"query heads must be a multiple of the {shape.n_kv_heads} key-value heads, got {shape.n_heads}; "
            f"try {shape.n_heads // shape.n_kv_heads * shape.n_kv_heads or shape.n_kv_heads}"
        )
    return NemotronHConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.d_model,
        layers_block_type=[HF_TYPES[kind] for kind in shape.layer_kinds],
        num_attention_heads=shape.n_heads,
        num_key_value_heads=shape.n_kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.d_ff,
        tie_word_embeddings=False,
        mamba_num_heads=dims.n_heads,
        mamba_head_dim=dims.head_dim_v,
        ssm_state_size=dims.head_dim,
        n_groups=dims.n_groups,
        conv_kernel=dims.conv_size,
        layer_norm_epsilon=norm_eps,
        **keys,
    )


def shape_of(config: PreTrainedConfig, name: str = "NemotronH") -> Shape:
    """The shape of a NemotronH. Raises ValueError for another model, for experts, and for what `Shape` cannot count."""
    if config.model_type != "nemotron_h":
        raise ValueError(f"a NemotronH is needed, got a model of type {config.model_type}; give a folder of that class")
    kinds = {hf: kind for kind, hf in HF_TYPES.items()}
    if unknown := sorted(set(config.layers_block_type) - set(kinds)):
        raise ValueError(
            f"layers must be of {', '.join(kinds)}, got {', '.join(unknown)}; Nemotron Nano 2 has no others"
        )
    _refuse_tied(config.tie_word_embeddings)
    biases = [
        key for key in ("attention_bias", "mlp_bias", "use_bias", "mamba_proj_bias") if getattr(config, key, False)
    ]
    if biases or not config.use_conv_bias:
        raise ValueError(
            f"only the convolutions of a Nemotron Nano 2 have a bias, got {', '.join(biases) or 'use_conv_bias=False'}"
        )
    return Shape(
        name=name,
        family="nemotron_h",
        d_model=config.hidden_size,
        n_layers=len(config.layers_block_type),
        n_heads=config.num_attention_heads,
        n_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        d_ff=config.intermediate_size,
        vocab_size=config.vocab_size,
        tied=False,
        layer_kinds=tuple(kinds[kind] for kind in config.layers_block_type),
        linear=LinearDims(
            n_heads=config.mamba_num_heads,
            head_dim=config.ssm_state_size,
            head_dim_v=config.mamba_head_dim,
            conv_size=config.conv_kernel,
            n_groups=config.n_groups,
        ),
        gated_mlp=False,
        norms_per_layer=1,
    )
