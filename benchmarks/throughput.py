"""Decoding and reading at 4K to 256K tokens on one GPU: published shapes, random weights, the engine and Transformers.

    python benchmarks/throughput.py --out records/h200/throughput [--part decode equal transformers …] [--models …]

Each model is checked first, the engine's logits in fp32 beside those of its own forward; one that disagrees is not timed.

decode        the largest batch in 80 GB (an H100's memory), and in all there is; Qwen3-1.7B, Qwen2.5-1.5B, Jet-Nemotron-2B
equal         the same batch for all at 64K, windows made full, states in bf16: where the ratio comes from
transformers  the library's own generate, at the paper's batches
prefill       one prompt, in chunks
others        Jet-Nemotron-4B, Llama, Gemma3 and Mamba2
grid          the nine settings of Table 2 as JetBlocks, three of them with half and twice the state and context
nano2         Nemotron Nano 2 (arXiv:2508.14444): its two settings of prompt and answer beside Qwen3-8B, in all memory and in
              that of the report's card, at one batch from the first answer token to the last; and 128K tokens in its budget

A line a point in a csv named as the folder (jetlab.inference.sweep.COLUMNS): tokens/s are medians over n timings with their
standard deviation, the floor is the longer of bytes at the speed of a copy and operations at that of a large product, both
measured first; peak_gb is what PyTorch held. `batch` was looked for where no batch is named here: the memory model's, then
tried. Lines are added as they come, so that parts can run one after another.
"""

import argparse
import csv
import json
import sys
import time
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import torch
import transformers

from jetlab.compress.budget import nano2_budget
from jetlab.inference import requests, sweep
from jetlab.inference.sweep import Point
from jetlab.paths import resolve
from kernels import ceilings

K = 1024
CONTEXTS = [4 * K, 8 * K, 16 * K, 32 * K, 64 * K, 128 * K, 256 * K]
QWEN3, QWEN25, JET = "Qwen3-1.7B-Base", "Qwen2.5-1.5B", "Jet-Nemotron-2B"
OTHERS = ["Jet-Nemotron-4B", "Llama-3.2-1B", "Llama-3.2-3B", "Gemma3-1B"]
H100_GB = 80.0
NANO_12B, NANO_9B, QWEN3_8B = "NVIDIA-Nemotron-Nano-12B-v2-Base", "NVIDIA-Nemotron-Nano-9B-v2", "Qwen3-8B"
# Of a prompt. 64K tokens take Jet-Nemotron-2B 0.56 s, in chunks of 16K 0.58 and of 8K 0.64; Qwen3-1.7B 1.39, 1.41, 1.42.
CHUNK = 32 * K
ALLOWED = 1e-2  # of logits in fp32
with resolve("paper/table2_hardware_aware_search.csv").open(encoding="utf-8") as lines:
    TABLE_2 = [tuple(int(row[name]) for name in ("d_k", "d_v", "n_heads")) for row in csv.DictReader(lines)]


def points(part: str) -> list[Point]:
    if part == "decode":
        rows = [Point(model, "decode", n, cap_gb=H100_GB) for model in (QWEN3, QWEN25, JET) for n in CONTEXTS]
        rows += [Point(model, "decode", n) for model in (QWEN3, QWEN25, JET) for n in (64 * K, 256 * K)]
        return rows + [Point(JET, "decode", n, batch=128) for n in (64 * K, 256 * K)]
    if part == "equal":
        variants = [(QWEN3, "float32"), (QWEN25, "float32"), (f"{JET} 4 full", "float32"), (JET, "float32")]
        rows = [Point(model, "decode", 64 * K, batch=8, state=state) for model, state in [*variants, (JET, "bfloat16")]]
        rows += [Point(f"{JET} 4 full", "decode", 64 * K, cap_gb=H100_GB)]
        return rows + [Point(JET, "decode", n, cap_gb=H100_GB, state="bfloat16") for n in (4 * K, 64 * K, 256 * K)]
    if (
        part == "transformers"
    ):  # batches of Table 11 and of the released commands; where they do not fit, the line says so
        batches = [(QWEN3, 4 * K, 128), (QWEN3, 64 * K, 8), (QWEN3, 256 * K, 2), (QWEN25, 64 * K, 32)]
        batches += [(JET, 4 * K, 128), (JET, 64 * K, 128), (JET, 256 * K, 64)]
        rows = [Point(model, "decode", n, batch, runner="transformers") for model, n, batch in batches]
        return rows + [Point(m, "prefill", 64 * K, 1, runner="transformers", repeats=3) for m in (QWEN3, QWEN25, JET)]
    if part == "prefill":
        return [
            Point(model, "prefill", n, batch=1, chunk=CHUNK, repeats=7 if n <= 32 * K else 3 if n <= 64 * K else 2)
            for model in (QWEN3, QWEN25, JET)
            for n in CONTEXTS
        ]
    if part == "others":
        rows = [Point(m, "decode", n, cap_gb=H100_GB) for m in OTHERS for n in (4 * K, 16 * K, 64 * K, 256 * K)]
        rows += [Point("Mamba2-2.7B", "decode", 64 * K, batch=batch, chunk=64) for batch in (16, 128)]
        return [*rows, Point("Jet-Nemotron-4B", "prefill", 64 * K, batch=1, chunk=CHUNK, repeats=3)]
    if part == "nano2":
        budget = nano2_budget()
        card, room = requests.CARD_GB, round(budget.n_bytes / 1e9 + requests.OVERHEAD_GB, 2)
        rows = [Point(m, phase, budget.context - sweep.ROOM, 1, cap_gb=room, chunk=K, repeats=2)
                for m in (NANO_12B, NANO_9B) for phase in ("prefill", "decode")]  # fmt: skip
        for prompt, answer in requests.SETTINGS:
            for model, cap in [(m, cap) for m in (NANO_9B, QWEN3_8B) for cap in (None, card)]:
                size = {"cap_gb": cap, "chunk": 2 * K if cap else 8 * K}
                contexts = requests.contexts(prompt, answer)
                rows += [Point(model, "decode", n, up_to=contexts[-1], **size) for n in reversed(contexts)]
                rows += [Point(model, "prefill", prompt, 4 if cap is None else 1, repeats=3, **size)]
        for model, batch in ((NANO_9B, 32), (QWEN3_8B, 16)):
            middle = requests.contexts(*requests.SETTINGS[0])[1]
            rows += [
                Point(model, "decode", middle, batch, runner=runner, repeats=3) for runner in ("engine", "transformers")
            ]
        return rows
    settings = [f"{key}/{value}/{heads}" for key, value, heads in TABLE_2]
    rows = [Point(f"{JET} {setting}", "decode", 64 * K, batch=128) for setting in settings]
    for key, value, heads in (TABLE_2[0], (96, 256, 12), TABLE_2[-1]):
        rows += [Point(f"{JET} {key}/{v}/{heads}", "decode", 64 * K, batch=128) for v in (value // 2, 2 * value)]
        rows += [Point(f"{JET} {key}/{value}/{heads}", "decode", n, batch=128) for n in (32 * K, 128 * K)]
    return rows


def text(value) -> object:
    return f"{value:.5g}" if isinstance(value, float) else "" if value is None else value


def main() -> None:
    parts = ["decode", "equal", "transformers", "prefill", "others", "grid", "nano2"]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--part", nargs="+", choices=parts, default=parts[:-1])
    parser.add_argument("--models", nargs="+", help="only these, by the name in the record")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/throughput.py measures on a CUDA device, and PyTorch sees none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    transformers.utils.logging.set_verbosity_error()
    began = time.perf_counter()
    ceiling = ceilings()
    bytes_per_s, flops_per_s = ceiling["bytes_per_s"], ceiling["flops_per_s"]
    torch.cuda.empty_cache()
    print(f"copy {bytes_per_s / 1e12:.2f} TB/s, product {flops_per_s / 1e12:.0f} TFLOP/s", flush=True)
    file = arguments.out / f"{arguments.out.name}.csv"
    new = not file.exists()
    wanted = {point: None for part in arguments.part for point in points(part)}  # each once, in order
    with file.open("a", newline="") as stream:
        writer = csv.DictWriter(stream, sweep.COLUMNS, lineterminator="\n")
        if new:
            writer.writeheader()
        for name, some in groupby(sorted(wanted, key=lambda point: point.model), key=lambda point: point.model):
            if arguments.models and name not in arguments.models:
                continue
            sweep.clean()
            model = sweep.build(name)
            errors = sweep.errors(model)
            print(f"[{time.perf_counter() - began:4.0f} s] {name}: {errors}", flush=True)
            if errors["exact_error"] < ALLOWED:
                found: dict = {}  # batches that fit up to a length: the same for all contexts below it
                for point in some:
                    size = (point.up_to, point.cap_gb, point.state)
                    if point.batch is None and size in found:
                        point = replace(point, batch=found[size])
                    row = sweep.measure(model, point, bytes_per_s, flops_per_s) | errors
                    if point.up_to and row["status"] == "ok":
                        found[size] = row["batch"]
                    writer.writerow({column: text(row.get(column)) for column in sweep.COLUMNS})
                    stream.flush()
                    line = " ".join(str(text(row.get(column))) for column in sweep.COLUMNS)
                    print(f"[{time.perf_counter() - began:4.0f} s] {line}", flush=True)
            else:
                print(f"{name}: in fp32 the engine's logits are off by more than {ALLOWED}: not timed", flush=True)
            del model
    import triton

    versions = {"torch": torch.__version__, "triton": triton.__version__, "transformers": transformers.__version__}
    environment = {"device": torch.cuda.get_device_name()} | versions
    environment |= {"bytes_per_s": float(f"{bytes_per_s:.4g}"), "flops_per_s": float(f"{flops_per_s:.4g}")}
    (arguments.out / "environment.json").write_text(json.dumps(environment, indent=2) + "\n")
    with (arguments.out / "command.txt").open("a") as commands:
        commands.write("python " + " ".join(sys.argv) + "\n")


if __name__ == "__main__":
    main()
