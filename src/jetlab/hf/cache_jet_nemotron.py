"""What a Jet-Nemotron model carries between calls: keys and values of attention layers, states of linear ones."""

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from jetlab.hf.configuration_jet_nemotron import JetNemotronConfig
from jetlab.layers.state import map_tensors, n_bytes, select, tensors


class RecurrentLayer(CacheLayerMixin):
    """State of a linear layer, of the same size at every length: whatever its mixer returns, batch first.

    With `static` the tensors of the first call are kept and later states are copied into them: their addresses never
    change, which CUDA graphs need.
    """

    is_sliding = False
    supports_early_init = False

    def __init__(self, static: bool = False):
        super().__init__()
        self.is_compileable = static
        self.state = None
        self.n_seen = 0

    def lazy_initialization(self, state, _values=None) -> None:
        if self.is_compileable:
            state = map_tensors(torch.clone, state)
            if not torch.compiler.is_compiling():
                for x in tensors(state):
                    torch._dynamo.mark_static_address(x)
        self.state = state
        self.is_initialized = True

    def update(self, state, n_tokens: int):
        """Keep `state`, reached after `n_tokens` further tokens, and return it."""
        self.n_seen += n_tokens
        if not self.is_initialized or not self.is_compileable:
            self.lazy_initialization(state)
        else:
            for kept, new in zip(tensors(self.state), tensors(state), strict=True):
                kept.copy_(new)
        return self.state

    def get_seq_length(self) -> int:
        return self.n_seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.n_seen + query_length, 0

    def get_max_length(self) -> int:
        return -1  # Transformers' word for no limit

    def reset(self) -> None:
        self.n_seen = 0
        if self.is_compileable:
            for x in tensors(self.state):
                x.zero_()  # a state of zeros is what a sequence begins with
        else:
            self.state, self.is_initialized = None, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.state = select(self.state, indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.state = map_tensors(lambda x: x.repeat_interleave(repeats, dim=0), self.state)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            raise ValueError(
                "a recurrent state cannot be cut back: it keeps no tokens apart, got crop("
                f"{tokens_to_remove}); copy the cache (copy.deepcopy) before the tokens that may have to go"
            )


class SlidingLayer(DynamicSlidingWindowLayer):
    """The last window − 1 keys and values, which with a window of 1 is none (Transformers' slice would keep all)."""

    def update(self, key_states, value_states, *args, **kwargs):
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        if self.sliding_window == 1:
            self.keys, self.values = keys[:, :, :0], values[:, :, :0]
        return keys, values


class JetNemotronCache(Cache):
    """One cache layer per model layer: keys and values, the last `window` of them, or a recurrent state.

    Attention grows with the context; with `max_cache_len` it has that size from the start (the static cache of
    Transformers) and every tensor keeps its address. Beam search, batches that grow or shrink, and `reset` work as with
    other caches. A model with linear layers cannot `crop`.
    """

    def __init__(self, config: JetNemotronConfig, max_cache_len: int | None = None):
        if max_cache_len is not None and max_cache_len < 1:
            raise ValueError(f"max_cache_len must be at least 1 token, got {max_cache_len}; None lets the cache grow")
        self._arguments = [(kind, config.sliding_window, max_cache_len) for kind in config.layer_kinds]
        super().__init__(layers=[_layer(*arguments) for arguments in self._arguments])

    @property
    def layer_kinds(self) -> list[str]:
        """The architecture that this cache belongs to."""
        return [kind for kind, _, _ in self._arguments]

    @property
    def is_linear(self) -> list[bool]:
        return [isinstance(layer, RecurrentLayer) for layer in self.layers]

    def reset(self) -> None:
        # Layers that grow are built anew: in Transformers before 5.18 their reset zeroes the keys and keeps the length.
        for index, arguments in enumerate(self._arguments):
            if self.layers[index].is_compileable:
                self.layers[index].reset()
            else:
                self.layers[index] = _layer(*arguments)

    def crop(self, tokens_to_remove: int) -> None:
        for layer in self.layers:  # ask the states first, so that a refusal leaves every layer as it was
            if isinstance(layer, RecurrentLayer):
                layer.crop(tokens_to_remove)
        super().crop(tokens_to_remove)

    def nbytes(self) -> int:
        """Bytes that the cache occupies now."""
        return sum(
            n_bytes(layer.state if isinstance(layer, RecurrentLayer) else (layer.keys, layer.values))
            for layer in self.layers
        )


def _layer(kind: str, window: int | None, max_cache_len: int | None) -> CacheLayerMixin:
    static = max_cache_len is not None
    if kind == "attention":
        return StaticLayer(max_cache_len) if static else DynamicLayer()
    if kind == "sliding_attention":
        return StaticSlidingWindowLayer(max_cache_len, window) if static else SlidingLayer(window)
    return RecurrentLayer(static)
