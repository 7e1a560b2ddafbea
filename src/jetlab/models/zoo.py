"""Published model shapes by name, their parameter counts in closed form, and the ones Transformers can build.

The shapes are data: paper/model_shapes.json, in the words of Hugging Face configurations, each with its source and with
the keys that no source confirms. Here they are translated once into the words of the study.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from contextlib import nullcontext

import torch

from jetlab import paths

SHAPES_FILE = "paper/model_shapes.json"
ATTENTION_KINDS = ("attention", "sliding_attention")
PATTERN_KINDS = {"M": "mamba2", "-": "mlp", "*": "attention"}  # letters of the Nemotron-H layer string
BUILDABLE = ("jet_nemotron", "nemotron_h", "qwen2", "qwen3", "llama", "gemma3", "mamba2")


@dataclasses.dataclass(frozen=True)
class LinearDims:
    """Dimensions of one linear-attention block: n_heads heads with a state of head_dim × head_dim_v each.

    For Mamba2 head_dim is the state size N and head_dim_v the head width P, so that every kind holds
    n_heads · head_dim · head_dim_v state elements.
    """

    n_heads: int
    head_dim: int
    head_dim_v: int
    conv_size: int = 4
    generator_dim: int = 0  # JetBlock: hidden width R of the kernel generator
    n_groups: int = 1  # Mamba2: heads of a group share keys and queries
    ranks: tuple[tuple[str, int], ...] = ()  # RWKV7: widths of the low-rank maps w, a, v, g

    @property
    def state_elements(self) -> int:
        """Numbers in the recurrent state of one sequence."""
        return self.n_heads * self.head_dim * self.head_dim_v


@dataclasses.dataclass(frozen=True)
class Shape:
    """One model. layer_kinds has one entry a layer; the kind "mlp" is a layer that holds an MLP and no mixer."""

    name: str
    family: str
    d_model: int
    n_layers: int
    n_heads: int  # query heads; 0 where no layer has attention
    n_kv_heads: int
    head_dim: int
    d_ff: int  # 0: no MLP
    vocab_size: int
    tied: bool
    layer_kinds: tuple[str, ...]
    window: int | None = None  # tokens that a sliding layer sees, the current one included
    linear: LinearDims | None = None
    attention_bias: bool = False  # biases on the projections of q, k and v
    qk_norm: bool = False
    gated_mlp: bool = True  # three matrices a MLP, else two
    norms_per_layer: int = 2

    def count(self, kind: str) -> int:
        """Layers of one kind."""
        return self.layer_kinds.count(kind)

    @property
    def n_linear(self) -> int:
        """Layers with a recurrent state instead of a cache."""
        return sum(kind not in (*ATTENTION_KINDS, "mlp") for kind in self.layer_kinds)


@functools.cache
def _entries() -> dict[str, dict]:
    path = paths.resolve(SHAPES_FILE)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"the published shapes must be at {SHAPES_FILE}; restore the file from git") from None


def names() -> tuple[str, ...]:
    """Names of all shapes, sorted."""
    return tuple(sorted(_entries(), key=str.lower))


def entry(name: str) -> Mapping:
    """The entry of paper/model_shapes.json as it stands. Raises KeyError for an unknown name."""
    if name not in _entries():
        raise KeyError(f"no published shape named {name!r}; known: {', '.join(names())}")
    return _entries()[name]


def layer_kinds(pattern: str, n_layers: int | None = None) -> tuple[str, ...]:
    """The kind of each layer of a string like "M-M*-": mamba2, mlp or attention.

    Raises ValueError for an empty string, another letter, or a length that is not `n_layers`.
    """
    unknown = sorted(set(pattern) - set(PATTERN_KINDS))
    if unknown or not pattern:
        letters = ", ".join(f"{letter} ({kind})" for letter, kind in PATTERN_KINDS.items())
        raise ValueError(
            f"a layer string is made of {letters}, got {pattern!r}"
            + (f" with {' '.join(unknown)}; write each layer as one of these" if unknown else "; name a layer")
        )
    if n_layers is not None and len(pattern) != n_layers:
        raise ValueError(
            f"a layer string has one letter a layer, {n_layers} here, got {len(pattern)}: {pattern!r}; "
            f"{'add' if len(pattern) < n_layers else 'take out'} {abs(n_layers - len(pattern))}, or change the depth"
        )
    return tuple(PATTERN_KINDS[letter] for letter in pattern)


def require_groups(n_heads: int, n_groups: int) -> None:
    """Raises ValueError unless the heads of a Mamba2 layer fill its groups evenly: a group shares keys and queries."""
    if n_heads < 1 or n_heads % n_groups:
        near = max(n_groups, n_heads // n_groups * n_groups)
        raise ValueError(
            f"Mamba heads must be a multiple of the {n_groups} groups that share keys and queries, got {n_heads}; try {near}"
        )


def _layer_kinds(layers: Mapping, n_layers: int) -> tuple[str, ...]:
    if "pattern" in layers:
        return layer_kinds(layers["pattern"], n_layers)
    kinds = [layers.get("default", "attention")] * n_layers
    for kind in ATTENTION_KINDS:
        for layer in layers.get(kind, ()):
            kinds[layer] = kind
    return tuple(kinds)


@functools.cache
def shape(name: str) -> Shape:
    """The shape of a published model, in the words of the study. Raises KeyError for an unknown name."""
    raw = entry(name)
    linear = dict(raw["linear"]) if "linear" in raw else None
    if linear and "ranks" in linear:
        linear["ranks"] = tuple(sorted(linear["ranks"].items()))
    return Shape(
        name=name,
        family=raw["family"],
        d_model=raw["hidden_size"],
        n_layers=raw["num_hidden_layers"],
        n_heads=raw["num_attention_heads"],
        n_kv_heads=raw["num_key_value_heads"],
        head_dim=raw["head_dim"],
        d_ff=raw["intermediate_size"],
        vocab_size=raw["vocab_size"],
        tied=raw["tie_word_embeddings"],
        layer_kinds=_layer_kinds(raw.get("layers", {}), raw["num_hidden_layers"]),
        window=raw.get("sliding_window"),
        linear=LinearDims(**linear) if linear else None,
        attention_bias=raw.get("attention_bias", False),
        qk_norm=raw.get("qk_norm", False),
        gated_mlp=raw.get("mlp", "gated") == "gated",
        norms_per_layer=raw.get("norms_per_layer", 2),
    )


def _attention_params(s: Shape) -> int:
    q, kv = s.n_heads * s.head_dim, s.n_kv_heads * s.head_dim
    bias = q + 2 * kv if s.attention_bias else 0
    norms = 2 * s.head_dim if s.qk_norm else 0
    return 2 * s.d_model * q + 2 * s.d_model * kv + bias + norms


def _linear_params(s: Shape, kind: str) -> int:
    """Parameters of the blocks with projections of q, k, v and o; R units in the JetBlock's kernel generator.

    RetNet D(2Kd+3Vd) + V · GLA the same + 16(D+Kd) + Kd · DeltaNet D(2Kd+2Vd) + DH + V + W(2Kd+Vd)
    Gated DeltaNet D(2Kd+3Vd) + 2DH + 2H + V + W(2Kd+Vd) · JetBlock R·D + W·Vd·(R+1) in place of its last term
    """
    dims, D = s.linear, s.d_model
    H, W, V, R = dims.n_heads, dims.conv_size, dims.head_dim_v, dims.generator_dim
    Kd, Vd = H * dims.head_dim, H * V
    gated = D * (2 * Kd + 3 * Vd) + V
    return {
        "retnet": gated,
        "gla": gated + 16 * (D + Kd) + Kd,
        "deltanet": gated - D * Vd + D * H + W * (2 * Kd + Vd),
        "gated_deltanet": gated + 2 * D * H + 2 * H + W * (2 * Kd + Vd),
        "jetblock": gated + 2 * D * H + 2 * H + R * D + W * Vd * (R + 1),
    }[kind]


def _mamba2_params(s: Shape) -> int:
    """D(2I+2GN+H) + (W+1)(I+2GN) + 3H + I + I·D with I = H·P; the convolution has a bias."""
    dims, D = s.linear, s.d_model
    H, W = dims.n_heads, dims.conv_size
    inner, shared = H * dims.head_dim_v, 2 * dims.n_groups * dims.head_dim
    return D * (2 * inner + shared + H) + (W + 1) * (inner + shared) + 3 * H + inner + inner * D


def _rwkv7_params(s: Shape, first: bool) -> int:
    """Time mix 4D² + 11D + Σ_{w,a,v}(2Dr + D) + 2D·r_g; the first layer has no map for v."""
    D, ranks = s.d_model, dict(s.linear.ranks)
    maps = ("w", "a") if first else ("w", "a", "v")
    return 4 * D * D + 11 * D + sum(2 * D * ranks[m] + D for m in maps) + 2 * D * ranks["g"]


def mixer_params(s: Shape, layer: int) -> int:
    """Parameters of the token mixer of one layer; 0 for a layer that is only an MLP."""
    kind = s.layer_kinds[layer]
    if kind in ATTENTION_KINDS:
        return _attention_params(s)
    if kind in ("retnet", "gla", "deltanet", "gated_deltanet", "jetblock"):
        return _linear_params(s, kind)
    if kind == "mamba2":
        return _mamba2_params(s)
    if kind == "rwkv7":
        return _rwkv7_params(s, first=layer == s.layer_kinds.index("rwkv7"))
    if kind == "mlp":
        return 0
    raise ValueError(
        f"no closed form for a layer of kind {kind!r} in {s.name}; see zoo.mixer_params for those that have one"
    )


def mlp_params(s: Shape) -> int:
    """Parameters of one MLP: 3·D·F gated (SwiGLU), 2·D·F plain."""
    return (3 if s.gated_mlp else 2) * s.d_model * s.d_ff


def n_params(s: Shape) -> int:
    """Parameters of the model; a tied embedding counts once.

    V·D embeddings (twice when untied) + Σ_layers mixer + MLPs + norms. Equals the tensors that Transformers builds for
    the families in BUILDABLE, and the released checkpoints of Jet-Nemotron.
    Raises ValueError for Gemma3n, whose per-layer embeddings and parallel residual streams have no formula here.
    """
    if s.family == "gemma3n":
        raise ValueError(f"no closed form for the parameters of {s.name} (per-layer embeddings); its cache has one")
    D = s.d_model
    mixers = sum(mixer_params(s, layer) for layer in range(s.n_layers))
    n_mlps = s.count("mlp") if "mlp" in s.layer_kinds else s.n_layers
    norms = (s.n_layers * s.norms_per_layer + 1) * D
    if s.family == "rwkv7":  # LayerNorms with bias, one more behind the embedding, one mixing vector a channel mix
        norms = 2 * (s.n_layers * s.norms_per_layer + 2) * D + s.n_layers * D
    embeddings = s.vocab_size * D * (1 if s.tied else 2)
    return embeddings + mixers + n_mlps * mlp_params(s) + norms


def with_linear(s: Shape, kind: str, dims: LinearDims, *, name: str | None = None) -> Shape:
    """The same model with another linear block: every recurrent layer becomes `kind` with `dims`."""
    kinds = tuple(k if k in (*ATTENTION_KINDS, "mlp") else kind for k in s.layer_kinds)
    return dataclasses.replace(s, name=name or f"{s.name} with {kind}", layer_kinds=kinds, linear=dims)


def _rope(raw: Mapping) -> dict:
    parameters = {"rope_type": "default", "rope_theta": raw["rope_theta"]}
    if "rope_scaling" in raw:
        scaling = dict(raw["rope_scaling"])
        parameters |= {"rope_type": scaling.pop("type"), **scaling}
    return parameters


def _jet_nemotron_config(s: Shape, raw: Mapping, common: Mapping):
    from jetlab.hf import JetNemotronConfig

    dims = s.linear
    block = {"num_heads": dims.n_heads, "head_dim": dims.head_dim, "expand_v": dims.head_dim_v / dims.head_dim}
    block |= {"norm_eps": 1e-5, "conv_size": dims.conv_size}
    block |= {"dconv_generator_reduction": dims.n_heads * dims.head_dim_v // dims.generator_dim}
    return JetNemotronConfig(
        **common,
        rope_theta=raw["rope_theta"],
        attention_bias=s.attention_bias,
        layer_kinds=list(s.layer_kinds),
        efficient_attention_config={"sliding_attention": {"window_size": s.window}, "jetblock": block},
    )


def hf_config(name: str, s: Shape | None = None):
    """The Transformers configuration of a published shape, or of `s`, which was derived from it.

    Raises ValueError if its family is not in BUILDABLE.
    """
    import transformers

    raw, s = entry(name), s or shape(name)
    if s.family not in BUILDABLE:
        raise ValueError(
            f"{name} is of the family {s.family}, which Transformers cannot build here; its closed forms work "
            f"(zoo.shape, zoo.n_params, jetlab.inference.roofline). Buildable families: {', '.join(BUILDABLE)}"
        )
    common = {
        "vocab_size": s.vocab_size,
        "hidden_size": s.d_model,
        "num_hidden_layers": s.n_layers,
        "tie_word_embeddings": s.tied,
    }
    if s.family == "nemotron_h":
        from jetlab.models import nemotron  # which counts by the shapes of this module

        return nemotron.config_of(
            s, norm_eps=raw["rms_norm_eps"], max_position_embeddings=raw["max_position_embeddings"]
        )
    if s.family == "mamba2":
        dims = s.linear
        return transformers.Mamba2Config(
            **common,
            num_heads=dims.n_heads,
            head_dim=dims.head_dim_v,
            state_size=dims.head_dim,
            n_groups=dims.n_groups,
            conv_kernel=dims.conv_size,
            expand=dims.n_heads * dims.head_dim_v // s.d_model,
            layer_norm_epsilon=raw["rms_norm_eps"],
            residual_in_fp32=True,
        )
    common |= {
        "num_attention_heads": s.n_heads,
        "num_key_value_heads": s.n_kv_heads,
        "head_dim": s.head_dim,
        "intermediate_size": s.d_ff,
        "rms_norm_eps": raw["rms_norm_eps"],
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
    }
    if s.family == "jet_nemotron":
        return _jet_nemotron_config(s, raw, common)
    if s.family == "gemma3":
        local = {"rope_type": "default", "rope_theta": raw["rope_local_base_freq"]}
        kinds = {"attention": "full_attention", "sliding_attention": "sliding_attention"}
        return transformers.Gemma3TextConfig(
            **common,
            sliding_window=s.window,
            layer_types=[kinds[kind] for kind in s.layer_kinds],
            rope_parameters={"full_attention": _rope(raw), "sliding_attention": local},
        )
    classes = {"qwen2": "Qwen2Config", "qwen3": "Qwen3Config", "llama": "LlamaConfig"}
    if "rope_theta" in raw:
        common["rope_parameters"] = _rope(raw)
    return getattr(transformers, classes[s.family])(**common)


def build(
    name: str,
    device: str = "meta",
    dtype: torch.dtype = torch.bfloat16,
    random: bool = True,
    derived: Shape | None = None,
) -> torch.nn.Module:
    """The published shape, or one `derived` from it, as a Transformers model in evaluation mode.

    On "meta" no memory is taken: for counting. On another device the weights have the random start of their model: for
    speed, which does not depend on values. With `random=False` they are allocated and hold anything: for a checkpoint
    to be loaded into. Raises ValueError for a family that Transformers cannot build.
    """
    import transformers
    from transformers.initialization import no_init_weights

    config = hf_config(name, derived)
    with torch.device(device), nullcontext() if random else no_init_weights():
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.tie_weights()  # which without a random start has not happened
    return model.eval()
