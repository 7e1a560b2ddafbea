"""Training steps on text at true size, on 1 … all GPUs of this machine: jetlab.train.text on random weights and tokens.

    python benchmarks/training.py --out records/h200-x2 [--model Qwen2.5-1.5B] [--steps 8]

paths    the JetBlocks of a hybrid with two full layers, end to end, everything else frozen (Sec 3.1, stage 1)
local    the same, each on its own
weights  all weights of that hybrid (stage 2)

Each in bfloat16 with the same rows on every number of processes, whose first losses must agree; `plain` is the peer: one
GPU, the same loss, autocast instead of shards. A line of training.csv: tokens/s over all GPUs from the median step of
`--steps` with its standard deviation, operations of the model (jetlab.preflight) per GPU and second and their share of
what a large product reaches here, the speed-up over one process, the most memory of a GPU.
"""

import argparse
import csv
import json
import os
import statistics
import subprocess
import sys
import time

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from jetlab import preflight
from jetlab.config import Training
from jetlab.data.corpus import Row
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery, zoo
from jetlab.paths import resolve
from jetlab.train.loop import adamw, stepper
from jetlab.train.paths import placement_kinds
from jetlab.train.ranks import shard, started
from jetlab.train.text import PathStep, WeightsStep, accumulated
from kernels import ceilings

COLUMNS = (
    *(
        "model",
        "work",
        "device",
        "processes",
        "how",
        "recompute",
        "seq_len",
        "rows_per_step",
        "rows_at_once",
        "n",
        "step_s",
        "step_s_sd",
    ),
    *("tokens_per_s", "model_tflops_per_gpu", "share_of_peak", "speed_up", "peak_gb", "first_loss"),
)
SEQ_LEN, ROWS, AT_ONCE, DOCUMENT = 4096, 16, 4, 700  # mean tokens of a document
FULL = (14, 19)  # of Jet-Nemotron-2B, counted from 0
DIMS = {"n_heads": 12, "head_dim": 96, "head_dim_v": 256}
CASES = (  # work, how, recompute; sharded ones on every number of processes
    ("paths", "sharded", False),
    ("weights", "sharded", False),
    ("paths", "plain", False),
    ("local", "sharded", False),
    ("paths", "sharded", True),
)
ALLOWED = 1e-3  # between first losses on one process and several: bfloat16 products of the same numbers
SETTINGS = {
    **{"n_local": 1, "n_steps": 1, "learning_rate": 1.0e-4, "warmup": 1, "feature_weight": 2.0, "logit_weight": 1.0},
    **{"rows": {}, "weights": {}, "growth": 0.0},
}


class Rows:
    """Random tokens in place of a corpus: row g of a step is the same whoever reads it."""

    def __init__(self, vocab_size: int, rank: int, world_size: int):
        self.vocab_size, self.mine = vocab_size, range(rank, ROWS, world_size)

    def rows(self, step: int) -> list[Row]:
        return [self._row(step, g) for g in self.mine]

    def _row(self, step: int, g: int) -> Row:
        draw = torch.Generator().manual_seed(1000 * step + g)
        ends = (torch.rand(4 * SEQ_LEN // DOCUMENT, generator=draw) * 2 * DOCUMENT).long().clamp(min=1).cumsum(0)
        ends = torch.tensor([0, *ends[ends < SEQ_LEN].tolist(), SEQ_LEN])
        return Row(g, torch.randint(0, self.vocab_size, (SEQ_LEN,), generator=draw), ends, "random")


class Text:
    """What `accumulated` asks of a section `text`."""

    rows_per_step, rows_at_once, tokens_per_step = ROWS, AT_ONCE, ROWS * SEQ_LEN


def random_model(name: str, device: torch.device):
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(zoo.hf_config(name), dtype=torch.float32)


def case(name: str, work: str, how: str, recompute: bool, n_steps: int) -> dict:
    """One line's measurements, in the process that torchrun started."""
    with started("cuda") as ranks:
        torch.set_float32_matmul_precision("high")
        model = random_model(name, ranks.device)
        n_layers = model.config.num_hidden_layers
        kinds = placement_kinds(n_layers, FULL, "jetblock")
        linear = [layer for layer in range(n_layers) if layer not in FULL]
        dims, models = BlockDims(model.config.hidden_size, **DIMS), [model]
        torch.manual_seed(1)
        with ranks.device:
            surgery.wrap(model, "jetblock", dims, layers=linear)
        if work == "weights":
            surgery.prune(model, kinds)
            models.append(surgery.attach(random_model(name, ranks.device)).requires_grad_(False).eval())
            root = WeightsStep(model.train(), models[1], 0.5)
        else:
            surgery.freeze(model)
            root = PathStep(model.train(), Training.from_params(**SETTINGS))
        if how == "sharded":
            shard(root, models, ranks, precision="bfloat16", recompute=recompute)
        wanted = None if work == "local" else kinds

        def loss_of(_: int, ids: Tensor, ends: Tensor) -> Tensor:
            with torch.autocast("cuda", torch.bfloat16, enabled=how == "plain"):
                return root(ids, ends) if work == "weights" else root(ids, ends, wanted)

        rows = Rows(model.config.vocab_size, ranks.rank, ranks.world_size)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimiser = adamw(trained, 1.0e-4, capturable=False)
        advance = stepper(accumulated(rows, ranks, Text(), models, loss_of, 0), trained, [optimiser], 1.0)
        losses, seconds = [], []
        for step in range(n_steps + 2):  # the first two build kernels and states
            torch.cuda.synchronize()
            ranks.wait()
            begun = time.perf_counter()
            loss, _ = advance(step)
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
            losses.append(float(loss))
        return {
            "device": torch.cuda.get_device_name(),
            "n": n_steps,
            "step_s": statistics.median(seconds[2:]),
            "step_s_sd": statistics.stdev(seconds[2:]),
            "first_loss": losses[0],
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9,
            "rank": ranks.rank,
        }


def flops_per_token(name: str, work: str) -> float:
    """Operations of the model a token, by the formulas of `preflight.runs`."""
    model = preflight.decoder(name)
    linear = model.n_layers - len(FULL)
    trained = linear * preflight.block_params("jetblock", DIMS, model.d_model)
    student = model.n_matmul + trained - linear * model.n_attention
    return {
        "paths": 2.0 * model.n_matmul + 4.0 * student + 2.0 * trained,
        "local": 2.0 * model.n_matmul + 6.0 * trained,
        "weights": 2.0 * model.n_matmul + 6.0 * student,
    }[work]


def launched(arguments: list[str], n_processes: int) -> dict:
    """One case in its own processes. Raises RuntimeError with the end of their output."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    done = subprocess.run([*command, __file__, *arguments], capture_output=True, text=True, check=False)
    found = [json.loads(line.removeprefix("case: ")) for line in done.stdout.splitlines() if line.startswith("case: ")]
    if done.returncode or not found:
        raise RuntimeError(f"{' '.join(arguments)} on {n_processes}: {done.stderr[-2000:]}")
    return found[0]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", metavar="DIR")
    parser.add_argument("--model", default="Qwen2.5-1.5B")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("training.py measures on a CUDA device, and PyTorch sees none", file=sys.stderr)
        return 1
    if args.case:
        work, how, recompute = args.case
        found = case(args.model, work, how, recompute == "True", args.steps)
        if found["rank"] == 0:
            print("case: " + json.dumps(found), flush=True)
        return 0
    peak = ceilings()["flops_per_s"]
    print(f"a product of 8192³ in bfloat16: {peak / 1e12:.0f} TFLOP/s", flush=True)
    out = resolve(args.out)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "training.csv").open("w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        table.writeheader()
        for work, how, recompute in CASES:
            first = None
            for n in [1] if how == "plain" else range(1, torch.cuda.device_count() + 1):
                arguments = ["--model", args.model, "--steps", str(args.steps), "--case", work, how, str(recompute)]
                try:
                    found = launched(arguments, n)
                except RuntimeError as error:
                    print(error, file=sys.stderr, flush=True)
                    continue
                first = first or found
                if abs(found["first_loss"] / first["first_loss"] - 1) > ALLOWED:
                    print(
                        f"{work}, {how}: first loss {found['first_loss']} on {n}, {first['first_loss']} on one: no line"
                    )
                    continue
                speed = ROWS * SEQ_LEN / found["step_s"]
                reached = flops_per_token(args.model, work) * speed / n
                row = {
                    **{"model": args.model, "work": work, "device": found["device"], "processes": n, "how": how},
                    **{
                        "recompute": recompute,
                        "seq_len": SEQ_LEN,
                        "rows_per_step": ROWS,
                        "rows_at_once": AT_ONCE,
                        "n": found["n"],
                    },
                    **{"step_s": f"{found['step_s']:.4g}", "step_s_sd": f"{found['step_s_sd']:.2g}"},
                    **{"tokens_per_s": f"{speed:.0f}", "model_tflops_per_gpu": f"{reached / 1e12:.1f}"},
                    **{
                        "share_of_peak": f"{reached / peak:.3f}",
                        "speed_up": f"{first['step_s'] / found['step_s']:.3f}",
                    },
                    **{"peak_gb": f"{found['peak_gb']:.1f}", "first_loss": f"{found['first_loss']:.5f}"},
                }
                table.writerow(row)
                file.flush()
                print(row, flush=True)
    return 0


if __name__ == "__main__":
    os.chdir(resolve("."))
    sys.exit(main())
