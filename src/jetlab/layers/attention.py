"""Softmax attention as a token mixer: the pretrained layer itself, wrapped and never copied.

    y_t = W_o Σ_{s ≤ t} softmax_s(q_tᵀ k_s / √d) v_s        q, k rotated by position (RoPE), grouped key/value heads

With a window w only the keys with t − w < s ≤ t are seen. The state is the key/value cache: it grows with the context,
which is what the study is about. Sliding attention is the same layer seen through a window, and its cache stops growing.
"""

import inspect
from typing import NamedTuple

import torch
from torch import Tensor, nn

from jetlab.layers.state import token_positions
from jetlab.ops.packing import check_documents


class KVState(NamedTuple):
    """Keys and values so far, [B, n_kv_heads, T, head_dim], keys rotated; `real` [B, T] is False at padding."""

    k: Tensor
    v: Tensor
    real: Tensor


class WindowState(NamedTuple):
    """The last keys and values of each row, as in `KVState`, and the position of the next token, [B]."""

    k: Tensor
    v: Tensor
    real: Tensor
    position: Tensor


class _Collector:
    """What the Hugging Face layer takes for its cache during one call: it appends, and keeps the result for the state."""

    def __init__(self, state: KVState | WindowState | None):
        self.k, self.v = (None, None) if state is None else (state.k, state.v)

    def update(self, k: Tensor, v: Tensor, *_args, **_kwargs) -> tuple[Tensor, Tensor]:
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


class Attention(nn.Module):
    """The attention layer `inner` of any Hugging Face decoder, with the interface of a token mixer.

    `rotary` is the decoder's rotary embedding, shared with it. x, y [B, T, D].
    """

    def __init__(self, inner: nn.Module, rotary: nn.Module):
        super().__init__()
        self.inner = inner
        self._rotary = (rotary,)  # in a tuple: it belongs to the decoder, not to this layer's parameters
        self.window = getattr(inner, "sliding_window", None)
        by_layer_type = "layer_type" in inspect.signature(rotary.forward).parameters
        self._rotary_args = (inner.layer_type,) if by_layer_type else ()

    @property
    def rotary(self) -> nn.Module:
        return self._rotary[0]

    def forward(self, x, state: KVState | None = None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `KVState`; of packed documents, which each see themselves alone, y and None.

        Of these `cu_seqlens` counts over the rows laid end to end. Raises ValueError for packed documents with a state or with
        padding, and for one that reaches over the end of a row.
        """
        if cu_seqlens is not None:
            return self._documents(x, state, mask, cu_seqlens, shared), None
        B, T, _ = x.shape
        past = 0 if state is None else state.k.shape[2]
        if positions is None:
            positions = torch.arange(past, past + T, device=x.device).expand(B, T)
        real, padded = _real_tokens(x, state, mask)
        y, k, v = self._attend(x, state, positions, self._visible(T, past, real if padded else None, x))
        return y, KVState(k, v, real)

    def _documents(self, x, state, mask, cu_seqlens, shared: dict | None) -> Tensor:
        """y [B, T, D] of documents that begin at `cu_seqlens` [N+1] of the rows laid end to end, each from position 0.

        None reaches over the end of a row: the mask is [B, 1, T, T]. It is the same for all layers of one window, so that a
        model call makes it once (`shared`).
        """
        if state is not None or mask is not None:
            raise ValueError("packed documents carry no state and hold no padding, got one of them; leave it out")
        shared = {} if shared is None else shared
        key = f"documents, window {self.window}"
        if key not in shared:
            B, T, _ = x.shape
            check_documents(cu_seqlens, 1, B * T, row=T)
            ends = cu_seqlens.to(x.device)
            place = torch.arange(B * T, device=x.device)
            document = (torch.searchsorted(ends, place, right=True) - 1).view(B, 1, T)
            token = torch.arange(T, device=x.device)
            visible = (document.mT == document) & (token <= token[:, None])
            if self.window is not None:
                visible &= token > token[:, None] - self.window
            positions = place.view(B, T) - ends[document[:, 0]]
            shared[key] = _additive(visible[:, None], x.dtype), positions
        visible, positions = shared[key]
        return self._attend(x, None, positions, visible)[0]

    def _attend(self, x, state, positions, visible) -> tuple[Tensor, Tensor, Tensor]:
        collector = _Collector(state)
        y, _ = self.inner(
            hidden_states=x,
            position_embeddings=self.rotary(x, positions, *self._rotary_args),
            attention_mask=visible,
            past_key_values=collector,
        )
        return y, collector.k, collector.v

    def _visible(self, T: int, past: int, real: Tensor | None, x: Tensor) -> Tensor | None:
        """Additive mask [B or 1, 1, T, past + T]; None where plain causal attention or a single token needs none."""
        if real is None and self.window is None and (past == 0 or T == 1):
            return None
        query = torch.arange(past, past + T, device=x.device)[:, None]
        key = torch.arange(past + T, device=x.device)[None, :]
        visible = key <= query
        if self.window is not None:
            visible = visible & (key > query - self.window)
        visible = visible[None, None]
        if real is not None:
            itself = (key == query)[None, None]  # a padded query sees itself, so that no softmax is over nothing
            visible = visible & real[:, None, None, :] | itself
        return _additive(visible, x.dtype)

    def state_bytes(self, seq_len: int, dtype: torch.dtype = torch.float32) -> int:
        """Bytes of keys and values of one sequence: 2 · n_kv_heads · head_dim · min(seq_len, window) · bytes."""
        kept = seq_len if self.window is None else min(seq_len, self.window)
        return 2 * self.inner.k_proj.out_features * kept * dtype.itemsize

    @classmethod
    def from_attention(cls, attention: nn.Module, config: nn.Module) -> "Attention":
        """Wrap a pretrained layer; `config` is the decoder's rotary embedding."""
        return cls(attention, config)


class SlidingAttention(Attention):
    """The attention layer `inner` seen through a window: each token sees itself and the window − 1 tokens before it.

    The state keeps the last `window` tokens of each row. Padding takes no place in the window, wherever it stands. A layer
    that came with a narrower window of its own keeps that.
    Raises ValueError if `window` is not a whole number ≥ 1.
    """

    def __init__(self, inner: nn.Module, rotary: nn.Module, *, window: int):
        if not isinstance(window, int) or window < 1:
            raise ValueError(
                f"window must be a whole number ≥ 1, the current token included, got {window!r}; "
                "use kind 'attention' for no window"
            )
        super().__init__(inner, rotary)
        self.window = window if self.window is None else min(window, self.window)

    def forward(self, x, state: WindowState | None = None, *, mask=None, positions=None, cu_seqlens=None, shared=None):
        """y and the new `WindowState`; packed documents as in `Attention.forward`."""
        if cu_seqlens is not None:
            return self._documents(x, state, mask, cu_seqlens, shared), None
        past = None if state is None else state.position
        positions, position = token_positions(x, past, positions=positions, mask=mask)
        real, padded = _real_tokens(x, state, mask)
        y, k, v = self._attend(x, state, positions, self._visible_tokens(x, real))
        if real.shape[1] > self.window:
            # Padding first, then tokens in their order: the last places are the last tokens.
            last = real.long().argsort(dim=1, stable=True)[:, -self.window :] if padded else None
            k, v = (_last(kept, last, self.window) for kept in (k, v))
            real = real[:, -self.window :].clone() if last is None else real.gather(1, last)
        return y, WindowState(k, v, real, position)

    def _visible_tokens(self, x: Tensor, real: Tensor) -> Tensor | None:
        """Additive mask [B, 1, T, kept + T]; None where plain causal attention does."""
        T, n_keys = x.shape[1], real.shape[1]
        if T == n_keys <= self.window and bool(real.all()):
            return None
        key = torch.arange(n_keys, device=x.device)
        query = key[-T:, None]
        age = real.cumsum(1)[:, None, -T:, None] - real.cumsum(1)[:, None, None, :]  # tokens since, padding not counted
        visible = real[:, None, None, :] & (key <= query) & (age < self.window)
        return _additive(visible | (key == query), x.dtype)  # a padded query sees itself: no softmax is over nothing

    @classmethod
    def from_attention(cls, attention: nn.Module, config: nn.Module, *, window: int) -> "SlidingAttention":
        """Wrap a pretrained layer; `config` is the decoder's rotary embedding."""
        return cls(getattr(attention, "inner", attention), config, window=window)


def _real_tokens(x: Tensor, state: KVState | WindowState | None, mask: Tensor | None) -> tuple[Tensor, bool]:
    """Which of the keys kept and new are tokens, [B, kept + T], and whether padding may be among them."""
    real = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask.bool()
    padded = mask is not None or (state is not None and not bool(state.real.all()))
    return (real if state is None else torch.cat([state.real, real], dim=1)), padded


def _additive(visible: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(visible, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)


def _last(x: Tensor, index: Tensor | None, n: int) -> Tensor:
    """Columns `index` [B,n] of x [B,H,S,d], the last n if None; a copy, since a view would keep all of x alive."""
    if index is None:
        return x[:, :, -n:].clone()
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
