"""The engine's cache: everything allocated once, at addresses that never change.

Full attention keeps every token, a window keeps a ring of its last ones, a recurrent layer its state. Rows are sequences,
padded on the left to one length, so that one count of tokens holds for all: `end`, on the device. `start` is where a row's
own tokens begin.
"""

from collections.abc import Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache, CacheLayerMixin

from jetlab.hf import JetNemotronCache
from jetlab.inference import mamba2
from jetlab.layers.state import map_tensors, n_bytes, tensors

ATTENTION_KINDS = ("attention", "sliding_attention")
FAMILIES = ("qwen2", "qwen3", "llama", "gemma3_text", *mamba2.MODELS, "jet_nemotron")  # types held against `generate`
GROWING_ROPES = ("dynamic", "longrope")  # whose frequencies depend on how long a text is, or a chunk of it
HF_KINDS = {"full_attention": "attention", "sliding_attention": "sliding_attention"}  # the words of `layer_types`
HYBRID_KINDS = {"full_attention": "attention", "linear_attention": "mamba2", "mlp": "mlp"}  # those of Nemotron-H


def layer_kinds(config: PreTrainedConfig) -> tuple[str, ...]:
    """Kind of each layer of a decoder: those of `MIXERS`; "mamba2" throughout for a Mamba2 of Transformers; "mamba2",
    "attention" or "mlp", which is a layer of its own, for a Nemotron-H.

    Raises ValueError for a family that the engine was not held against `generate` with, for layer types or activations that
    it does not compute and for rotary frequencies that depend on the length of what is read at once.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"the engine runs {', '.join(FAMILIES)}, got a model of type {config.model_type}, whose attention may do more "
            "than it knows; use the model's own generate"
        )
    ropes = getattr(config, "rope_parameters", None) or {}
    for rope in (ropes, *(found for found in ropes.values() if isinstance(found, dict))):
        if rope.get("rope_type") in GROWING_ROPES:
            raise ValueError(
                f"rope_type must not be one of {', '.join(GROWING_ROPES)}, got {rope['rope_type']!r}: reading in chunks would "
                "change the frequencies; use the model's own generate"
            )
    if hasattr(config, "layer_kinds"):
        return tuple(config.layer_kinds)
    if config.model_type in mamba2.MODELS:
        mamba2.Mamba2Widths.of(config)
    if config.model_type == "mamba2":
        return ("mamba2",) * config.num_hidden_layers
    known = HYBRID_KINDS if config.model_type == "nemotron_h" else HF_KINDS
    types = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    unknown = sorted(set(types) - set(known))
    if unknown:
        raise ValueError(
            f"the engine runs the layers {', '.join(known)} of {type(config).__name__}, got {', '.join(unknown)}; use the "
            "model's own generate"
        )
    return tuple(known[name] for name in types)


class EngineLayer(CacheLayerMixin):
    """What the engine's layers share: the count of tokens is the cache's, and rows keep their places."""

    is_compileable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: "EngineCache"):
        super().__init__()
        self.cache = cache

    def get_seq_length(self) -> int:
        return self.cache.n_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.cache.n_seen + query_length, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError(
            f"rows of the engine's cache keep their order, got {list(beam_idx.shape)} new places; to search beams use the "
            "model's own generate with num_beams"
        )


class KeyValueRing(EngineLayer):
    """Keys and values [rows, Hkv, slots, d] of one attention layer; token p lies in slot p mod slots.

    With `window` None the slots are as many as the longest context and never go round.
    """

    def __init__(self, cache: "EngineCache", n_kv_heads: int, head_dim: int, window: int | None):
        super().__init__(cache)
        self.window = window
        self.n_slots = cache.max_len if window is None else min(window, cache.max_len)
        shape = (cache.n_rows, n_kv_heads, self.n_slots, head_dim)
        self.keys, self.values = (torch.zeros(shape, dtype=cache.dtype, device=cache.end.device) for _ in range(2))
        self.is_initialized = True

    def lazy_initialization(self, *_args) -> None:
        """Nothing is left to do."""

    def held(self) -> list[Tensor]:
        return [self.keys, self.values]

    def update(self, keys: Tensor, values: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        """What the new tokens attend over: while decoding all slots, before that keys and values in their order, of which
        the last are the new ones. Writes them."""
        held = [x[self.cache.rows] for x in (self.keys, self.values)]
        if self.cache.decoding:
            slot = self.cache.slot(self.n_slots)
            for kept, new in zip(held, (keys, values), strict=True):
                kept.index_copy_(2, slot, new)
            return tuple(held)
        past, T = self.cache.n_seen, keys.shape[2]
        if self.window is None:
            for kept, new in zip(held, (keys, values), strict=True):
                kept[:, :, past : past + T] = new
            return tuple(kept[:, :, : past + T] for kept in held)
        slots = torch.arange(max(0, past - self.n_slots + 1), past + T, device=keys.device) % self.n_slots
        before, after = slots[: len(slots) - T], slots[-min(T, self.n_slots) :]
        seen = []
        for kept, new in zip(held, (keys, values), strict=True):
            seen.append(torch.cat([kept[:, :, before], new], dim=2))
            kept[:, :, after] = new[:, :, -len(after) :]
        return tuple(seen)

    def get_max_length(self) -> int:
        return self.cache.max_len

    def reset(self) -> None:
        """Nothing to do: what lies beyond `end` is not read."""


class StateRows(EngineLayer):
    """State of a recurrent layer, whatever its mixer returns, batch first; its `recurrent` matrices in `state_dtype`.

    Tensors are allocated for all rows at the first call, or from a `state` given. A layer that is an MLP never has any.
    """

    def __init__(self, cache: "EngineCache", state=None):
        super().__init__(cache)
        self.all = None
        if state is not None:
            self.lazy_initialization(state)

    def held(self) -> list[Tensor]:
        return tensors(self.all)

    @property
    def state(self):
        return None if self.all is None else map_tensors(lambda x: x[self.cache.rows], self.all)

    def lazy_initialization(self, state, _values=None) -> None:
        rows = self.cache.n_rows

        def empty(x: Tensor, dtype: torch.dtype) -> Tensor:
            return torch.zeros(rows, *x.shape[1:], dtype=dtype, device=x.device)

        self.all = map_tensors(lambda x: empty(x, x.dtype), state)
        if self.cache.state_dtype is not None:
            self.all = self.all._replace(recurrent=empty(state.recurrent, self.cache.state_dtype))
        self.is_initialized = True

    def update(self, state, _n_tokens: int):
        if self.all is None:
            self.lazy_initialization(state)
        for kept, new in zip(tensors(self.state), tensors(state), strict=True):
            if kept.data_ptr() != new.data_ptr():  # a kernel may have written the new state in the old one's place
                kept.copy_(new)
        return self.state

    def get_max_length(self) -> int:
        return -1  # Transformers' word for no limit

    def reset(self) -> None:
        for x in tensors(self.all):
            x.zero_()  # a state of zeros is what a sequence begins with


class EngineCache(JetNemotronCache):
    """One layer of the above for each of the model's, for `batch_size` sequences of at most `max_len` tokens.

    `rows` are those that a call is about, so that a prompt can be read a few sequences at a time. While `decoding` lengths
    are taken from `end` alone, and nothing asks the device.
    Raises ValueError for a `state_dtype` where no layer has a matrix to keep in it, and as `layer_kinds`.
    """

    overwrites_states = True  # a mixer may write its new state in the old one's place

    def __init__(
        self,
        config: PreTrainedConfig,
        batch_size: int,
        max_len: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        state_dtype: torch.dtype | None = None,
    ):
        self.n_rows, self.max_len = batch_size, max_len
        self.dtype, self.state_dtype = dtype, state_dtype
        self.end = torch.zeros((), dtype=torch.long, device=device)
        self._slots: dict[int, Tensor] = {}
        self.start = torch.zeros(batch_size, dtype=torch.long, device=device)
        self.rows, self.n_seen, self.decoding, self.padded = slice(0, batch_size), 0, False, False
        kinds = layer_kinds(config)
        if state_dtype is not None and set(kinds) <= {*ATTENTION_KINDS, "mlp"}:
            raise ValueError(
                f"state_dtype must be None for {config.model_type}, got {state_dtype}: the engine keeps no recurrent matrix of "
                "it; leave it out"
            )
        window = getattr(config, "sliding_window", None)
        self._arguments = [(kind, window, max_len) for kind in kinds]
        head_dim = getattr(config, "head_dim", None)
        layers: list = []
        for kind in kinds:
            if kind in ATTENTION_KINDS:
                head_dim = head_dim or config.hidden_size // config.num_attention_heads
                ring = window if kind == "sliding_attention" else None
                layers.append(KeyValueRing(self, config.num_key_value_heads, head_dim, ring))
            elif kind == "mamba2" and config.model_type in mamba2.MODELS:
                layers.append(StateRows(self, mamba2.Mamba2Widths.of(config).empty_state(dtype, device)))
            else:
                layers.append(StateRows(self))
        Cache.__init__(self, layers=layers)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.n_seen

    def real(self, n_tokens: int) -> Tensor | None:
        """Which of the `n_tokens` that are read next are not padding, [rows, n_tokens]; None: all."""
        if not self.padded:
            return None
        position = torch.arange(self.n_seen, self.n_seen + n_tokens, device=self.end.device)
        return position >= self.start[self.rows][:, None]

    @contextmanager
    def of_rows(self, rows: slice):
        """Calls inside are about these rows; the number of tokens seen is that of before at the end."""
        before = self.rows, self.n_seen
        self.rows = rows
        try:
            yield
        finally:
            self.rows, self.n_seen = before

    @contextmanager
    def stepping(self):
        """Calls inside read one token a row, at the length that `end` says."""
        self.decoding = True
        try:
            yield
        finally:
            self.decoding = False

    @torch.inference_mode()
    def begin(self, start: Sequence[int]) -> None:
        """Empty, for rows whose own tokens begin at `start`."""
        for layer in self.layers:
            layer.reset()
        self.start.copy_(torch.tensor(start))
        self.padded = any(start)
        self.seen(0)

    def advance(self) -> None:
        """One token a row more."""
        self.end.add_(1)
        self._slots.clear()

    def slot(self, n_slots: int) -> Tensor:
        """[1], where a ring of `n_slots` keeps the newest token; computed once a step for all rings of this size."""
        if n_slots not in self._slots:
            self._slots[n_slots] = (self.end - 1).remainder(n_slots)[None]
        return self._slots[n_slots]

    def seen(self, n_tokens: int) -> None:
        self.n_seen = n_tokens
        self.end.fill_(n_tokens)
        self._slots.clear()

    @torch.inference_mode()
    def fill(self, n_tokens: int, generator: torch.Generator | None = None) -> None:
        """As if `n_tokens` random tokens had been read: normal keys and values, states of a tenth their size."""
        for layer in self.layers:
            for x in layer.held():
                x.normal_(generator=generator)
                if not isinstance(layer, KeyValueRing):
                    x.mul_(0.1)
        self.seen(n_tokens)

    def nbytes(self) -> int:
        """Bytes of keys, values and states."""
        return sum(n_bytes(layer.held()) for layer in self.layers)
