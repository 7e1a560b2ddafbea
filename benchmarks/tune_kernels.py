"""Which tiles, warps and depth of prefetching make each Triton kernel fastest on this GPU.

    python benchmarks/tune_kernels.py --out records/h100/kernels [--only scan gradients …] [--repeats 20]

Tries a handful of settings of each kernel, one kernel at a time with all others at what is shipped, at the published shapes,
and writes tuning.csv: kernel, shape, setting, ms of the whole call, and the largest relative difference of its results from
those of the shipped setting, which a wrong setting would show. A setting that the GPU has no room for is written without a
time. What is chosen is entered by hand at the top of the kernel's file, with the times that chose it.
"""

import argparse
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from unittest import mock

import torch
from triton.runtime.errors import OutOfResources

from jetlab_kernels import dynamic_conv, gated_delta_rule, gated_rms_norm, jetblock_step
from kernels import (
    JET_2B,
    convolution,
    evaluate,
    milliseconds,
    norm,
    recurrence,
    relative_error,
    step,
    step_inputs,
    write,
)

COLUMNS = ["kernel", "shape", "setting", "ms", "difference", "shipped"]


def settings(**choices: tuple) -> list[dict]:
    return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]


def tiles(names: str, *choices: tuple) -> list[dict]:
    return [dict(zip(names.split(), choice, strict=True)) for choice in choices]


SCANS = tiles("BV STAGES num_warps", (32, 3, 4), (32, 2, 4), (64, 3, 4), (64, 2, 4), (64, 1, 4), (128, 2, 8))
CONV = "BM BC BR STAGES num_warps"
# Name: where the setting stands, what to try, the cases, and whether the call goes back too.
KERNELS: dict[str, tuple] = {
    "scan": (gated_delta_rule, "SCAN", SCANS, ["delta", "long", "attention"], False),
    "scan_back": (gated_delta_rule, "SCAN_BACK", SCANS, ["delta", "attention"], True),
    "scan_large": (
        gated_delta_rule,
        "SCAN_LARGE",
        tiles("BV STAGES num_warps", (32, 2, 4), (32, 1, 4), (64, 2, 8), (64, 1, 8), (16, 2, 4)),
        ["wide"],
        False,
    ),
    "gradients": (
        gated_delta_rule,
        "GRADIENTS",
        tiles("BV STAGES num_warps", (64, 3, 8), (64, 2, 8), (32, 4, 8), (32, 3, 8), (64, 2, 4)),
        ["delta", "attention"],
        True,
    ),
    "gradients_large": (
        gated_delta_rule,
        "GRADIENTS_LARGE",
        tiles("BV STAGES num_warps", (32, 2, 8), (32, 3, 8), (64, 2, 8)),
        ["wide"],
        True,
    ),
    "forward": (
        dynamic_conv,
        "FORWARD",
        tiles(
            CONV, (128, 64, 64, 3, 8), (128, 64, 64, 2, 8), (128, 64, 32, 4, 8), (128, 32, 64, 3, 4), (64, 32, 64, 3, 4)
        ),
        ["conv"],
        False,
    ),
    "values": (
        dynamic_conv,
        "VALUES",
        tiles(CONV, (128, 64, 64, 3, 8), (128, 64, 64, 2, 8), (128, 32, 64, 3, 4), (64, 32, 64, 3, 4)),
        ["conv"],
        True,
    ),
    "hidden": (
        dynamic_conv,
        "HIDDEN",
        tiles(CONV, (128, 32, 128, 3, 8), (128, 32, 128, 2, 8), (128, 64, 128, 2, 8), (128, 16, 256, 3, 8)),
        ["conv"],
        True,
    ),
    "weight": (
        dynamic_conv,
        "WEIGHT",
        tiles(
            CONV + " SPLIT",
            (64, 64, 128, 3, 8, 4),
            (64, 64, 128, 3, 8, 2),
            (64, 64, 128, 3, 8, 8),
            (64, 32, 128, 3, 4, 4),
            (128, 32, 128, 3, 8, 4),
        ),
        ["conv"],
        True,
    ),
}


def cases() -> dict[str, Callable]:
    return {
        "delta": lambda: recurrence(4, 4096, 12, 96, 256, delta=True),
        "long": lambda: recurrence(1, 32768, 12, 96, 256, delta=True),
        "wide": lambda: recurrence(4, 4096, 4, 256, 288, delta=True),
        "attention": lambda: recurrence(4, 4096, 12, 128, 128, delta=False),
        "conv": lambda: convolution(4, 4096, 3072, 384),
        "norm": lambda: norm(4, 4096, 12, 256),
    }


def attempt(call: Callable[[], list[torch.Tensor]], expected: list[torch.Tensor] | None, repeats: int):
    """The results of a setting, its time, and how far the results are from `expected`; nothing where there is no room."""
    try:
        results = call()
        ms = milliseconds(call, repeats)
    except OutOfResources:
        return None, None, None
    difference = max(relative_error(x, y) for x, y in zip(results, expected or results, strict=True))
    return results, ms, difference


def tune(name: str, repeats: int) -> list[dict]:
    """Times of every setting of one kernel, the shipped one first."""
    module, table, choices, wanted, backward = KERNELS[name]
    rows = []
    for label in wanted:
        case = cases()[label]()
        upstream = [torch.randn_like(y) for y in evaluate(case, "triton", None)] if backward else None
        expected = None
        shipped = dict(getattr(module, table))
        for setting in [shipped, *(choice for choice in choices if choice != shipped)]:
            with mock.patch.dict(getattr(module, table), setting):
                results, ms, difference = attempt(
                    lambda case=case, up=upstream: evaluate(case, "triton", up), expected, repeats
                )
            expected = expected or results
            rows.append(line(name, case.shape, setting, ms, difference, setting == shipped))
        del expected
        torch.cuda.empty_cache()
    return rows


def tune_step(repeats: int) -> list[dict]:
    """Settings of the decoding step at each batch, by replays of a graph over sets that exceed the cache."""
    H, K, V, W = JET_2B.n_heads, JET_2B.head_dim, JET_2B.head_dim_v, JET_2B.conv_size
    rows = []
    for state_dtype in (torch.float32, torch.bfloat16):
        for B in (1, 16, 128, 256):
            n_sets = max(2, int(2e8 // (B * H * K * V * state_dtype.itemsize)))
            sets = [step_inputs(B, H, K, V, W, state_dtype, seed) for seed in range(n_sets)]
            chosen = jetblock_step.MANY if B * H > jetblock_step.FEW_HEADS else jetblock_step.FEW
            shipped, expected = dict(chosen), step("triton", **sets[0])
            for setting in settings(BV=(32, 64, 128, 256), num_warps=(2, 4)):
                with mock.patch.dict(chosen, setting):
                    results, _ = (step("triton", **x) for x in sets[:2])
                    difference = max(relative_error(x, y) for x, y in zip(results, expected, strict=True))
                    torch.cuda.synchronize()
                    graph = torch.cuda.CUDAGraph()
                    with torch.cuda.graph(graph):
                        outputs = [step("triton", **x) for x in sets]
                ms = milliseconds(graph.replay, repeats) / n_sets
                shape = f"{B}x{H}x{K}x{V} {str(state_dtype).removeprefix('torch.')}"
                rows.append(line("jetblock_step", shape, setting, ms, difference, setting == shipped))
                del outputs, graph
    return rows


def tune_norm(repeats: int) -> list[dict]:
    case, rows = cases()["norm"](), []
    upstream = [torch.randn_like(y) for y in evaluate(case, "triton", None)]
    shipped = {name: getattr(gated_rms_norm, name) for name in ("ROWS", "TILES", "N_WARPS")}
    expected = None
    for setting in [shipped, *settings(ROWS=(4, 8, 16), TILES=(8, 32), N_WARPS=(4, 8))]:
        with mock.patch.multiple(gated_rms_norm, **setting):
            results, ms, difference = attempt(lambda: evaluate(case, "triton", upstream), expected, repeats)
        expected = expected or results
        rows.append(line("gated_rms_norm", case.shape, setting, ms, difference, setting == shipped))
    return rows


def line(kernel: str, shape: str, setting: dict, ms: float | None, difference: float | None, shipped: bool) -> dict:
    text = " ".join(f"{name}={value}" for name, value in sorted(setting.items()))
    shown = "no room" if ms is None else f"{ms:.3f} ms"
    print(f"{kernel:14} {shape:28} {text:55} {shown}{' (shipped)' * shipped}", flush=True)
    values = (kernel, shape, text, ms, difference, "yes" if shipped else "no")
    return dict(zip(COLUMNS, values, strict=True))


def main() -> None:
    names = [*KERNELS, "step", "norm"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=20, help="timed calls of each setting (default 20)")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/tune_kernels.py measures on a CUDA device, and PyTorch sees none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    for name in arguments.only:
        special = {"step": tune_step, "norm": tune_norm}
        rows += special[name](arguments.repeats) if name in special else tune(name, arguments.repeats)
        write(arguments.out / "tuning.csv", rows, COLUMNS)


if __name__ == "__main__":
    main()
