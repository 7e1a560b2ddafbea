"""Attention of the engine: what a decoder of Transformers calls instead of its own, while `engaged`.

A prompt is read in chunks, whose T queries see the `past` tokens in front of them and those of the chunk up to themselves;
a single new token goes through `ops.decode_attention`. Transformers builds no masks meanwhile: the cache knows them.
"""

from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from jetlab.inference.cache import EngineCache
from jetlab.inference.fused import fused
from jetlab.ops import decode_attention

NAME = "jetlab_engine"
MASK_BYTES = 2**28  # a mask larger than this is made for fewer queries at a time
FAST = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def prompt_attention(
    q: Tensor, k: Tensor, v: Tensor, *, past: int, start: Tensor | None, window: int | None, scale: float
) -> Tensor:
    """y [B,H,T,d] of T new tokens at positions past, past + 1, …; k, v [B,Hkv,S,d] are the last S tokens, the new ones too.

    A token sees those before it and itself, from `start` [B] of its row on and at most `window` of them. Padding sees itself.
    """
    T, S = q.shape[2], k.shape[2]
    if start is None and (window is None or window >= S):
        return _causal(q, k, v, scale)
    widest = max(1, MASK_BYTES // (len(q) * S * q.element_size()))
    block = min(T, widest if window is None else max(window, 1), widest)
    parts = []
    for begin in range(0, T, block):
        stop = min(begin + block, T)
        last = S - T + stop
        first = 0 if window is None else max(0, S - T + begin - window + 1)
        whole = {"device": q.device, "dtype": torch.int32}  # half of what numbers of 64 bits would take beside the mask
        age = torch.arange(S - T + begin, last, **whole)[:, None] - torch.arange(first, last, **whole)
        visible = age >= 0
        if window is not None:
            visible = visible & (age < window)
        visible = visible[None, None]
        if start is not None:
            position = torch.arange(past + T - S + first, past + T - S + last, **whole)
            visible = visible & (position >= start[:, None])[:, None, None] | (age == 0)
        mask = torch.zeros(visible.shape, dtype=q.dtype, device=q.device).masked_fill_(~visible, -torch.inf)
        inside = slice(first, last)
        with sdpa_kernel(FAST, set_priority=True):
            parts.append(
                F.scaled_dot_product_attention(
                    q[:, :, begin:stop], k[:, :, inside], v[:, :, inside], attn_mask=mask, scale=scale, enable_gqa=True
                )
            )
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _causal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Every token sees all before it and itself; the last query sees the last key."""
    past = k.shape[2] - q.shape[2]
    if past == 0:
        with sdpa_kernel(FAST, set_priority=True):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=True)
    if q.is_cuda and torch.backends.cuda.can_use_cudnn_attention(
        torch.backends.cuda.SDPAParams(q, k, v, None, 0.0, False, True)
    ):
        return _two_parts(q, k, v, past, scale)
    bias = causal_lower_right(q.shape[2], k.shape[2])
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=scale, enable_gqa=True)


def _two_parts(q: Tensor, k: Tensor, v: Tensor, past: int, scale: float) -> Tensor:
    """Attention over the `past` keys, which every query sees, and over the chunk's own, put together by their sums.

    With p the weight that a softmax over all keys gives the past, p = sigmoid(log Σ_past - log Σ_own) and y = p y_past +
    (1 - p) y_own. PyTorch has cuDNN's causal attention for square shapes alone, and nearly twice as slow a one (flash, 354
    instead of 652 TFLOP/s on an H200 at 8192 queries of 65,536) for the others.
    """
    attend = torch.ops.aten._scaled_dot_product_cudnn_attention
    parts = [
        attend(q, keys, values, None, True, 0.0, causal, False, scale=scale)[:2]
        for keys, values, causal in ((k[:, :, :past], v[:, :, :past], False), (k[:, :, past:], v[:, :, past:], True))
    ]
    (before, log_before), (own, log_own) = [(y, log.view(*q.shape[:3], 1)) for y, log in parts]
    return torch.lerp(own, before, torch.sigmoid(log_before - log_own).to(own.dtype))


def engine_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    scaling: float,
    engine_cache: EngineCache,
    **_,
) -> tuple[Tensor, None]:
    """What Transformers calls: y [B,T,H,d] and no weights. `key` and `value` are what the cache returned for this layer."""
    cache = engine_cache
    if cache.decoding:
        start = cache.start[cache.rows] if cache.padded else None
        y = decode_attention(query[:, :, 0], key, value, end=cache.end, start=start, scale=scaling)
        return y[:, None], None
    start = cache.start[cache.rows] if cache.padded else None
    window = cache.layers[module.layer_idx].window
    y = prompt_attention(query, key, value, past=cache.n_seen, start=start, window=window, scale=scaling)
    return y.transpose(1, 2), None


AttentionInterface.register(NAME, engine_attention)
AttentionMaskInterface.register(NAME, lambda *_, **__: None)


@contextmanager
def engaged(model: PreTrainedModel):
    """The model's attention, and what `fused` replaces, is the engine's inside, and its own again behind."""
    before = model.config._attn_implementation
    model.config._attn_implementation = NAME
    try:
        with fused(model):
            yield
    finally:
        model.config._attn_implementation = before
