"""Speeds of published shapes on one GPU, at random weights: the engine, and Transformers' own generate, beside the floor.

Speed does not depend on what the numbers are. Weights and caches are therefore drawn, and a context of 256K tokens is there
without having been read. What does not fit is recorded as such, and the sweep goes on.
"""

import contextlib
import copy
import gc
import math
import statistics
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, LinearAttentionCacheLayerMixin

from jetlab.hf import JetNemotronCache
from jetlab.inference import memory, roofline
from jetlab.inference.engine import Engine
from jetlab.inference.requests import OVERHEAD_GB
from jetlab.models import zoo

COLUMNS = (
    "model runner phase context batch state tokens_per_s tokens_per_s_sd n ms bytes_per_step flops fraction_of_floor "
    "peak_gb cap_gb joules_per_token exact_error error own_error status"
).split()
N_STEPS = 16  # decoded tokens of a row in one timing
ROOM = 64  # tokens beyond the context that a cache has place for


@dataclass(frozen=True)
class Point:
    """One line of the record: `batch` None is the largest that fits into `cap_gb` at `up_to` tokens (None: at `context`).

    `state` is "bfloat16" or "float32".
    """

    model: str
    phase: str
    context: int
    batch: int | None = None
    up_to: int | None = None
    runner: str = "engine"
    state: str = "float32"
    cap_gb: float | None = None
    chunk: int = 8192
    repeats: int = 7


@torch.no_grad()
def draw_weights(model: PreTrainedModel, seed: int = 0) -> PreTrainedModel:
    """Weights of N(0, 0.02²), norms of one, everything else of zero, drawn where the model is: no start takes a minute."""
    rng = torch.Generator(device=model.device).manual_seed(seed)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=0.02, generator=rng)
        else:
            parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return model


def shape_of(name: str) -> zoo.Shape:
    """A published shape, or one derived from it: "Jet-Nemotron-2B 4 full" with full attention in place of its windows,
    "Jet-Nemotron-2B 128/192/12" with other widths of its blocks (key, value, heads)."""
    base, _, change = name.partition(" ")
    shape = zoo.shape(base)
    if not change:
        return shape
    if change == "4 full":
        kinds = tuple("attention" if kind == "sliding_attention" else kind for kind in shape.layer_kinds)
        return replace(shape, name=name, layer_kinds=kinds)
    key, value, heads = map(int, change.split("/"))
    linear = replace(shape.linear, n_heads=heads, head_dim=key, head_dim_v=value, generator_dim=heads * value // 8)
    return zoo.with_linear(shape, "jetblock", linear, name=name)


def build(name: str, device: str = "cuda") -> PreTrainedModel:
    """A model of `shape_of(name)` with drawn weights, in bf16."""
    base = name.partition(" ")[0]
    return draw_weights(zoo.build(base, device=device, random=False, derived=shape_of(name)))


@contextlib.contextmanager
def capped(cap_gb: float | None) -> Iterator[None]:
    """At most so many gigabytes for this process, `OVERHEAD_GB` for driver and kernels counted in; None: what the card has."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(
        1.0 if cap_gb is None else min(1.0, (cap_gb - OVERHEAD_GB) * 1e9 / total)
    )
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


def out_of_memory(error: Exception) -> bool:
    """Whether the card had no room: libraries and Triton say so in a RuntimeError of their own."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("out of memory", "ALLOC_FAILED"))
    )


def clean() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def seconds(call: Callable[[], object], repeats: int, warm_up: int = 1) -> list[float]:
    """Time of each call on the GPU, by events."""
    for _ in range(warm_up):
        call()
    found = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return found


def watts(call: Callable[[], object]) -> float | None:
    """Mean power of the card while `call` runs, as the driver reports it every 50 ms; None where it does not."""
    command = ["nvidia-smi", "--query-gpu=power.draw", "--format=csv,noheader,nounits", "-lms", "50", "-i", "0"]
    try:
        meter = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    except FileNotFoundError:
        return None
    lines: list[str] = []
    reader = threading.Thread(target=lambda: lines.extend(meter.stdout))
    reader.start()
    try:
        call()
        torch.cuda.synchronize()
    finally:
        meter.terminate()
        reader.join()
    found = []
    for line in lines[len(lines) // 4 :]:  # the first samples are of the time before
        with contextlib.suppress(ValueError):
            found.append(float(line))
    return statistics.mean(found) if found else None


def engine_for(model: PreTrainedModel, point: Point, batch: int) -> Engine:
    state = torch.bfloat16 if point.state == "bfloat16" else None
    return Engine(
        model,
        batch_size=batch,
        max_len=point.context + ROOM,
        prefill_chunk=point.chunk,
        prefill_tokens=point.chunk if point.phase == "prefill" else 1,
        state_dtype=state,
    )


def fits(model: PreTrainedModel, point: Point) -> Callable[[int], bool]:
    """Whether a decoding step runs at a batch: the engine is made, filled and asked for one."""

    def works(batch: int) -> bool:
        try:
            engine = engine_for(model, point, batch)
            engine.cache.fill(point.context)
            engine.step()
            torch.cuda.synchronize()
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            return False
        return True

    return works


def largest(model: PreTrainedModel, point: Point) -> int:
    """The largest batch that a decoding step runs at within `cap_gb`: the memory model's, then tried."""
    point = replace(point, context=point.up_to or point.context)
    length, state = point.context + ROOM, torch.bfloat16 if point.state == "bfloat16" else None
    fixed, one = (memory.engine_bytes(model, batch, length, point.chunk, state) for batch in (0, 1))
    estimate = int((memory.available_bytes(model.device) - fixed) / (one - fixed))
    return memory.largest_batch(fits(model, point), estimate)


def decode(model: PreTrainedModel, point: Point, batch: int) -> dict:
    """Tokens/s of `N_STEPS` steps at the end of a filled cache, and energy over 1.5 seconds of them."""
    engine = engine_for(model, point, batch)
    engine.cache.fill(point.context)

    def steps() -> None:
        engine.cache.seen(point.context)
        for _ in range(N_STEPS):
            engine.step()

    times = seconds(steps, point.repeats)
    many = max(1, math.ceil(1.5 / statistics.median(times)))
    power = watts(lambda: [steps() for _ in range(many)])
    return _speeds(times, batch * N_STEPS, 1e3 / N_STEPS, power)


def prefill(model: PreTrainedModel, point: Point, batch: int) -> dict:
    engine = engine_for(model, point, batch)
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, (batch, point.context), generator=rng).tolist()
    engine.prefill([prompt[: 2 * point.chunk] for prompt in prompts])  # the kernels of a first and of a later chunk
    times = seconds(lambda: engine.prefill(prompts), point.repeats, warm_up=0)
    return _speeds(times, batch * point.context, 1e3, None)


def generate(model: PreTrainedModel, point: Point, batch: int) -> dict:
    """Transformers' `generate` over its own growing cache, of which all but one token lie there already.

    Seconds are those of N_STEPS + 1 tokens without those of one: what comes before the first token is not decoding.
    """
    prompt = torch.ones(batch, point.context, dtype=torch.long, device=model.device)

    def tokens(n: int) -> float:
        cache = filled_cache(model, batch, point.context - 1)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        options = {"max_new_tokens": n, "min_new_tokens": n, "do_sample": False, "pad_token_id": 0}
        model.generate(prompt, past_key_values=cache, **options)
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3

    tokens(N_STEPS + 1)
    times = [tokens(N_STEPS + 1) - tokens(1) for _ in range(point.repeats)]
    return _speeds(times, batch * N_STEPS, 1e3 / N_STEPS, None)


def generate_one(model: PreTrainedModel, point: Point, batch: int) -> dict:
    """Reading a prompt by Transformers' `generate`: all of it at once, up to the first new token."""
    rng = torch.Generator().manual_seed(0)
    prompts = torch.randint(1000, (batch, point.context), generator=rng).to(model.device)
    options = {"max_new_tokens": 1, "min_new_tokens": 1, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(prompts)
    times = seconds(lambda: model.generate(prompts, **options), point.repeats)
    return _speeds(times, batch * point.context, 1e3, None)


def filled_cache(model: PreTrainedModel, batch: int, n_tokens: int):
    """The cache that `generate` would use, as if `n_tokens` random tokens had been read."""
    config = model.config
    jet = hasattr(config, "layer_kinds")
    cache = JetNemotronCache(config) if jet else DynamicCache(config=config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if config.model_type == "nemotron_h":  # two tokens make its states, whatever the text's length
        model(torch.ones(batch, 2, dtype=torch.long, device=model.device), past_key_values=cache, use_cache=True)
    for i, layer in enumerate(cache.layers):
        if isinstance(layer, LinearAttentionCacheLayerMixin | DummyLayer):
            continue
        if jet and config.layer_kinds[i] not in ("attention", "sliding_attention"):
            x = torch.zeros(batch, 1, config.hidden_size, dtype=model.dtype, device=model.device)
            with torch.no_grad():
                _, state = model.model.layers[i].self_attn(x)
            layer.update(state, n_tokens)
            continue
        length = min(n_tokens, config.sliding_window - 1) if layer.is_sliding else n_tokens
        shape = (batch, config.num_key_value_heads, length - layer.get_seq_length(), head_dim)
        keys, values = (torch.randn(shape, dtype=model.dtype, device=model.device) for _ in range(2))
        layer.update(keys, values)
        if layer.is_sliding:
            layer.cumulative_length = n_tokens
    return cache


def _speeds(times: list[float], n_tokens: int, to_ms: float, power: float | None) -> dict:
    speeds = [n_tokens / t for t in times]
    found = {"tokens_per_s": statistics.median(speeds), "tokens_per_s_sd": statistics.stdev(speeds), "n": len(times)}
    found["ms"] = to_ms * statistics.median(times)
    found["joules_per_token"] = None if power is None else power / found["tokens_per_s"]
    return found


RUNS = {
    ("engine", "decode"): decode,
    ("engine", "prefill"): prefill,
    ("transformers", "decode"): generate,
    ("transformers", "prefill"): generate_one,
}


def measure(model: PreTrainedModel, point: Point, bytes_per_s: float, flops_per_s: float) -> dict:
    """A line of the record; where memory does not suffice it has no speed and the status "out of memory"."""
    row = {"model": point.model, "runner": point.runner, "phase": point.phase, "context": point.context}
    row |= {"state": point.state, "cap_gb": point.cap_gb, "status": "ok"}
    shape = shape_of(point.model)
    clean()
    with capped(point.cap_gb), torch.inference_mode():
        batch = largest(model, point) if point.batch is None else point.batch
        found, tries = None, 1 if point.batch else 4  # a batch that ran once may not find its memory in one piece again
        while batch and found is None and tries:
            row["batch"], tries = batch, tries - 1
            clean()
            try:
                found = RUNS[point.runner, point.phase](model, point, batch)
            except (RuntimeError, MemoryError) as error:
                if not out_of_memory(error):
                    raise
                batch -= math.ceil(batch / 100) if tries else 0
        if found is None:
            clean()
            return row | {"status": "out of memory"}
        row |= found | {"peak_gb": torch.cuda.max_memory_allocated() / 1e9}
    size = 2 if point.state == "bfloat16" else 4
    if point.phase == "decode":
        seen = point.context + N_STEPS // 2
        row["bytes_per_step"] = roofline.decode_bytes(shape, seen, batch, state_bytes_per_value=size)
        row["flops"] = batch * roofline.decode_flops(shape, seen)
        floor = max(row["bytes_per_step"] / bytes_per_s, row["flops"] / flops_per_s)
    else:
        row["flops"] = batch * roofline.prefill_flops(shape, point.context)
        floor = row["flops"] / flops_per_s
    return row | {"fraction_of_floor": floor / (row["ms"] / 1e3)}


@torch.inference_mode()
def errors(model: PreTrainedModel, n_tokens: int = 1400, chunk: int = 512) -> dict[str, float]:
    """Largest relative errors of the engine's logits, against the model's own forward in fp32.

    exact_error   the engine in fp32: what it computes differently, if anything
    error         the engine in the model's format, own_error the model's own forward in it: what rounding costs both

    Three prompts of unequal length together, then the longest alone (no padding: another path), in chunks, two steps each. They
    are longer than the published windows.
    """
    rng = torch.Generator().manual_seed(1)
    rows = [torch.randint(1000, (n_tokens - n_tokens // 8 * i,), generator=rng).tolist() for i in range(3)]
    wide = copy.deepcopy(model).float()

    def own(model: PreTrainedModel) -> list[Tensor]:
        return [model(torch.tensor([row], device=model.device)).logits[0, -3:].float() for row in rows]

    exact = own(wide)

    def worst(actual: list[Tensor]) -> float:
        pairs = zip(actual, exact, strict=False)
        return max(((x - y).norm(dim=-1) / y.norm(dim=-1)).max().item() for x, y in pairs)

    def engine_error(model: PreTrainedModel) -> float:
        found = []
        for some in (rows, rows[:1]):
            engine = Engine(
                model, batch_size=len(some), max_len=n_tokens, prefill_chunk=chunk, prefill_tokens=2 * chunk
            )
            logits = [engine.prefill([row[:-2] for row in some]).clone()]
            for i in (-2, -1):
                logits.append(engine.step(torch.tensor([row[i] for row in some], device=model.device)).clone())
            found.append(worst([torch.stack([x[b] for x in logits]).float() for b in range(len(some))]))
        return max(found)

    return {"exact_error": engine_error(wide), "error": engine_error(model), "own_error": worst(own(model))}
