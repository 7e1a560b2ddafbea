"""Throughput of whole requests, a prompt read and an answer written, from the record of benchmarks/throughput.py.

A request of P prompt and A answer tokens takes its share of a batch of b, all of which fit up to P + A tokens:

    T = b · P / r + A · (t(P) + 4 t(P + A/2) + t(P + A)) / 6                 b · A / T answer tokens a second

with r the tokens/s of reading and t the seconds of a decoding step. Simpson's rule is exact where a step grows linearly with
the context. This is the setting of arXiv:2508.14444, Fig 1; its server joins new requests to running ones, ours does not.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from jetlab.inference import roofline
from jetlab.inference.roofline import DEVICES, Device
from jetlab.inference.speeds import find, floor_tokens_per_s, same_cap
from jetlab.models.zoo import Shape

K = 1024
CARD_GB = round(DEVICES["A10G"].memory / 1e9, 2)  # the report's card, as a cap in the record
OVERHEAD_GB = 1.0  # of a card's memory that driver and kernels take: 4 % of this one, of which the report takes off 5
USABLE_GB = CARD_GB - OVERHEAD_GB
SETTINGS = ((8 * K, 16 * K), (1 * K, 8 * K))  # prompt and answer, tokens


@dataclass(frozen=True)
class Request:
    """`batch` sequences side by side: seconds to read their prompts and to write their answers, and of both what the
    machine of the record cannot beat."""

    batch: int
    prefill_s: float
    decode_s: float
    floor_s: float
    n_answer: int
    relative_error: float  # one standard error of the seconds, within one run

    @property
    def tokens_per_s(self) -> float:
        """Answer tokens a second."""
        return self.batch * self.n_answer / (self.prefill_s + self.decode_s)

    @property
    def fraction_of_floor(self) -> float:
        return self.floor_s / (self.prefill_s + self.decode_s)


def contexts(n_prompt: int, n_answer: int) -> tuple[int, int, int]:
    """Where a decoding step is timed: at the beginning, in the middle and at the end of the answer."""
    return n_prompt, n_prompt + n_answer // 2, n_prompt + n_answer


def request(
    rows: Iterable[Mapping], model: str, n_prompt: int, n_answer: int, *, cap_gb: float | None = None
) -> Request | None:
    """The request of `model` in the engine, at the largest batch within `cap_gb`; None where the record lacks a line of it."""
    rows = list(rows)
    last = find(rows, model, n_prompt + n_answer, cap_gb=cap_gb)
    if last is None:
        return None
    batch = last["batch"]
    within = [row for row in rows if same_cap(row["cap_gb"], cap_gb)]
    steps = [find(within, model, n, batch=batch) for n in contexts(n_prompt, n_answer)]
    reading = find(within, model, n_prompt, phase="prefill")
    if reading is None or None in steps:
        return None

    step_s = [batch / row["tokens_per_s"] for row in steps]
    prefill_s, decode_s = batch * n_prompt / reading["tokens_per_s"], _simpson(step_s, n_answer)
    floor = batch * n_prompt / floor_tokens_per_s(reading)
    floor += _simpson((batch / floor_tokens_per_s(row) for row in steps), n_answer)
    errors = [_relative_error(row) for row in steps]
    shares = [n_answer * weight * s / 6 * error for weight, s, error in zip((1, 4, 1), step_s, errors, strict=True)]
    spread = math.hypot(*shares, prefill_s * _relative_error(reading))
    return Request(batch, prefill_s, decode_s, floor, n_answer, spread / (prefill_s + decode_s))


def floor_s(shape: Shape, device: Device, n_prompt: int, n_answer: int, *, batch: int) -> tuple[float, float]:
    """Least seconds in which a device reads the prompts of a batch, and in which it writes their answers."""
    reading = batch * roofline.prefill_flops(shape, n_prompt) / device.flops
    steps = (roofline.decode_floor_s(shape, n, batch, device) for n in contexts(n_prompt, n_answer))
    return reading, _simpson(steps, n_answer)


def ratio(over: Request, under: Request) -> tuple[float, float]:
    """Answer tokens a second of one request over those of another, and its standard error within one run."""
    value = over.tokens_per_s / under.tokens_per_s
    return value, value * math.hypot(over.relative_error, under.relative_error)


def _simpson(seconds: Iterable[float], n_steps: int) -> float:
    return n_steps * math.fsum(weight * s for weight, s in zip((1, 4, 1), seconds, strict=True)) / 6


def _relative_error(row: Mapping) -> float:
    """Of a median of n timings, as `speeds.ratio` takes it."""
    return 1.25 * row["tokens_per_s_sd"] / math.sqrt(row["n"]) / row["tokens_per_s"]
