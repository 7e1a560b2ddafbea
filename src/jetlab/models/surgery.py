"""Surgery on a Hugging Face decoder: each attention layer becomes a slot that holds one or more token mixers.

`wrap` puts new paths beside every attention (the supernet of Sec 2.2), `convert` leaves one mixer a layer (a hybrid),
`freeze` fixes all that came with the pretrained model, `save` and `load` keep hybrids as Hugging Face folders.
The decoder's own forward stays in charge of embeddings, norms, MLPs and head, so a decoder whose layers all have a
`self_attn` with separate q, k, v projections works, with experts or without: Qwen2, Qwen3, Llama, Mistral, Gemma 3, OLMo 2
and others of their build. `attach` refuses the rest, and any model that would not compute the same with slots.
"""

import json
import re
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.utils.logging import disable_progress_bar

from jetlab.layers import MIXERS
from jetlab.layers.attention import Attention
from jetlab.layers.dims import BlockDims
from jetlab.layers.state import map_tensors, n_bytes, select
from jetlab.paths import MissingInput

disable_progress_bar()  # in a kernel it is drawn into the cell, with the clock in it

LayerKinds = tuple[str, ...]


class HybridCache(DynamicCache):
    """A Hugging Face cache whose layers hold whatever state their mixer returned: keys and values, or a matrix."""

    def __init__(self):
        super().__init__()
        self.states: dict[int, object] = {}
        self.n_seen = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_seen

    def get_query_offset(self, layer_idx: int = 0) -> int:
        return self.n_seen

    def get_mask_sizes(self, query_length, layer_idx: int = 0) -> tuple[int, int]:
        return self.n_seen + int(query_length), 0

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.states = {
            index: map_tensors(lambda x: x.repeat_interleave(repeats, dim=0), state)
            for index, state in self.states.items()
        }

    def batch_select_indices(self, indices: Tensor) -> None:
        self.states = {index: select(state, indices) for index, state in self.states.items()}

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def nbytes(self) -> int:
        """Bytes that the states occupy now."""
        return n_bytes(list(self.states.values()))


class Shared(dict):
    """What the layers share in a model call. A class of its own, which tools that copy nested dicts pass on as it is."""


class _Call:
    """What all slots share during one forward of the decoder."""

    def __init__(self):
        self.mask: Tensor | None = None
        self.cu_seqlens: Tensor | None = None
        self.shared = Shared()
        self.tape: list[tuple[Tensor, Tensor]] | None = None


def on_documents(mixer: nn.Module, x: Tensor, cu_seqlens: Tensor, shared: Shared) -> Tensor:
    """y [B, T, D] of packed documents, which begin at `cu_seqlens` of the rows laid end to end, as linear mixers read them."""
    if isinstance(mixer, Attention):
        return mixer(x, cu_seqlens=cu_seqlens, shared=shared)[0]
    return mixer(x.reshape(1, -1, x.shape[2]), cu_seqlens=cu_seqlens, shared=shared)[0].view(x.shape)


class Slot(nn.Module):
    """Stands where a decoder layer had its attention and hands the call to the mixer of kind `active`."""

    def __init__(self, layer_idx: int, paths: dict[str, nn.Module], call: _Call):
        super().__init__()
        self.layer_idx = layer_idx
        self.paths = nn.ModuleDict(paths)
        self.active = next(iter(paths))
        self._call = call

    def forward(self, hidden_states, past_key_values: HybridCache | None = None, position_ids=None, **_kwargs):
        call = self._call
        state = None if past_key_values is None else past_key_values.states.get(self.layer_idx)
        if call.cu_seqlens is not None:
            y = on_documents(self.paths[self.active], hidden_states, call.cu_seqlens, call.shared)
        else:
            y, state = self.mix(hidden_states, state, mask=call.mask, positions=position_ids, shared=call.shared)
        if past_key_values is not None:
            past_key_values.states[self.layer_idx] = state
        if call.tape is not None:
            call.tape.append((hidden_states, y))
        return y, None

    def mix(self, x: Tensor, state, **call) -> tuple[Tensor, object]:
        """y and the new state by the active path; `blended` and `prefixes.branching` put several paths in its place."""
        return self.paths[self.active](x, state, **call)

    @property
    def linear(self) -> dict[str, nn.Module]:
        """The paths with parameters of their own: all but the pretrained attention, be it seen through a window."""
        return {kind: path for kind, path in self.paths.items() if not isinstance(path, Attention)}


def decoder(model: PreTrainedModel) -> nn.Module:
    """The stack of layers inside a causal language model (text part of a multimodal one)."""
    base = getattr(model, "model", model)
    return getattr(base, "language_model", base)


def slots(model: PreTrainedModel) -> list[Slot]:
    """The slots of a model that has been operated on, in order of depth."""
    found = [layer.self_attn for layer in decoder(model).layers]
    if not all(isinstance(slot, Slot) for slot in found):
        raise ValueError("the model has no slots: call surgery.attach, wrap or convert on it first")
    return found


_WAY_OUT = "use a Qwen2, Qwen3, Llama, Mistral, Gemma 3 or OLMo 2 model"


def _require_attention_layers(model: PreTrainedModel, stack: nn.Module) -> None:
    """Raises ValueError with the reason why slots cannot stand for the attention of this model."""
    name, config = type(model).__name__, model.config
    if config.is_encoder_decoder:
        raise ValueError(f"surgery needs a decoder-only model, got {name}, an encoder with a decoder; {_WAY_OUT}")
    if getattr(model, "_is_stateful", False):
        raise ValueError(
            f"surgery needs a decoder that attends in every layer, got {name}, which keeps a recurrent state of its own; "
            f"{_WAY_OUT} (a hybrid of ours comes with slots from surgery.load or export.load)"
        )
    for index, layer in enumerate(getattr(stack, "layers", [None])):
        attention = getattr(layer, "self_attn", None)
        if isinstance(attention, Slot):
            raise ValueError("the model has slots already; load a fresh one to operate on it again")
        lacking = [name for name in ("q_proj", "k_proj", "v_proj", "o_proj") if not hasattr(attention, name)]
        if lacking:
            raise ValueError(
                f"surgery needs decoder layers with self_attn.q_proj, k_proj, v_proj, o_proj; layer {index} of "
                f"{name} lacks {', '.join(lacking)}; {_WAY_OUT}"
            )
    kinds = set(getattr(stack.config, "layer_types", None) or ())
    unknown = sorted(kinds - {"full_attention", "sliding_attention"})
    if unknown or not hasattr(stack, "rotary_emb"):
        found = ", ".join(unknown) or "no rotary_emb"
        raise ValueError(
            f"surgery needs full or sliding attention with rotary positions in every layer, got {found} in {name}; {_WAY_OUT}"
        )
    if stack.config._attn_implementation != "sdpa":  # which needs no mask to be causal
        way_out = "load it with attn_implementation='sdpa'"
        if not model._supports_sdpa:  # capped scores (Gemma 2), sinks (gpt-oss)
            way_out = f"its scores have no such form: {_WAY_OUT}"
        found = stack.config._attn_implementation
        raise ValueError(f"surgery needs attention by sdpa, got {found!r} in {name}; {way_out}")


def _describe(attention: nn.Module, config, index: int) -> None:
    """Note on an attention layer what some families keep in `config` alone: its window (Mistral) and its type (OLMo 3)."""
    kinds = getattr(config, "layer_types", None)
    if not hasattr(attention, "sliding_window"):
        full = kinds is not None and kinds[index] == "full_attention"
        attention.sliding_window = None if full else getattr(config, "sliding_window", None)
    if kinds is not None and not hasattr(attention, "layer_type"):
        attention.layer_type = kinds[index]


@torch.no_grad()
def _probe(stack: nn.Module) -> Tensor:
    """Hidden states of eight tokens, [1, 8, D], in fp32; nan where the model has shapes alone."""
    device, training = next(stack.parameters()).device, stack.training
    if device.type == "meta":
        return torch.tensor(torch.nan, device="cpu")
    stack.eval()
    ids = torch.arange(8, device=device)[None] % stack.config.vocab_size
    hidden = stack(input_ids=ids, use_cache=False).last_hidden_state.float()
    stack.train(training)
    return hidden


def attach(model: PreTrainedModel) -> PreTrainedModel:
    """Replace every attention by a slot that holds just this attention; the model computes what it did before.

    Raises ValueError for a model that is no decoder of attention layers with q, k, v and o projections, whose attention does
    not run by sdpa, or that computes something else with slots; it is then as it was.
    """
    stack = decoder(model)
    _require_attention_layers(model, stack)
    call = _Call()
    before, pretrained = _probe(stack), [layer.self_attn for layer in stack.layers]
    for index, (layer, attention) in enumerate(zip(stack.layers, pretrained, strict=True)):
        _describe(attention, stack.config, index)
        layer.self_attn = Slot(index, {"attention": Attention(attention, stack.rotary_emb)}, call)
    changed = float((_probe(stack) - before).norm() / before.norm())
    if changed > 1e-2:  # bf16 rounds to 4e-3; not so for nan
        for layer, attention in zip(stack.layers, pretrained, strict=True):
            layer.self_attn = attention
        raise ValueError(
            f"a model must compute with slots what it computed before, got a relative difference of {changed:.2g} in the "
            f"hidden states of {type(model).__name__}, whose layers do more than attend to the tokens before; {_WAY_OUT}"
        )

    def begin(_module, args, kwargs):
        mask = kwargs.get("attention_mask")
        ids = kwargs.get("input_ids", args[0] if args else None)
        length = (kwargs["inputs_embeds"] if ids is None else ids).shape[1]
        call.mask = None if mask is None or bool(mask.all()) else mask[:, -length:]
        call.shared = Shared()
        cache = kwargs.get("past_key_values")
        if cache is None and (stack.config.use_cache if kwargs.get("use_cache") is None else kwargs["use_cache"]):
            return args, kwargs | {"past_key_values": HybridCache()}
        if cache is not None and not isinstance(cache, HybridCache):
            raise ValueError(
                f"a model with slots keeps its states in a HybridCache, got a {type(cache).__name__}; "
                "pass past_key_values=HybridCache(), to generate() as well"
            )

    def end(_module, _args, kwargs, output):
        cache = kwargs.get("past_key_values")
        if isinstance(cache, HybridCache):
            cache.n_seen += output.last_hidden_state.shape[1]

    stack.register_forward_pre_hook(begin, with_kwargs=True)
    stack.register_forward_hook(end, with_kwargs=True)
    model._call = call
    return model


def _build(model: PreTrainedModel, kinds: Sequence[Sequence[str]], dims: BlockDims | None, options: dict) -> None:
    """Give every slot a path of each kind that `kinds` names for it, beside its attention."""
    for index, slot in enumerate(slots(model)):
        pretrained = slot.paths["attention"]
        for kind in kinds[index]:
            if kind == "sliding_attention":
                own = _options_of(kind, index, kinds, options)
                slot.paths[kind] = MIXERS[kind].from_attention(pretrained.inner, pretrained.rotary, **own)
            elif kind != "attention":
                mixer = MIXERS[kind].from_attention(pretrained.inner, dims, **_options_of(kind, index, kinds, options))
                slot.paths[kind] = mixer.to(pretrained.inner.q_proj.weight.device)


def _options_of(kind: str, index: int, kinds: Sequence[Sequence[str]], options: dict) -> dict:
    """What a path of layer `index` is built with: `window` is for sliding attention and all else for linear kinds, if both are.

    `kinds` names the paths of every layer.
    """
    sliding = "sliding_attention"
    if kind == sliding and "window" not in options:
        raise ValueError("sliding_attention needs a window, got none; pass window=… in tokens")
    anywhere = set().union(*kinds)
    if sliding in anywhere and anywhere - {sliding, "attention"}:
        options = {name: value for name, value in options.items() if (name == "window") == (kind == sliding)}
    if getattr(MIXERS[kind], "depends_on_depth", False):
        first = not any(kind in above for above in kinds[:index])
        options = options | {"layer_idx": index, "n_layers": len(kinds), "first": first}
    return options


def wrap(
    model: PreTrainedModel,
    kinds: str | Sequence[str],
    dims: BlockDims | None,
    *,
    layers: Sequence[int] | None = None,
    **options,
) -> PreTrainedModel:
    """The supernet: beside the attention of each layer (or of `layers`) new paths of `kinds`. In place; returns the model.

    Initial values come from torch's global generator, layer by layer. Sliding attention has none and takes no `dims`;
    beside it `options` go to the linear kinds, but for its `window` in tokens.
    """
    attach(model)
    new = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    _build(
        model, [new if layers is None or index in layers else () for index in range(len(slots(model)))], dims, options
    )
    return model


def _slots_for(model: PreTrainedModel, kinds: Sequence[str]) -> list[Slot]:
    found = slots(model)
    if len(kinds) != len(found):
        raise ValueError(f"an architecture needs one kind per layer, {len(found)} here, got {len(kinds)}: {kinds}")
    return found


def activate(model: PreTrainedModel, kinds: Sequence[str]) -> None:
    """Choose the path of each layer. Raises ValueError for a wrong number of kinds or a path that a layer lacks."""
    found = _slots_for(model, kinds)
    for index, (slot, kind) in enumerate(zip(found, kinds, strict=True)):
        _require_path(index, slot, kind)
        slot.active = kind


def _require_path(index: int, slot: Slot, kind: str) -> None:
    if kind not in slot.paths:
        raise ValueError(f"layer {index} has paths {', '.join(slot.paths)}, not {kind!r}; wrap the model with it")


def convert(model: PreTrainedModel, kinds: Sequence[str], dims: BlockDims | None, **options) -> PreTrainedModel:
    """A hybrid: each layer holds the one mixer that `kinds` names; other attention is dropped. In place; returns the model.

    `options` go to the linear kinds, but for `window`, tokens that sliding attention sees.
    """
    attach(model)
    _slots_for(model, kinds)
    _build(model, [(kind,) for kind in kinds], dims, options)
    return prune(model, kinds)


def prune(model: PreTrainedModel, kinds: Sequence[str]) -> PreTrainedModel:
    """Keep only the paths that `kinds` names: a supernet becomes one of its subnetworks. In place; returns the model.

    The first layer of a kind that depends on depth lays down what only layers behind a first one use.
    """
    activate(model, kinds)
    for index, (slot, kind) in enumerate(zip(slots(model), kinds, strict=True)):
        slot.paths = nn.ModuleDict({kind: slot.paths[kind]})
        if getattr(slot.paths[kind], "depends_on_depth", False) and kind not in kinds[:index]:
            slot.paths[kind].become_first()
    return model


def freeze(model: PreTrainedModel) -> list[nn.Parameter]:
    """Fix everything that came with the pretrained model, attention included; returns the parameters that train."""
    model.requires_grad_(False)
    new = [path for slot in slots(model) for path in slot.linear.values()]
    for path in new:
        path.requires_grad_(True)
    return [parameter for path in new for parameter in path.parameters()]


def kinds_of(model: PreTrainedModel) -> LayerKinds:
    """The architecture that is active now."""
    return tuple(slot.active for slot in slots(model))


def state_bytes(model: PreTrainedModel, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
    """Bytes of state and cache of one sequence of `seq_len` tokens under the active architecture."""
    return sum(of[kind] for of, kind in zip(path_bytes(model, seq_len, dtype), kinds_of(model), strict=True))


def path_bytes(model: PreTrainedModel, seq_len: int, dtype: torch.dtype = torch.float32) -> list[dict[str, int]]:
    """Bytes of state and cache that each path of each layer holds of one sequence of `seq_len` tokens."""
    return [{kind: path.state_bytes(seq_len, dtype) for kind, path in slot.paths.items()} for slot in slots(model)]


@contextmanager
def blended(model: PreTrainedModel, kind: str, gates: Tensor):
    """Within it the slot of layer l returns gates[l] · attention(x) + (1 − gates[l]) · path(x), its path of `kind`.

    gates [n_layers] get gradients; a state holds both paths'. Afterwards the model is as it was.
    Raises ValueError for a wrong number of gates or a path that a layer lacks.
    """
    found = slots(model)
    if gates.shape != (len(found),):
        raise ValueError(f"blended needs one gate per layer, {len(found)} here, got shape {tuple(gates.shape)}")
    for index, slot in enumerate(found):
        for needed in ("attention", kind):
            _require_path(index, slot, needed)
    try:
        for slot, gate in zip(found, gates.unbind(), strict=True):
            slot.mix = partial(_blend, slot, kind, gate)
        yield
    finally:
        for slot in found:
            vars(slot).pop("mix", None)  # the class's own shows again


def _blend(slot: Slot, kind: str, gate: Tensor, x: Tensor, state, **call) -> tuple[Tensor, tuple]:
    a, b = state or (None, None)
    (attention, a), (other, b) = slot.paths["attention"](x, a, **call), slot.paths[kind](x, b, **call)
    return gate * attention + (1 - gate) * other, (a, b)


@contextmanager
def recorded(model: PreTrainedModel):
    """Within it, `[(input, output)]` of every slot is recorded, layer by layer, for layer-local alignment."""
    call = model._call
    call.tape = []
    try:
        yield call.tape
    finally:
        call.tape = None


@contextmanager
def packed(model: PreTrainedModel, cu_seqlens: Tensor):
    """Within it each call of the model reads rows [B, T] of documents that know nothing of one another.

    Document i is the slice cu_seqlens[i] : cu_seqlens[i + 1] of the rows laid end to end, and ends where its row does, if not
    before; `cu_seqlens` [N+1] rises from 0 to B · T. Every document begins at position 0, whatever `position_ids` say. Give
    the model no cache.
    """
    call = model._call
    call.cu_seqlens = cu_seqlens
    try:
        yield
    finally:
        call.cu_seqlens = None


_PATH = re.compile(r"self_attn\.paths\.[a-z0-9_]+\.(inner\.)?")


def save(model: PreTrainedModel, folder: Path, tokenizer=None, *, dims: BlockDims | None = None, **options) -> None:
    """Write a hybrid as config.json and model.safetensors; parameters are named `self_attn.…` as in a plain decoder.

    The config holds the architecture as `layer_kinds` with the block's `block_dims` and `block_options`.
    Raises ValueError if a layer still has several paths.
    """
    if any(len(slot.paths) > 1 for slot in slots(model)):
        raise ValueError(
            "a supernet holds several paths a layer; choose one architecture with surgery.prune, then save"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    config = json.loads(model.config.to_json_string(use_diff=False))
    config |= {"layer_kinds": list(kinds_of(model)), "block_dims": asdict(dims) if dims else None}
    config |= {"block_options": options}
    weights = {_PATH.sub("self_attn.", name): x.contiguous() for name, x in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)


def load(
    folder: str | Path, *, device: str | torch.device = "cpu", revision: str | None = None
) -> tuple[PreTrainedModel, object]:
    """A model and its tokeniser from a Hugging Face folder or hub id; a hybrid of ours comes back with its slots.

    Weights are read as float32. `revision` is a commit of the hub's repository; None: the newest.

    Only safetensors are read and no code is executed. Raises MissingInput for a folder that lacks a file, ValueError for
    a file that is damaged or does not fit its config.
    """
    path = Path(folder)
    local = path.is_dir()
    if not local and (path.is_absolute() or path.exists() or str(folder).count("/") != 1):
        raise MissingInput(
            f"no model in {folder}: it must be a folder with config.json and model.safetensors, or a hub id"
        )
    for name in ("config.json", "model.safetensors", "tokenizer.json") if local else ():
        if not (path / name).is_file():
            raise MissingInput(
                f"{path / name} is missing: restore it with `git checkout`, or run the stage that wrote it"
            )
    try:
        # A folder's tokenizer.json as it stands: AutoTokenizer goes by the model's type, and would put Qwen2's normaliser
        # and an end token outside the vocabulary on top of ours.
        tokenizer_class = PreTrainedTokenizerFast if local else AutoTokenizer
        tokenizer = tokenizer_class.from_pretrained(folder, trust_remote_code=False, revision=revision)
        layout = json.loads((path / "config.json").read_text()) if local else {}
        if layout.get("layer_kinds") is None:
            model, found = AutoModelForCausalLM.from_pretrained(
                folder,
                use_safetensors=True,
                trust_remote_code=False,
                dtype=torch.float32,
                output_loading_info=True,
                revision=revision,
            )
            if found["missing_keys"]:  # transformers gives them random values, with no more than a warning
                raise RuntimeError(f"tensors missing: {sorted(found['missing_keys'])[:4]}")
        else:
            model = _load_hybrid(path, layout)
    except (SafetensorError, json.JSONDecodeError, RuntimeError) as error:
        raise ValueError(
            f"{folder} holds no model that can be read ({type(error).__name__}: {str(error).splitlines()[0]}); "
            "a file is damaged or does not fit config.json: restore it, or run the stage that wrote it again"
        ) from error
    return model.to(device).eval(), tokenizer


def _load_hybrid(folder: Path, layout: dict) -> PreTrainedModel:
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder), dtype=torch.float32)
    dims = BlockDims(**layout["block_dims"]) if layout["block_dims"] else None
    convert(model, layout["layer_kinds"], dims, **layout["block_options"])
    saved = load_file(folder / "model.safetensors")
    names = {_PATH.sub("self_attn.", name): name for name in model.state_dict()}
    if model.config.tie_word_embeddings:
        names.pop("lm_head.weight", None)
    missing, extra = sorted(set(names) - set(saved)), sorted(set(saved) - set(names))
    if missing or extra:
        raise RuntimeError(f"tensors missing: {missing[:4]}, not expected: {extra[:4]}")
    model.load_state_dict({names[name]: x for name, x in saved.items()}, strict=False)
    model.tie_weights()
    return model
