"""The layout of the released Jet-Nemotron folders, and a check of a folder against it.

What is here is told by the published files alone: the keys of jetlm_2B.json and jetlm_4B.json (github.com/NVlabs/Jet-Nemotron),
the parameter names of the checkpoints, and what a server reads of them (SGLang's jet_nemotron.py builds the JetBlock from
exactly the eight keys of its section). Nothing is asked of our own modules, so that the check can find them wrong.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

ARCHITECTURE, MODEL_TYPE = "JetNemotronForCausalLM", "jet_nemotron"
WHOLE, NUMBER, TEXT = (int,), (int, float), (str,)
CONFIG_KEYS: dict[str, tuple[type, ...]] = {
    "architectures": (list,),
    "attention_dropout": NUMBER,
    "bos_token_id": (int, type(None)),
    "efficient_attention_config": (dict,),
    "eos_token_id": (int, list),
    "hidden_act": TEXT,
    "hidden_size": WHOLE,
    "initializer_range": NUMBER,
    "intermediate_size": WHOLE,
    "layer_types": (list,),
    "max_position_embeddings": WHOLE,
    "max_window_layers": WHOLE,
    "model_type": TEXT,
    "num_attention_heads": WHOLE,
    "num_hidden_layers": WHOLE,
    "num_key_value_heads": WHOLE,
    "rms_norm_eps": NUMBER,
    "rope_scaling": (type(None),),
    "rope_theta": NUMBER,
    "tie_word_embeddings": (bool,),
    "torch_dtype": TEXT,
    "transformers_version": TEXT,
    "use_cache": (bool,),
    "use_mrope": (bool,),
    "vocab_size": WHOLE,
}
MAY_STAND: dict[str, tuple[type, ...]] = {"auto_map": (dict,), "pad_token_id": WHOLE}
SECTION_KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "jet": {
        "conv_size": WHOLE,
        "dconv_generator_reduction": WHOLE,
        "dconv_implementation": TEXT,
        "expand_v": NUMBER,
        "head_dim": WHOLE,
        "mode": TEXT,
        "norm_eps": TEXT,
        "num_heads": WHOLE,
    },
    "swa": {"window_size": WHOLE},
}
KINDS = ("jet", "attn", "swa")
FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")
_EXPORT = "write the folder with export.save"


def expected_tensors(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that the weights of a config.json hold.

    With Kd = num_heads · head_dim, Vd = num_heads · ⌊head_dim · expand_v⌋ and R = Vd // dconv_generator_reduction a JetBlock
    has q, k [Kd, D] · v, g [Vd, D] · a, b [num_heads, D] · o [D, Vd] and a kernel generator of w1 [R, D], w2 [Vd · taps, R].
    A head is D / num_attention_heads wide; biases stand on q, k and v of attention and on w2 alone.
    Raises ValueError for a kind of layer that the released models do not have.
    """
    unknown = sorted(set(config["layer_types"]) - set(KINDS))
    if unknown:
        raise ValueError(
            f"layer_types must be of {', '.join(KINDS)}, whose tensors are published, got {', '.join(unknown)}; "
            "see surgery.save for a layout of any kind"
        )
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,)}
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (V, D)
    every = {
        "input_layernorm.weight": (D,),
        "post_attention_layernorm.weight": (D,),
        "mlp.gate_proj.weight": (F, D),
        "mlp.up_proj.weight": (F, D),
        "mlp.down_proj.weight": (D, F),
    }
    for layer, kind in enumerate(config["layer_types"]):
        mixer = _jet(config) if kind == "jet" else _attention(config)
        of_layer = every | {f"self_attn.{name}": shape for name, shape in mixer.items()}
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in of_layer.items()}
    return shapes


def _attention(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    D = config["hidden_size"]
    width = D // config["num_attention_heads"]
    q, kv = config["num_attention_heads"] * width, config["num_key_value_heads"] * width
    shapes = {"o_proj.weight": (D, q)}
    for name, rows in (("q", q), ("k", kv), ("v", kv)):
        shapes |= {f"{name}_proj.weight": (rows, D), f"{name}_proj.bias": (rows,)}
    return shapes


def _jet(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    D, section = config["hidden_size"], config["efficient_attention_config"]["jet"]
    H, K = section["num_heads"], section["head_dim"]
    head_v = int(K * section["expand_v"])  # cut, as the released code does
    key, value = H * K, H * head_v
    units = value // section["dconv_generator_reduction"]
    rows = {"q": key, "k": key, "v": value, "g": value, "a": H, "b": H}
    generator = "dynamic_conv1d.kernel_generator"
    return {f"{name}_proj.weight": (n, D) for name, n in rows.items()} | {
        "o_proj.weight": (D, value),
        "o_norm.weight": (head_v,),
        "A_log": (H,),
        "dt_bias": (H,),
        f"{generator}.w1.weight": (units, D),
        f"{generator}.w2.weight": (value * section["conv_size"], units),
        f"{generator}.w2.bias": (value * section["conv_size"],),
    }


def check_folder(folder: str | Path) -> list[str]:
    """What a folder has otherwise than a released one: missing or further files, config keys and tensors, each in a sentence.

    An empty list means that whatever loads the released folders finds here what it looks for. Of weights the headers are
    read alone.
    """
    folder = Path(folder)
    found = [
        f"the folder must have {name}, got none in {folder}; {_EXPORT}"
        for name in FILES
        if not (folder / name).is_file()
    ]
    config = _read(folder / "config.json", found)
    if config is not None:
        wrong = _config_differences(config, folder)
        found += wrong
        unknown = _unknown_layers(config)
        if unknown:
            found.append(
                f"layer_types must be of {', '.join(KINDS)}, got {_listed(unknown)}; a server with Jet-Nemotron support does "
                "not know them, so load the folder with jetlab.hf; their tensors have no published names, none was compared"
            )
        elif wrong:
            found.append("tensors are compared once config.json has no difference, got some; correct those first")
        else:
            found += _tensor_differences(folder, expected_tensors(config))
        generation = _read(folder / "generation_config.json", found) or {}
        for key in ("bos_token_id", "eos_token_id"):
            if generation and generation.get(key) != config.get(key):
                found.append(
                    f"{key} of generation_config.json must be that of config.json, got {generation.get(key)!r} and "
                    f"{config.get(key)!r}; {_EXPORT}"
                )
    tokenizer = _read(folder / "tokenizer_config.json", found) or {}
    if tokenizer.get("tokenizer_class") == "TokenizersBackend":
        found.append(
            "tokenizer_class must be one that Transformers 4 knows, as servers have it, got 'TokenizersBackend'; write "
            "'PreTrainedTokenizerFast', which is the same"
        )
    return found


def _read(path: Path, found: list[str]) -> dict | None:
    """The JSON of a file; None if it is absent, or damaged, which goes to `found`."""
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        found.append(f"{path.name} must be JSON, got an error ({error}); restore the file")
        return None


def _config_differences(config: dict, folder: Path) -> list[str]:
    found = _key_differences("config.json", config, CONFIG_KEYS, MAY_STAND)
    for key, value in (("architectures", [ARCHITECTURE]), ("model_type", MODEL_TYPE)):
        if key in config and config[key] != value:
            found.append(f"{key} must be {value!r}, by which a server finds its code, got {config[key]!r}; {_EXPORT}")
    if found:
        return found  # what follows reads the keys
    for reader, place in config.get("auto_map", {}).items():
        file = f"{place.split('.')[0]}.py"
        if not (folder / file).is_file():
            found.append(
                f"auto_map must name files of the folder, got {file} for {reader}; remove auto_map, or put the file there"
            )
    kinds, n = config["layer_types"], config["num_hidden_layers"]
    if len(kinds) != n:
        found.append(f"layer_types must name a kind for each of {n} layers, got {len(kinds)}; change one of the two")
    if config["hidden_size"] % config["num_attention_heads"]:
        found.append(
            f"hidden_size must be a multiple of num_attention_heads, got {config['hidden_size']} and "
            f"{config['num_attention_heads']}; readers compute the width of a head from them"
        )
    sections = config["efficient_attention_config"]
    needed = {*kinds, "jet"} if set(kinds) <= set(KINDS) else set(kinds)  # servers size their states by "jet"
    for kind in sorted(SECTION_KEYS.keys() & needed):
        if kind not in sections:
            found.append(
                f"efficient_attention_config must have a section {kind!r}, got {sorted(sections)}; {_EXPORT}, and a model "
                "without JetBlock as a Qwen2"
            )
    for kind in sorted(sections.keys() & SECTION_KEYS.keys()):
        found += _key_differences(f"efficient_attention_config[{kind!r}]", sections[kind], SECTION_KEYS[kind])
    if not found and "jet" in sections:
        width = sections["jet"]["head_dim"] * sections["jet"]["expand_v"]
        if abs(int(width) - width) > 1e-3:
            found.append(
                f"head_dim · expand_v must be whole when the rest is cut off, got {width!r}; round expand_v up, as in "
                "2.6666666667"
            )
    return found


def _key_differences(
    where: str, given: dict, keys: Mapping[str, tuple[type, ...]], others: Mapping[str, tuple[type, ...]] | None = None
) -> list[str]:
    known = {**keys, **(others or {})}
    found = [f"{where} must have {key}, as the released one, got none; {_EXPORT}" for key in keys.keys() - given.keys()]
    for key in given.keys() - known.keys():
        way_out = "remove it"
        if key == "head_dim":
            way_out = (
                "readers take hidden_size / num_attention_heads: train from a decoder of such heads, or use jetlab.hf"
            )
        elif where != "config.json":
            way_out = "a server refuses a section with it: leave the option out, or load the folder with jetlab.hf"
        found.append(f"{where} must have the released keys alone, got {key} = {given[key]!r}; {way_out}")
    for key in given.keys() & known.keys():
        is_bool, value = isinstance(given[key], bool), given[key]
        if not isinstance(value, known[key]) or (is_bool and bool not in known[key]):
            names = " or ".join("null" if t is type(None) else t.__name__ for t in known[key])
            found.append(f"{key} of {where} must be {names}, got {value!r}; {_EXPORT}")
    return sorted(found)


def _unknown_layers(config: dict) -> dict[str, list[int]]:
    kinds = config.get("layer_types")
    kinds = kinds if isinstance(kinds, list) else []
    return {
        kind: [layer for layer, other in enumerate(kinds) if other == kind] for kind in sorted(set(kinds) - set(KINDS))
    }


def _listed(layers: dict[str, list[int]]) -> str:
    return "; ".join(f"{kind} in layers {', '.join(map(str, where))}" for kind, where in layers.items())


def _tensor_differences(folder: Path, expected: dict[str, tuple[int, ...]]) -> list[str]:
    try:
        shapes = _shapes(folder)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        return [f"the weights of {folder} must be readable, got {type(error).__name__}: {error}; write them again"]
    found = [
        f"the weights must have {name} {list(expected[name])}, got none; write them again"
        for name in sorted(expected.keys() - shapes.keys())
    ]
    found += [
        f"the weights must have published names alone, got {name} {list(shapes[name])}; remove it, or change config.json"
        for name in sorted(shapes.keys() - expected.keys())
    ]
    found += [
        f"{name} must be {list(expected[name])}, as config.json says, got {list(shapes[name])}; correct one of them"
        for name in sorted(expected.keys() & shapes.keys())
        if expected[name] != shapes[name]
    ]
    return found


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a file or of the shards that an index names.

    Raises ValueError where the index and a shard disagree.
    """
    index = folder / "model.safetensors.index.json"
    placed = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    shapes = {}
    for file in sorted(set(placed.values())) or ["model.safetensors"]:
        with safe_open(folder / file, framework="pt") as weights:
            names = set(weights.keys())
            shapes |= {name: tuple(weights.get_slice(name).get_shape()) for name in names}
        listed = {name for name, where in placed.items() if where == file}
        if placed and names != listed:
            raise ValueError(f"{index.name} and {file} disagree about {sorted(names ^ listed)[:4]}")
    return shapes
