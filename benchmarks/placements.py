"""Scoring many placements of one supernet: each alone against all in the same forward, both in one process.

    python benchmarks/placements.py [--contexts 16] [--repeats 3] [--device cpu]

Every placement of up to `placement.max_budget` full layers in the first bundled teacher, its linear paths as they start,
is put the four scored tasks at the sizes of params.yaml.

evaluations   rows that go through the layers, in rows of one placement: a layer counts once for each placement, batched
              once for each distinct prefix of layers
calls         of a layer's forward
GFLOP         of matrix products, convolutions and attention (FlopCounterMode, with a formula of our own for attention on
              the CPU, which it does not know); norms, gates and other elementwise work are not counted
seconds       wall time, the median of the repeats, in which the sides take turns; --device cpu runs on one thread

Below the table is the largest difference between the two sides: of scores, which may only come from ties that rounding
decides, and of losses in nats.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from jetlab.config import SupernetStudy
from jetlab.evaluate.suite import Exam
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.run import read_params
from jetlab.search.selectors import all_placements
from jetlab.search.supernet import build
from jetlab.tasks import SCORED, build_tasks
from jetlab.train.paths import placement_kinds


def attention_flop(q: tuple, k: tuple, v: tuple, *_args, **_kwargs) -> int:
    """q·k and p·v of shapes [B, H, T, d]: 2 · B · H · T · S · (d + d_v), the causal half that is skipped included."""
    B, H, T, d = q
    return 2 * B * H * T * k[2] * (d + v[3])


FORMULAS = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flop}


def counted(model, call) -> tuple[int, int, int]:
    """Token rows through all layers, layer calls, and FLOP of one call."""
    rows = []
    handles = [
        layer.register_forward_hook(lambda _layer, _x, y: rows.append(y.shape[:2].numel()))
        for layer in surgery.decoder(model).layers
    ]
    with FlopCounterMode(display=False, custom_mapping=FORMULAS) as flop:
        call()
    for handle in handles:
        handle.remove()
    return sum(rows), len(rows), flop.get_total_flops()


def seconds(calls, repeats: int) -> list[float]:
    """Median wall time of each call; every round runs each call once."""
    times = [[] for _ in calls]
    for _ in range(repeats):
        for call, spent in zip(calls, times, strict=True):
            start = time.perf_counter()
            call()  # ends with numbers on the CPU, so a GPU has finished
            spent.append(time.perf_counter() - start)
    return [statistics.median(spent) for spent in times]


def placements(n_contexts: int, repeats: int, device: str) -> None:
    params = read_params(ROOT / "params.yaml")
    common = params["common"] | {"device": device}
    study = SupernetStudy.from_params(common=common, tasks=params["tasks"], **params["supernet"])
    model, tokenizer = build(study, str(ROOT / "assets/teacher/0"), seed=0)
    n_layers, max_budget = model.config.num_hidden_layers, params["placement"]["max_budget"]
    architectures = [placement_kinds(n_layers, full, study.block) for full in all_placements(n_layers, max_budget)]
    tasks = build_tasks(study.tasks.sizes)
    exam = Exam(
        [tasks[name] for name in SCORED], tokenizer, "search", n_contexts, 0, n_questions=study.tasks.n_questions
    )

    def alone(kinds):
        surgery.activate(model, kinds)
        return exam.score(model)

    def one_by_one():
        return {kinds: alone(kinds) for kinds in architectures}

    def batched():
        return exam.score_all(model, architectures)

    sides = {"one by one": one_by_one, "batched": batched}
    unit = counted(model, lambda: alone(architectures[0]))[0] // n_layers
    expected, found = (call() for call in sides.values())  # warm, and to be compared
    times = seconds(list(sides.values()), repeats)
    print(
        f"{len(architectures)} placements of up to {max_budget} full layers in {n_layers}, {n_contexts} contexts of each of "
        f"{', '.join(SCORED)}; {torch.cuda.get_device_name() if device == 'cuda' else 'one CPU thread'}"
    )
    print(f"{'':10} {'evaluations':>12} {'calls':>6} {'GFLOP':>8} {'seconds':>8}")
    table = []
    for (name, call), spent in zip(sides.items(), times, strict=True):
        rows, calls, flop = counted(model, call)
        table.append((rows / unit, calls, flop / 1e9, spent))
        print(f"{name:10} {rows / unit:12.0f} {calls:6d} {flop / 1e9:8.1f} {spent:8.2f}", flush=True)
    evaluations, calls, flop, spent = (a / b for a, b in zip(*table, strict=True))
    print(f"{'ratio':10} {evaluations:12.2f} {calls:6.1f} {flop:8.2f} {spent:8.2f}")
    correct, loss = (
        max(
            np.abs(getattr(expected[kinds][task], name) - getattr(found[kinds][task], name)).max()
            for kinds in architectures
            for task in SCORED
        )
        for name in ("correct", "loss")
    )
    print(f"largest difference: {correct:.1e} of a context's score, {loss:.1e} nats of its loss")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, default=16, help="of each task (default 16)")
    parser.add_argument("--repeats", type=int, default=3, help="timed runs of each side (default 3)")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    torch.set_num_threads(1)
    arguments = parser.parse_args()
    placements(arguments.contexts, arguments.repeats, arguments.device)
