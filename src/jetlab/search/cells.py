"""Many short runs that differ in few things, side by side: what the comparisons of blocks, options and widths rest on.

A seed draws data, initial values and the examples of every split: with one, all cells see the same data in the same order
and answer the same test examples, whatever their teacher (`jetlab.evaluate.replicates`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from jetlab.config import CellStudy, DistillStudy, SizeStudy, VariantStudy
from jetlab.evaluate.compare import metric_name
from jetlab.evaluate.controls import switched_off
from jetlab.evaluate.lengths import over_lengths
from jetlab.evaluate.suite import exam
from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.parallel import parallel_map
from jetlab.search.selectors import uniform
from jetlab.tasks import SCORED
from jetlab.train.distill import distill
from jetlab.train.hybrid import HybridRun, train_hybrid
from jetlab.train.loop import TrainingDiverged
from jetlab.train.scratch import train_from_scratch

EQUAL = ("state", "params")


@dataclass(frozen=True)
class Cell:
    """One run. `name` is what is compared, `equal` what its dims hold fixed over names."""

    name: str
    placement: str  # "found", "none" or "uniform"
    equal: str
    kind: str
    dims: BlockDims
    options: dict
    layers: tuple[int, ...]
    learning_rate: float
    teacher: str
    seed: int


def list_cells(study: CellStudy, n_layers: int, d_model: int) -> list[Cell]:
    """All cells of the study's family but for teachers, seeds and rates: those of its first ones."""
    full = {"found": tuple(study.found), "none": (), "uniform": uniform(n_layers, max(1, len(study.found)))}
    dims = study.dims.block(d_model)
    rate = study.scratch.learning_rate if study.family == "scratch" else study.training.learning_rate
    common = {"learning_rate": rate, "teacher": study.teachers[0], "seed": study.seeds[0]}
    shapes: list[tuple] = []  # (name, what is equal, kind, dims, options)
    if study.family in ("blocks", "contrasts", "scratch"):
        shapes += [(kind, "state", kind, dims, {}) for kind in study.blocks]
    if study.family == "blocks":
        target = MIXERS["jetblock"].n_params(dims)
        shapes += [(kind, "params", kind, nearest_params(kind, dims, target, n_layers), {}) for kind in study.blocks]
    sections = {"common": study.common, "tasks": study.tasks, "training": study.training}
    if study.family in ("jetblock", "contrasts"):
        for name in study.jetblock:
            variant = VariantStudy.from_params(**sections, dims=study.dims, variant=name)
            shapes.append((name, "state", "jetblock", variant.block(d_model), variant.options))
    if study.family == "sizes":
        for name in study.sizes:
            size = SizeStudy.from_params(**sections, state_size=study.state_size, size=name)
            shapes.append((name, "state", "jetblock", size.dims.block(d_model), {}))
    if study.family == "final":
        shapes.append(("hybrid", "state", "jetblock", dims, {}))
    return [
        Cell(name, placement, equal, kind, own, options, full[placement], **common)
        for placement in study.placements
        for name, equal, kind, own, options in shapes
    ]


def replicated(cells: Sequence[Cell], study: CellStudy) -> list[Cell]:
    """Every cell for every teacher and seed."""
    return [
        replace(cell, teacher=teacher, seed=seed)
        for teacher in study.teachers
        for seed in study.seeds
        for cell in cells
    ]


def nearest_params(kind: str, dims: BlockDims, n_params: int, n_layers: int) -> BlockDims:
    """`dims` with the value width of a head for which a block of `kind` comes closest to `n_params` parameters.

    Key width and heads stay; the state then differs. Counted on the block itself, as it stands in the second of
    `n_layers` layers.
    """
    depth = {"layer_idx": 1, "n_layers": n_layers, "first": False}
    options = depth if getattr(MIXERS[kind], "depends_on_depth", False) else {}

    def distance(width: int) -> int:
        mixer = MIXERS[kind](replace(dims, head_dim_v=width), **options)
        return abs(sum(p.numel() for p in mixer.parameters()) - n_params)

    return replace(dims, head_dim_v=min(range(1, 8 * dims.head_dim_v), key=distance))


def run_cells(study: CellStudy, cells: Sequence[Cell]) -> list[dict]:
    """Train and score every cell, `study.n_workers` side by side; a row each, in order.

    A row has the fields of the cell, `params`, `block_params`, `state_bytes`, the last `loss`, and for each task its score
    on split `test` (`{task}`) with the loss of the right answer (`{task}_loss`), and on `select` (`{task}_select`). A
    run that diverges leaves its scores blank. Family final has for each task the score after stage 2 with its loss
    (`{task}`, `{task}_loss`), that after stage 1 (`{task}_stage1`), with a part switched off (`{task}_{part}_{way}`,
    `controls.switched_off`), the teacher's (`{task}_teacher`), and those of both on stretched contexts
    (`{task}_{place}_{characters}`, with `_teacher` behind).
    """
    alone = [replace(cell, equal="state") for cell in cells]  # equal dims at equal state and parameters: one run
    kept = [alone.index(cell) for cell in alone]
    once = sorted(set(kept))
    trained = parallel_map(partial(_run, study), [cells[i] for i in once], n_workers=study.n_workers)
    found = dict(zip(once, trained, strict=True))
    return [found[i] | {"equal": cell.equal} for i, cell in zip(kept, cells, strict=True)]


def _run(study: CellStudy, cell: Cell) -> dict:
    own = study.model_copy(update={"common": study.common.model_copy(update={"seed": cell.seed})})
    args = (cell.teacher, cell.layers, cell.kind, cell.dims)
    options = {"label": f"{cell.name}, {cell.placement}", "options": cell.options}
    row = {
        "name": cell.name,
        "placement": cell.placement,
        "equal": cell.equal,
        "kind": cell.kind,
        "teacher": cell.teacher.rsplit("/", 1)[-1],
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
        "n_heads": cell.dims.n_heads,
        "head_dim": cell.dims.head_dim,
        "head_dim_v": cell.dims.head_dim_v,
        "conv_size": cell.dims.conv_size,
    }
    try:
        if study.family == "final":
            return row | _final(own, cell, options)
        if study.family == "scratch":
            training = study.scratch.model_copy(update={"learning_rate": cell.learning_rate})
            run = train_from_scratch(own, training, *args, **options)
        else:
            training = study.training.model_copy(update={"learning_rate": cell.learning_rate})
            run = train_hybrid(own, training, *args, **options)
    except TrainingDiverged:
        return row
    return row | _scores(run)


def _final(study: CellStudy, cell: Cell, options: dict) -> dict:
    """Both stages of the final model, then everything that notebook 08 asks of it."""
    two_stages = DistillStudy(
        common=study.common,
        tasks=study.tasks,
        dims=study.dims,
        block=cell.kind,
        stage1=study.training,
        stage2_steps=study.stage2_steps,
        stage2_learning_rate=study.stage2_learning_rate,
    )
    run = distill(two_stages, cell.teacher, cell.layers, cell.kind, cell.dims, options=cell.options)
    model, tokenizer, seed = run.hybrid.model, run.hybrid.tokenizer, study.common.seed
    teacher = surgery.attach(surgery.load(cell.teacher, device=study.common.device)[0])
    row = _size(run.hybrid) | {"stage1_loss": run.hybrid.history[-1]["loss"], "loss": run.history[-1]["loss"]}
    for task, score in run.stage2.items():
        row |= {metric_name(task): score.value, f"{task}_loss": -score.neg_loss}
    row |= {f"{task}_stage1": score.value for task, score in run.stage1.items()}
    known = exam(study.tasks, tokenizer, "test", seed).score(teacher)
    row |= {f"{task}_teacher": score.value for task, score in known.items()}
    for (part, way), scores in switched_off(model, tokenizer, study.tasks, seed).items():
        row |= {f"{task}_{part}_{way}": score.value for task, score in scores.items()}
    models = {"": model, "_teacher": teacher}
    n_contexts = study.tasks.n_contexts["test"]
    for (name, place, length), scores in over_lengths(
        models, tokenizer, study.tasks, study.lengths, n_contexts, seed
    ).items():
        row |= {f"{task}_{place}_{length}{name}": score.value for task, score in scores.items()}
    return row


def _scores(run: HybridRun) -> dict:
    row = _size(run) | {"loss": run.history[-1]["loss"]}
    for task, score in run.scores.items():
        row |= {metric_name(task): score.value, f"{task}_loss": -score.neg_loss}
        row[f"{task}_select"] = run.selection[task].value
    return row


def _size(run: HybridRun) -> dict:
    return {"params": run.n_params, "block_params": run.block_params, "state_bytes": run.state_bytes}


def best_rates(rows: Sequence[dict]) -> dict[tuple[str, str], float]:
    """(name, placement) -> the learning rate with the highest mean of the scored tasks on split `select`.

    The mean is over the replicates of `rows`; a rate at which one of them diverged is out.
    """
    scores: dict[tuple, dict[float, list[float]]] = {}
    for row in rows:
        value = float(np.mean([row.get(f"{task}_select", -np.inf) for task in SCORED]))
        by_rate = scores.setdefault((row["name"], row["placement"]), {})
        by_rate.setdefault(row["learning_rate"], []).append(value)
    return {
        key: max(by_rate, key=lambda rate: (float(np.mean(by_rate[rate])), -rate)) for key, by_rate in scores.items()
    }


def tuned(cells: Sequence[Cell], rates: dict[tuple[str, str], float]) -> list[Cell]:
    """The cells at the rates of `best_rates`."""
    return [replace(cell, learning_rate=rates[cell.name, cell.placement]) for cell in cells]
