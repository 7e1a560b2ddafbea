"""What the record of benchmarks/throughput.py says: ratios, where they come from, and what a roofline makes of them.

A row is a line of throughput.csv. The floor of a row is its speed over its `fraction_of_floor`, on the machine of the record:
while decoding the longer of bytes at the speed of a copy and operations at that of a large product, for a prompt operations.
"""

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence

from jetlab.inference import roofline
from jetlab.models import zoo

QWEN3, QWEN25, JET = "Qwen3-1.7B-Base", "Qwen2.5-1.5B", "Jet-Nemotron-2B"
WINDOWLESS = f"{JET} 4 full"
FITTED_UP_TO = 16_384  # tokens of context
PREDICTED_FROM = 32_768


def find(
    rows: Iterable[Mapping],
    model: str,
    context: int,
    *,
    phase: str = "decode",
    runner: str = "engine",
    state: str = "float32",
    batch: int | None = None,
    cap_gb: float | None = None,
) -> Mapping | None:
    """The row of a point: at `batch`, or the largest batch within `cap_gb` (None: in all the memory there was).

    None where the record has no such line, or one without a speed.
    """
    wanted = {"model": model, "context": context, "phase": phase, "runner": runner, "state": state}
    found = [row for row in rows if all(row[name] == value for name, value in wanted.items()) and row["status"] == "ok"]
    if batch is not None:
        found = [row for row in found if row["batch"] == batch]
    elif phase == "decode":
        found = [row for row in found if same_cap(row["cap_gb"], cap_gb)]
    return max(found, key=lambda row: row["batch"], default=None)


def ratio(over: Mapping, under: Mapping) -> tuple[float, float]:
    """Speed of one row over that of another, and its standard error within one run.

    The error of a median of n timings is taken as 1.25 standard deviations / √n, its value for many; relative errors add in
    squares. What another run or machine would give is not in it.
    """
    value = over["tokens_per_s"] / under["tokens_per_s"]
    relative = [1.25 * row["tokens_per_s_sd"] / math.sqrt(row["n"]) / row["tokens_per_s"] for row in (over, under)]
    return value, value * math.hypot(*relative)


def floor_tokens_per_s(row: Mapping) -> float:
    """What the machine of the record cannot pass at this row's model, context and batch."""
    return row["tokens_per_s"] / row["fraction_of_floor"]


def steps(rows: Sequence[Mapping], context: int, *, batch: int | None, cap_gb: float | None = 80.0) -> list[dict]:
    """From Transformers' Qwen3-1.7B to Jet-Nemotron-2B at `context`, one change at a time: {step, row, factor, floor}.

    `batch` is the same for all, or None for the largest of each within `cap_gb`; Transformers stays at the batch that the
    paper ran (Table 11) or, with a `batch`, at that one. `factor` is the gain over the step before, `floor` the same gain
    between their floors. Points that the record lacks are left out.
    """
    size = {"batch": batch, "cap_gb": cap_gb}
    library = batch if batch is not None else {65_536: 8, 262_144: 2}.get(context)
    points = [
        ("Qwen3-1.7B, Transformers", find(rows, QWEN3, context, runner="transformers", batch=library)),
        ("the same in the engine", find(rows, QWEN3, context, **size)),
        ("2 key-value heads for 8 (Qwen2.5-1.5B)", find(rows, QWEN25, context, **size)),
        ("24 of 28 layers JetBlocks", find(rows, WINDOWLESS, context, **size)),
        ("2 of the other 4 windows", find(rows, JET, context, **size)),
        ("states in bf16", find(rows, JET, context, state="bfloat16", **size)),
    ]
    found, before = [], None
    for name, row in points:
        if row is None:
            continue
        factor = floor = 1.0
        if before is not None:
            factor = row["tokens_per_s"] / before["tokens_per_s"]
            floor = floor_tokens_per_s(row) / floor_tokens_per_s(before)
        found.append({"step": name, "row": row, "factor": factor, "floor": floor})
        before = row
    return found


def efficiency(rows: Iterable[Mapping], *, up_to: int = FITTED_UP_TO) -> float:
    """One number for a machine: the median fraction of the floor at which the engine decodes contexts of at most `up_to`.

    Rows at the largest batch within a cap alone. Raises ValueError if there are none.
    """
    fractions = [row["fraction_of_floor"] for row in _largest(rows) if row["context"] <= up_to]
    if not fractions:
        raise ValueError(f"an efficiency needs decoding rows up to {up_to} tokens at the largest batch, got none")
    return statistics.median(fractions)


def predictions(rows: Sequence[Mapping], share: float, *, start: int = PREDICTED_FROM) -> list[dict]:
    """Speeds at contexts of at least `start` as floor · `share` beside the measured ones: {model, context, batch, …, gap}.

    gap = predicted / measured - 1.
    """
    return [
        {name: row[name] for name in ("model", "context", "batch", "cap_gb")}
        | {"measured": row["tokens_per_s"], "predicted": share * floor_tokens_per_s(row)}
        | {"gap": share / row["fraction_of_floor"] - 1}
        for row in _largest(rows)
        if row["context"] >= start
    ]


def elsewhere(device: str, context: int, share: float, *models: str) -> dict[str, float]:
    """Predicted tokens/s of published shapes on another device at their largest batch: its floor · `share`."""
    found = roofline.DEVICES[device]
    return {name: share * roofline.decode_tokens_per_s(zoo.shape(name), context, found) for name in models}


def _largest(rows: Iterable[Mapping]) -> list[Mapping]:
    """Decoding rows of published models in the engine at the largest batch within a cap, states in fp32."""
    wanted = ("engine", "decode", "float32", "ok")
    return [
        row
        for row in rows
        if (row["runner"], row["phase"], row["state"], row["status"]) == wanted
        and not _absent(row["cap_gb"])
        and " " not in row["model"]
    ]


def _absent(value: float | None) -> bool:
    return value is None or math.isnan(value)


def same_cap(value: float | None, wanted: float | None) -> bool:
    """Whether a line's `cap_gb` is this one; None, or nan in a table, is all the memory there was."""
    return _absent(value) if wanted is None else value == wanted
