"""Configuration of Jet-Nemotron: the keys of the released config.json, in the words of the study once they are read.

The released files name the layers `layer_types: ["jet", "attn", "swa", …]`, an attribute that Transformers checks
against a list of its own. The attribute is therefore `layer_kinds`, with the kinds of `jetlab.layers.MIXERS`, and the
released words exist in the JSON alone: `__init__` reads them, `to_dict` and `save_pretrained` write them.
"""

import copy
import difflib
import math
from dataclasses import field
from typing import Any, Self

from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims

ATTENTION_KINDS = ("attention", "sliding_attention")
RELEASED_WORDS = {"jetblock": "jet", "attention": "attn", "sliding_attention": "swa"}  # other kinds keep their name
_KIND_OF = {word: kind for kind, word in RELEASED_WORDS.items()}


def _layer_kinds_2b() -> list[str]:
    kinds = ["jetblock"] * 28
    kinds[14] = kinds[19] = "attention"
    kinds[20] = kinds[21] = "sliding_attention"
    return kinds


def _sections_2b() -> dict[str, dict[str, Any]]:
    jetblock = {"num_heads": 12, "head_dim": 96, "expand_v": 8 / 3, "norm_eps": 1e-5, "conv_size": 4}
    return {"sliding_attention": {"window_size": 1152}, "jetblock": jetblock | {"dconv_generator_reduction": 8}}


class JetNemotronConfig(PreTrainedConfig):
    """Shape of a Jet-Nemotron model; the defaults are those of Jet-Nemotron-2B (the released config.json).

    layer_kinds                 kind of each layer, in order: keys of `jetlab.layers.MIXERS` and "sliding_attention"
    efficient_attention_config  one section for each kind that occurs, full attention apart:
        sliding_attention       {"window_size"}: keys that a token sees, itself included
        a linear kind           {"num_heads", "head_dim", and "head_dim_v" or "expand_v" = head_dim_v / head_dim}; with
                                "conv_size" (4), "norm_eps" (of the output norm), "options" (further keyword arguments of
                                the mixer) as wanted. The JetBlock also knows "dconv_generator_reduction" r: its kernel
                                generator has Vd // r units.
    attention_bias              biases on q, k and v of the attention layers
    rope_theta                  base of the plain rotary embedding of the attention layers; linear layers see no positions

    `layer_types` in place of `layer_kinds`, and sections under released words ("jet", "swa"), are read as well; so are
    numbers as strings ("1e-5"). Keys that mean nothing here are kept and written back, but for two: a `sliding_window`
    beside the section's, and `auto_map`, which names files that `save_pretrained` does not write.
    Raises ValueError if a kind is unknown or its section absent, if a number breaks a rule, if two keys contradict each
    other, or if positions are scaled.
    """

    model_type = "jet_nemotron"
    keys_to_ignore_at_inference = ("past_key_values",)
    attribute_map = {"torch_dtype": "dtype"}  # noqa: RUF012 - the released name, which Transformers warns about

    vocab_size: int = 151936
    hidden_size: int = 1536
    intermediate_size: int = 8960
    num_hidden_layers: int = 28
    num_attention_heads: int = 12
    num_key_value_heads: int | None = 2
    head_dim: int | None = None
    hidden_act: str = "silu"
    max_position_embeddings: int = 131072
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    tie_word_embeddings: bool = True
    rope_theta: float = 1e6
    attention_bias: bool = True
    attention_dropout: float = 0.0
    layer_kinds: list[str] = field(default_factory=_layer_kinds_2b)
    efficient_attention_config: dict[str, dict[str, Any]] = field(default_factory=_sections_2b)
    pad_token_id: int | None = None
    bos_token_id: int | None = 151643
    eos_token_id: int | list[int] | None = 151643

    def __post_init__(self, **kwargs):
        self.layer_kinds = [_KIND_OF.get(word, word) for word in kwargs.pop("layer_types", None) or self.layer_kinds]
        kwargs.pop("sliding_window", None)  # Qwen2's key, which many files carry along unused
        if taken := sorted(key for key in kwargs if callable(getattr(type(self), key, None))):
            raise ValueError(f"{taken[0]!r} must be no key of config.json, got {kwargs[taken[0]]!r}; remove it")
        for name in ("rope_theta", "rms_norm_eps"):
            setattr(self, name, _number(name, getattr(self, name)))
        sections = self.efficient_attention_config or {}
        self.efficient_attention_config = {_KIND_OF.get(key, key): copy.deepcopy(sections[key]) for key in sections}
        if len(self.efficient_attention_config) < len(sections):
            raise ValueError(
                f"efficient_attention_config must have one section for each kind, got {', '.join(sections)}, of which "
                "two name the same one (jet is jetblock, swa is sliding_attention); remove one of them"
            )
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            _positive("num_attention_heads", self.num_attention_heads, "give the attention layers at least one head")
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                    f"{self.num_attention_heads}; change one of them or give head_dim"
                )
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._read_rope(kwargs)
        super().__post_init__(**kwargs)
        self.check()

    def _read_rope(self, kwargs: dict[str, Any]) -> None:
        """`rope_scaling` of the released files (null) and `rope_parameters` of Transformers 5, which must not scale."""
        for key in ("rope_scaling", "rope_parameters"):
            parameters = kwargs.pop(key, None) or {}
            plain = isinstance(parameters, dict) and set(parameters) <= {"rope_type", "type", "rope_theta"}
            if not plain or parameters.get("rope_type", parameters.get("type", "default")) != "default":
                raise ValueError(
                    f"{key} must be null or of the type 'default', got {parameters}; this model has plain rotary "
                    "positions: remove the key and set rope_theta and max_position_embeddings"
                )
            self.rope_theta = _number(f"{key}['rope_theta']", parameters.get("rope_theta", self.rope_theta))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs) -> Self:
        """The configuration of a dictionary with `kwargs` in place of its entries.

        They are laid over the dictionary before it is read: Transformers sets them on what was read, where `layer_types`
        and `rope_scaling` are no attributes and would be dropped, and no rule would be asked again.
        """
        keys = {"layer_types", "rope_scaling", "rope_parameters", *cls.__dataclass_fields__}
        changed = {key: kwargs.pop(key) for key in list(kwargs) if key in keys and key not in ("dtype", "torch_dtype")}
        if "layer_kinds" in changed:
            config_dict = {key: value for key, value in config_dict.items() if key != "layer_types"}
        return super().from_dict(config_dict | changed, **kwargs)

    def check(self) -> None:
        """Raises ValueError where a value breaks a rule; called again by the model, for attributes that were set later."""
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
            _positive(name, getattr(self, name), "set the width or number that the checkpoint has")
        for name in ("num_attention_heads", "num_key_value_heads", "head_dim"):
            _positive(name, getattr(self, name), "give the attention layers at least one head of width 2")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads must be a multiple of num_key_value_heads, got {self.num_attention_heads} and "
                f"{self.num_key_value_heads}; num_key_value_heads={self.num_attention_heads} gives each head its own"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even, for the rotary halves, got {self.head_dim}; take the next one")
        for name in ("rope_theta", "rms_norm_eps"):
            _number(name, getattr(self, name))
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(
                f"attention_dropout must be 0 or more and below 1, got {self.attention_dropout}; 0 is none"
            )
        if self.hidden_act not in ACT2FN:
            raise ValueError(
                f"hidden_act must be known to Transformers, got {self.hidden_act!r}; the models have 'silu'"
            )
        if len(self.layer_kinds) != self.num_hidden_layers:
            raise ValueError(
                "layer_kinds (layer_types in JSON) must name one kind for each of the num_hidden_layers="
                f"{self.num_hidden_layers} layers, got {len(self.layer_kinds)}; change one of the two"
            )
        known = sorted({*MIXERS, *ATTENTION_KINDS})
        for layer, kind in enumerate(self.layer_kinds):
            if kind not in known:
                close = difflib.get_close_matches(str(kind), [*known, *_KIND_OF], n=1, cutoff=0.0)[0]
                raise ValueError(
                    f"layer_kinds[{layer}] must be one of {', '.join(known)} (in JSON also {', '.join(_KIND_OF)}), "
                    f"got {kind!r}; closest is {close!r}"
                )
        for kind in sorted(set(self.layer_kinds) - {"attention"}):
            if kind == "sliding_attention":
                _positive(
                    f"{_path(kind)}['window_size']",
                    self._entry(kind, "window_size"),
                    "1 sees the current token alone; use the kind 'attention' (in JSON 'attn') for an unlimited window",
                )
            else:
                self.block_dims(kind)
                self.block_options(kind)
                self.norm_eps(kind)

    @property
    def sliding_window(self) -> int | None:
        """Keys that a token of a sliding layer sees, itself included; None without sliding layers."""
        return self._entry("sliding_attention", "window_size") if "sliding_attention" in self.layer_kinds else None

    def block_dims(self, kind: str) -> BlockDims:
        """Dimensions of the layers of a linear kind. Raises ValueError if its section is absent or breaks a rule."""
        section = self._section(kind)
        n_heads, head_dim = self._entry(kind, "num_heads"), self._entry(kind, "head_dim")
        _positive(f"{_path(kind)}['head_dim']", head_dim, "give the width of a query and key head")
        head_dim_v = section.get("head_dim_v")
        if head_dim_v is None or section.get("expand_v") is not None:
            expand_v, given = self._entry(kind, "expand_v", "head_dim_v"), head_dim_v
            width = head_dim * _number(f"{_path(kind)}['expand_v']", expand_v)
            head_dim_v = round(width)
            if abs(width - head_dim_v) > 1e-3:  # the files write 8/3 with ten digits
                raise ValueError(
                    f"{_path(kind)}: head_dim · expand_v must be a whole number, got {head_dim} · {expand_v} = "
                    f"{width:.6g}; give head_dim_v={head_dim_v} in place of expand_v"
                )
            if given not in (None, head_dim_v):
                raise ValueError(
                    f"{_path(kind)}: head_dim_v must be head_dim · expand_v where both are given, got {given} and "
                    f"{head_dim_v}; remove one of them"
                )
        try:
            return BlockDims(self.hidden_size, n_heads, head_dim, head_dim_v, section.get("conv_size", 4))
        except ValueError as error:
            raise ValueError(f"{_path(kind)}: {error}") from None

    def block_options(self, kind: str) -> dict[str, Any]:
        """Keyword arguments of the mixer of a linear kind, beside its dimensions."""
        section = self._section(kind)
        options = dict(section.get("options") or {})
        if kind == "jetblock" and section.get("dconv_generator_reduction") is not None:
            reduction, value_dim = section["dconv_generator_reduction"], self.block_dims(kind).value_dim
            _positive(f"{_path(kind)}['dconv_generator_reduction']", reduction, "the released models have 8")
            if reduction > value_dim:
                raise ValueError(
                    f"{_path(kind)}['dconv_generator_reduction'] must not exceed num_heads · head_dim_v = {value_dim}, "
                    f"got {reduction}; the generator would have no units"
                )
            if options.setdefault("generator_hidden", value_dim // reduction) != value_dim // reduction:
                raise ValueError(
                    f"{_path(kind)}: options['generator_hidden'] must be {value_dim // reduction}, as "
                    f"dconv_generator_reduction says, got {options['generator_hidden']}; remove one of them"
                )
        return options

    def norm_eps(self, kind: str) -> float | None:
        """Epsilon of the output norm of a linear kind; None leaves the mixer's own."""
        eps = self._section(kind).get("norm_eps")
        return None if eps is None else _number(f"{_path(kind)}['norm_eps']", eps)

    def _section(self, kind: str) -> dict[str, Any]:
        section = self.efficient_attention_config.get(kind)
        if section is None:
            word = RELEASED_WORDS.get(kind, kind)
            raise ValueError(
                f"efficient_attention_config must have a section {word!r} because layer_kinds has {kind!r}, got the "
                f"sections {sorted(self.efficient_attention_config) or 'none'}; add one, as JetNemotronConfig describes"
            )
        return section

    def _entry(self, kind: str, *names: str) -> Any:
        section = self._section(kind)
        if section.get(names[0]) is None:
            raise ValueError(
                f"{_path(kind)} must have {' or '.join(map(repr, names))}, got {sorted(section)}; add it to the section"
            )
        return section[names[0]]

    def to_dict(self) -> dict[str, Any]:
        """Everything under the keys and words of the released config.json; what was read comes back as it was."""
        output = super().to_dict()
        output["layer_types"] = [RELEASED_WORDS.get(kind, kind) for kind in output.pop("layer_kinds")]
        sections = output["efficient_attention_config"]
        output["efficient_attention_config"] = {RELEASED_WORDS.get(kind, kind): x for kind, x in sections.items()}
        output["rope_scaling"] = None
        output["torch_dtype"] = output.pop("dtype", None)
        output.pop("auto_map", None)
        return output


def _path(kind: str) -> str:
    return f"efficient_attention_config[{RELEASED_WORDS.get(kind, kind)!r}]"


def _positive(name: str, value: Any, way_out: str) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a whole number ≥ 1, got {value!r}; {way_out}")


def _number(name: str, value: Any) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not 0 < number < math.inf:  # false for NaN too
        raise ValueError(
            f"{name} must be a number above 0, or a string that holds one, got {value!r}; the released files have it"
        )
    return number
