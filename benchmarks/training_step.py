"""Training steps on one GPU with the Triton kernels and with plain PyTorch, end to end.

    python benchmarks/training_step.py --out records/h100/kernels [--steps 80] [--profiles params.yaml profiles/h200.yaml]

supernet   stage 2 as the study runs it (`train_paths`, fp32, the steps that draw a path each), with the bundled teacher and the
           supernet's section of a profile: small heads, where launches count. One line a profile and block.
published  four layers of Jet-Nemotron-2B's width with JetBlocks in bf16, forward, backward and AdamW over 4 × 4096 tokens,
           the same ones in every step, so that the loss falls and shows what a wrong gradient would do

The backends take turns on the same seeds, in both orders. Writes training_step.csv: step, block, backend, median ms a step,
its quartiles, n steps, and the loss at the end (supernet: mean of ten steps), which must not depend on the backend but for
rounding; the script stops if it does.
"""

import argparse
import itertools
import statistics
import sys
import time
from pathlib import Path

import torch
from ruamel.yaml import YAML
from transformers import Qwen2Config, Qwen2ForCausalLM

from jetlab.config import SupernetStudy
from jetlab.data.packing import Mixture
from jetlab.layers.jetblock import JetBlock
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.search.supernet import build
from jetlab.tasks import build_tasks
from jetlab.train.loop import adamw
from jetlab.train.paths import path_law, train_paths
from kernels import JET_2B, write

COLUMNS = ["step", "block", "backend", "ms", "ms_25", "ms_75", "n", "loss"]
SKIPPED = 10  # steps before the first time counts: compiling, allocating
LOSS_TOLERANCE = 0.02  # between backends, relative


def on_backend(model: torch.nn.Module, backend: str) -> torch.nn.Module:
    for module in model.modules():
        if hasattr(module, "backend"):
            module.backend = backend
    return model


def supernet(profile: Path, block: str, backend: str, n_steps: int) -> tuple[list[float], float]:
    """Milliseconds of each step end to end, behind ten steps on single layers that a graph replays, and the mean loss of the
    last ten."""
    params = YAML(typ="safe").load(profile.read_text(encoding="utf-8"))
    common = params["common"] | {"device": "cuda"}
    study = SupernetStudy(common=common, tasks=params["tasks"], **params["supernet"] | {"block": block})
    seed = study.common.seed
    model, tokenizer = build(study, str(ROOT / "assets/teacher/0"), seed)
    on_backend(model, backend)
    training = study.training.model_copy(update={"n_local": 10, "n_steps": n_steps, "growth": 0.0})
    mixture = Mixture(build_tasks(study.tasks.sizes), training.rows, tokenizer, study.tasks.seq_len, seed)
    law = path_law(study.law, model.config.num_hidden_layers, block, study.max_full, seed)
    ends = []

    def timed(step: int):
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
        return law(step)

    history = train_paths(model, mixture, timed, training, label=f"{block} {backend}")
    ends = ends[-n_steps:]  # train_paths asks for all paths before the first step, too
    times = [1e3 * (after - before) for before, after in itertools.pairwise(ends[SKIPPED:])]
    return times, history[-1]["loss"]


def published(backend: str, n_steps: int, n_layers: int = 4, B: int = 4, T: int = 4096) -> tuple[list[float], float]:
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=8192, hidden_size=1536, intermediate_size=8960, num_hidden_layers=n_layers, num_attention_heads=12,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = surgery.attach(Qwen2ForCausalLM(config))
    for slot in surgery.slots(model):  # random, as factoring attention's matrices at this width takes minutes
        slot.paths["jetblock"] = JetBlock(JET_2B)
    surgery.prune(model, ["jetblock"] * n_layers)
    on_backend(model.to("cuda", torch.bfloat16), backend).train()
    optimiser = adamw(model.parameters(), 1e-3)
    rng = torch.Generator(device="cuda").manual_seed(0)
    ids = torch.randint(config.vocab_size, (B, T), device="cuda", generator=rng)
    times, losses = [], []
    for _ in range(n_steps):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(1e3 * (time.perf_counter() - start))
        losses.append(loss.item())
    return times[3:], losses[-1]


def compared(name: str, block: str, run) -> list[dict]:
    """Lines of both backends: each runs twice, the second time in the other order; the steps of both runs count."""
    rows = []
    runs = {"chunked": [], "triton": []}
    for backend in ("triton", "chunked", "chunked", "triton"):
        runs[backend].append(run(backend))
        torch.cuda.empty_cache()
    for backend, pair in runs.items():
        times, loss = pair[0][0] + pair[1][0], pair[0][1]
        low, middle, high = statistics.quantiles(times, n=4)
        row = {"step": name, "block": block, "backend": backend, "ms": middle, "ms_25": low, "ms_75": high}
        rows.append(row | {"n": len(times), "loss": loss})
        print(f"{name:28} {block:16} {backend:8} {middle:8.2f} ms  loss {rows[-1]['loss']:.5f}", flush=True)
    losses = [row["loss"] for row in rows]
    if abs(losses[0] - losses[1]) > LOSS_TOLERANCE * abs(losses[0]):
        sys.exit(
            f"{name} {block}: the loss depends on the backend, {losses[0]:.5f} and {losses[1]:.5f}; nothing was written"
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the record")
    parser.add_argument("--steps", type=int, default=80, help="steps of each run (default 80)")
    parser.add_argument(
        "--profiles", type=Path, nargs="+", default=[ROOT / "params.yaml"], help="whose supernet to train"
    )
    parser.add_argument(
        "--blocks", nargs="+", default=["gated_deltanet", "jetblock"], help="linear paths of the supernet"
    )
    arguments = parser.parse_args()
    if arguments.steps < 2 * SKIPPED:
        sys.exit(f"--steps must be at least {2 * SKIPPED}, got {arguments.steps}: the first {SKIPPED} are not timed")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/training_step.py measures on a CUDA device, and PyTorch sees none")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = compared("published 4 layers 4x4096", "jetblock", lambda backend: published(backend, 13))
    for profile in arguments.profiles:
        for block in arguments.blocks:
            rows += compared(
                f"supernet {profile.stem}",
                block,
                lambda backend, p=profile, b=block: supernet(p, b, backend, arguments.steps),
            )
    write(arguments.out / "training_step.csv", rows, COLUMNS)


if __name__ == "__main__":
    main()
