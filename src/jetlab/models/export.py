"""A hybrid as the product: a Jet-Nemotron folder, which AutoModelForCausalLM loads once `jetlab.hf` is imported.

The tensors of a hybrid that surgery made of a Qwen2 have the names of `JetNemotronForCausalLM`; what differs is the
config. Where the hybrid is made of what the released models have, the folder has their files and keys and no others
(`released.check_folder`), for servers that know Jet-Nemotron. `surgery.save` keeps hybrids of any decoder, in a layout of
its own.
"""

import json
import math
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from jetlab.hf.configuration_jet_nemotron import ATTENTION_KINDS, JetNemotronConfig
from jetlab.layers.dims import BlockDims
from jetlab.models import released, surgery
from jetlab.paths import require

_PATH = re.compile(r"self_attn\.paths\.[a-z0-9_]+\.(inner\.)?")
_PUBLISHED = {"conv_v": "dynamic", "conv_q": "none", "conv_k": "none", "value_branch": False}  # of the JetBlock
_FREE = ("generator_hidden", "random_start", "backend")  # its options that the layout can say, or that weights hold
_SHARED = (  # keys that Qwen2 and Jet-Nemotron name alike
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "attention_dropout",
    "tie_word_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def save(model: PreTrainedModel, folder: str | Path, tokenizer, *, dims: BlockDims | None, **options) -> None:
    """Write the hybrid as config.json, generation_config.json, model.safetensors and its tokeniser.

    `options` are those of its linear kind. A JetBlock as published, from a decoder whose heads are hidden_size /
    num_attention_heads wide, gets the released keys; another block, or another width, keys that jetlab.hf alone reads.
    Raises ValueError if the decoder is no Qwen2 with plain rotary positions, whose attention Jet-Nemotron has, if a layer has
    several paths, or if its windows differ.
    """
    if not isinstance(model, Qwen2ForCausalLM):
        raise ValueError(
            f"a Jet-Nemotron folder holds a hybrid of a Qwen2, got {type(model).__name__}; use surgery.save for others"
        )
    if any(len(slot.paths) > 1 for slot in surgery.slots(model)):
        raise ValueError(
            "a supernet holds several paths a layer; choose one architecture with surgery.prune, then save"
        )
    rope = model.config.rope_parameters
    if rope.get("rope_type", "default") != "default":
        raise ValueError(
            f"Jet-Nemotron has plain rotary positions, got rope_type {rope['rope_type']!r}; use surgery.save, which keeps it"
        )
    windows = [getattr(slot.paths[slot.active], "window", None) for slot in surgery.slots(model)]
    # A Qwen2 may come with windows of its own, which "attention" would not say.
    kinds = [
        kind if window is None else "sliding_attention"
        for kind, window in zip(surgery.kinds_of(model), windows, strict=True)
    ]
    linear = set(kinds) - set(ATTENTION_KINDS)
    sections = {} if dims is None else {kind: _section(model, kind, dims, options) for kind in linear}
    sizes = set(windows) - {None}
    if len(sizes) > 1:
        raise ValueError(
            f"a Jet-Nemotron folder holds one window for all layers, got {sorted(sizes)}; use surgery.save"
        )
    if sizes:
        sections["sliding_attention"] = {"window_size": sizes.pop()}
    config = JetNemotronConfig(
        **{key: getattr(model.config, key, None) for key in _SHARED},  # a published Qwen2 has no head_dim
        rope_theta=rope["rope_theta"],
        attention_bias=True,
        layer_kinds=kinds,
        efficient_attention_config=sections,
        architectures=[released.ARCHITECTURE],
        dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
        max_window_layers=len(kinds),  # this and the next mean nothing, but stand in the released files
        use_mrope=False,
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    implied = {
        "attention_bias": True,
        "head_dim": config.hidden_size // config.num_attention_heads,
        "pad_token_id": None,
    }
    _change(folder / "config.json", lambda keys: {k: x for k, x in keys.items() if k not in implied or x != implied[k]})
    GenerationConfig.from_model_config(config).save_pretrained(folder)
    weights = {_PATH.sub("self_attn.", name): x.contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    renamed = {"TokenizersBackend": "PreTrainedTokenizerFast"}  # the same class, by the name that Transformers 4 knows

    def known(keys: dict) -> dict:
        return keys | {"tokenizer_class": renamed.get(keys.get("tokenizer_class"), keys.get("tokenizer_class"))}

    _change(folder / "tokenizer_config.json", known)


def _change(path: Path, change: Callable[[dict], dict]) -> None:
    keys = change(json.loads(path.read_text(encoding="utf-8")))
    path.write_text(json.dumps(keys, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _section(model: PreTrainedModel, kind: str, dims: BlockDims, options: dict) -> dict:
    """The released section of a JetBlock as published, otherwise one that holds every option."""
    widths = {"num_heads": dims.n_heads, "head_dim": dims.head_dim, "conv_size": dims.conv_size}
    units = options.get("generator_hidden") or max(1, dims.value_dim // 8)
    reduction = 8 if dims.value_dim // 8 == units else max(1, dims.value_dim // units)
    published = all(name in _FREE or _PUBLISHED.get(name) == value for name, value in options.items())
    if kind != "jetblock" or not published or dims.value_dim // reduction != units:
        return widths | {"head_dim_v": dims.head_dim_v, "options": options}
    block = next(slot.paths[kind] for slot in surgery.slots(model) if slot.active == kind)
    return widths | {
        "mode": "chunk",
        "expand_v": math.ceil(dims.head_dim_v / dims.head_dim * 1e10) / 1e10,  # up: readers cut head_dim · expand_v
        "norm_eps": f"{block.o_norm.eps:g}",
        "dconv_generator_reduction": reduction,
        "dconv_implementation": "triton",
    }


def load(folder: str | Path, *, device: str | torch.device = "cpu") -> tuple[PreTrainedModel, object]:
    """The hybrid of a Jet-Nemotron folder with its slots, for scoring and measuring, and its tokeniser.

    Raises MissingInput for a folder that lacks a file, ValueError for tensors that do not fit its config.
    """
    folder = Path(folder)
    for name in ("config.json", "model.safetensors", "tokenizer.json"):
        require(folder / name, "distill")
    config = JetNemotronConfig.from_dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    linear = sorted(set(config.layer_kinds) - set(ATTENTION_KINDS))
    if len(linear) > 1 or not config.attention_bias:
        raise ValueError(
            f"{folder} must have one linear kind and biases on q, k, v, got {', '.join(linear)}; "
            "load it with AutoModelForCausalLM"
        )
    plain = Qwen2Config(
        **{key: getattr(config, key) for key in _SHARED},  # head_dim is computed where the file has none
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
    )
    model = Qwen2ForCausalLM(plain)
    dims = config.block_dims(linear[0]) if linear else None
    options = config.block_options(linear[0]) if linear else {}
    if config.sliding_window is not None:
        options["window"] = config.sliding_window
    surgery.convert(model, config.layer_kinds, dims, **options)
    saved = load_file(folder / "model.safetensors")
    mine = model.state_dict()
    names = {_PATH.sub("self_attn.", name): name for name in mine}
    if config.tie_word_embeddings:
        names.pop("lm_head.weight")
    missing, extra = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
    other = [name for name in sorted(set(names) & set(saved)) if saved[name].shape != mine[names[name]].shape]
    if missing or extra or other:
        raise ValueError(
            f"{folder}/model.safetensors does not fit its config: tensors missing {missing[:4]}, not expected {extra[:4]}, "
            f"of another shape {other[:4]}; run the stage that wrote it again"
        )
    model.load_state_dict({names[name]: x for name, x in saved.items()}, strict=False)
    model.tie_weights()
    return model.to(device).eval(), PreTrainedTokenizerFast.from_pretrained(folder)
