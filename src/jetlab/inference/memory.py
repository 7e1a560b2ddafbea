"""What an engine takes of a device's memory, and the largest batch that fits: first in closed form, then tried."""

import gc
from collections.abc import Callable

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from jetlab.inference import mamba2
from jetlab.inference.cache import ATTENTION_KINDS, layer_kinds
from jetlab.layers.dims import BlockDims


def kv_bytes(config, max_len: int, dtype: torch.dtype) -> int:
    """Keys and values of one sequence: 2 · Hkv · d · bytes · Σ_layers min(max_len, window)."""
    kinds = layer_kinds(config)
    if not set(kinds) & set(ATTENTION_KINDS):
        return 0
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    slots = sum(max_len for kind in kinds if kind == "attention")
    slots += sum(min(max_len, config.sliding_window) for kind in kinds if kind == "sliding_attention")
    return 2 * config.num_key_value_heads * head_dim * dtype.itemsize * slots


def state_bytes(model: PreTrainedModel, state_dtype: torch.dtype | None = None) -> int:
    """States of one sequence in all recurrent layers, the columns that convolutions carry included."""
    config = model.config
    if config.model_type in mamba2.MODELS:
        n_layers = layer_kinds(config).count("mamba2")
        return n_layers * mamba2.Mamba2Widths.of(config).state_bytes(model.dtype, state_dtype)
    total = 0
    for layer, kind in zip(getattr(model.model, "layers", ()), layer_kinds(config), strict=True):
        if kind in ATTENTION_KINDS:
            continue
        mixer: nn.Module = layer.self_attn
        total += mixer.state_bytes(1, model.dtype)
        dims: BlockDims | None = getattr(mixer, "dims", None)
        if state_dtype is not None and dims is not None:
            total += (state_dtype.itemsize - max(4, model.dtype.itemsize)) * dims.state_size
    return total


def activation_bytes(model: PreTrainedModel, n_tokens: int) -> int:
    """About what reading `n_tokens` tokens at once takes beside the cache: (5 d_ff + 24 d_model) numbers a token, or what a
    Mamba2 layer of Transformers takes if that is more."""
    config = model.config
    d_ff = getattr(config, "intermediate_size", None) or 2 * config.hidden_size
    token = (5 * d_ff + 24 * config.hidden_size) * model.dtype.itemsize
    if config.model_type in mamba2.MODELS:
        token = max(token, mamba2.Mamba2Widths.of(config).activation_bytes(config.hidden_size, model.dtype))
    return n_tokens * token


def engine_bytes(
    model: PreTrainedModel,
    batch_size: int,
    max_len: int,
    n_tokens: int,
    state_dtype: torch.dtype | None = None,
    *,
    n_rows: int = 1,
) -> int:
    """What an engine takes beside the weights: cache and states of its rows, a prompt's activations, three sets of logits.

    `n_tokens` of `n_rows` rows are read at once: a Mamba2 layer of Transformers has their states twice more meanwhile, and
    the model's logits come in fp32 too. Drawing tokens by `top_p` sorts, which takes about 20 bytes more for each row and
    token of the vocabulary meanwhile.
    """
    row = kv_bytes(model.config, max_len, model.dtype) + state_bytes(model, state_dtype)
    row += 3 * model.config.vocab_size * model.dtype.itemsize
    fixed = activation_bytes(model, n_tokens)
    if model.config.model_type in mamba2.MODELS:
        row += 4 * model.config.vocab_size
        fixed += n_rows * 2 * mamba2.Mamba2Widths.of(model.config).state_bytes(model.dtype, None)
    return batch_size * row + fixed


def available_bytes(device: torch.device) -> int:
    """What this process may still take: on a GPU within torch.cuda.set_per_process_memory_fraction."""
    if device.type != "cuda":
        return psutil.virtual_memory().available
    free, total = torch.cuda.mem_get_info(device)
    allocated, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
    allowed = torch.cuda.get_per_process_memory_fraction(device) * total - allocated
    return int(min(free + reserved - allocated, allowed))


def check(need: Callable[[int], int], device: torch.device, batch_size: int, max_len: int) -> None:
    """Raises MemoryError if the `need` of a batch is not there: both numbers of bytes, and the largest batch that fits."""
    there = available_bytes(device)
    if need(batch_size) <= there:
        return
    fits = _last_that(lambda batch: need(batch) <= there, 0, batch_size)
    raise MemoryError(
        f"an engine for {batch_size} sequences of {max_len} tokens needs {need(batch_size):,} bytes beside the weights, "
        f"{there:,} are there; the largest batch that fits is {fits}"
        + ("" if fits else ", so shorten the context, or prefill_chunk, or take a larger device")
    )


def largest_batch(works: Callable[[int], bool], estimate: int, *, step: float = 0.02) -> int:
    """The largest batch for which `works(batch)` holds, which must then hold for all smaller ones; 0 if none does.

    Walks from the estimate by `step` of it until the answer changes, then halves what is between. `works` must leave no
    memory taken.
    """

    def tried(batch: int) -> bool:
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return works(batch)

    batch, stride = max(1, estimate), max(1, round(step * estimate))
    if tried(batch):
        while tried(batch + stride):
            batch += stride
        return _last_that(tried, batch, batch + stride)
    while batch > stride and not tried(batch - stride):
        batch -= stride
    return _last_that(tried, max(0, batch - stride), batch)


def _last_that(holds: Callable[[int], bool], low: int, high: int) -> int:
    """The last number from `low`, which counts as held, to `high`, which does not, that holds."""
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low
