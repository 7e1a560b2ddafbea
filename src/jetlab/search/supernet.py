"""The supernet of Sec 2.2: a pretrained model with a linear path beside every attention, trained over random paths."""

from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from jetlab.config import SupernetStudy
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import exam
from jetlab.models import surgery
from jetlab.parallel import parallel_map
from jetlab.paths import replacing, require
from jetlab.search.selectors import all_placements, evaluate, objective
from jetlab.seeding import derive
from jetlab.tasks import SCORED, SUB_AXES, TASKS, build_tasks
from jetlab.train import launch
from jetlab.train.loop import file_digest
from jetlab.train.main import PathsJob
from jetlab.train.paths import path_law, placement_kinds, train_paths


@dataclass(frozen=True)
class SupernetRun:
    """A trained supernet: its name (`members`), the teacher's folder, the weights of the new paths, and the loss curve."""

    name: str
    teacher: str
    weights: str
    history: list[dict]


def build(
    study: SupernetStudy, teacher: str, seed: int, *, device: str | None = None
) -> tuple[PreTrainedModel, object]:
    """An untrained supernet over the teacher in a folder, and its tokeniser; the seed decides the new paths' weights."""
    # On text the GPUs belong to the processes that train.
    device = device or (study.common.device if study.text is None else "cpu")
    model, tokenizer = surgery.load(teacher, device=device)
    torch.manual_seed(_init_seed(seed))
    return surgery.wrap(model, study.block, study.dims.block(model.config.hidden_size)), tokenizer


def train(study: SupernetStudy, name: str, teacher: str, weights: str, seed: int) -> SupernetRun:
    """Train one supernet and write the weights of its new paths to `weights`. The teacher's own weights do not move."""
    if study.text is not None:
        return _train_on_text(study, name, teacher, weights, seed)
    model, tokenizer = build(study, teacher, seed)
    training = study.training
    mixture = Mixture(build_tasks(study.tasks.sizes), training.rows, tokenizer, study.tasks.seq_len, seed)
    history = train_paths(
        model,
        mixture,
        path_law(study.law, model.config.num_hidden_layers, study.block, study.max_full, seed),
        training,
        label=f"supernet {name}",
        resume_key=[study.model_dump(), seed, file_digest(Path(teacher) / "model.safetensors")],
        measure=_checks(study, model, tokenizer),
    )
    with replacing(weights) as temporary:
        save_file({name: p.detach().cpu() for name, p in model.named_parameters() if p.requires_grad}, temporary)
    return SupernetRun(name, teacher, weights, history)


def _train_on_text(study: SupernetStudy, name: str, teacher: str, weights: str, seed: int) -> SupernetRun:
    label = f"supernet {name}"
    job = PathsJob(
        folder=launch.job_folder(
            label,
            [
                study.model_dump(exclude={"text"}),
                launch.what_is_read(study.text, 1),
                seed,
                launch.model_digest(teacher),
            ],
        ),
        label=label,
        teacher=str(teacher),
        text=study.text,
        seed=seed,
        device=study.common.device,
        block=study.block,
        dims=asdict(study.dims.block(launch.hidden_size(teacher))),
        options={},
        layers=None,
        init_seed=_init_seed(seed),
        law=study.law,
        max_full=study.max_full,
        training=study.training,
    )
    trained, history = launch.train(job)
    with replacing(weights) as temporary:
        save_file(trained, temporary)
    return SupernetRun(name, teacher, weights, history)


def _init_seed(seed: int) -> int:
    return derive(seed, "supernet") % 2**32


def _checks(study: SupernetStudy, model: PreTrainedModel, tokenizer):
    """`n_checks` times on the way: {task}_all_linear, the accuracy, and with `check_budget` 1 {task}_layer{l}, the objective.

    On split `select`, since no reported number may decide when training ends.
    """
    n_steps, n_layers = study.training.n_steps, model.config.num_hidden_layers
    due = {max(1, round((i + 1) * n_steps / study.n_checks / 10)) * 10 for i in range(study.n_checks)}
    paper = exam(study.tasks, tokenizer, "select", study.common.seed, SCORED) if study.n_checks else None

    def check(step: int) -> dict[str, float]:
        if step not in due and not (study.n_checks and step == n_steps):
            return {}
        table = evaluate(model, study.block, paper, all_placements(n_layers, study.check_budget), "check")
        found = {f"{task}_all_linear": table[()][task].value for task in SCORED}
        one = [(full, task) for full in table if full for task in SCORED]
        return found | {f"{task}_layer{full[0]}": objective(table[full], task) for full, task in one}

    return check


def members(study: SupernetStudy, teachers: list[str], folder: str | Path) -> list[tuple[str, str, str, int]]:
    """(name, teacher, file of weights, seed) of every supernet: t0, t1, … and with more seeds t0_s1, ….

    Teacher i adds i to the seed, seed j adds 100 j.
    """
    found = []
    for j in range(study.n_seeds):
        for i, teacher in enumerate(teachers):
            name = f"t{i}_s{j}" if j else f"t{i}"
            found.append(
                (name, teacher, str(Path(folder) / "paths" / f"{name}.safetensors"), study.common.seed + i + 100 * j)
            )
    return found


def _train(member: tuple[str, str, str, int], study: SupernetStudy) -> SupernetRun:
    return train(study, *member)


def train_all(study: SupernetStudy, teachers: list[str], out_dir: str | Path) -> list[SupernetRun]:
    """`n_seeds` supernets a teacher, each with a seed of its own, side by side; on text, where each takes all GPUs, in turn."""
    every = members(study, teachers, out_dir)
    n_workers = None if study.text is None else 1
    return parallel_map(partial(_train, study=study), every, n_workers=n_workers, n_threads=study.common.n_threads)


def load(
    study: SupernetStudy, teacher: str, weights: str | Path, *, device: str | None = None
) -> tuple[PreTrainedModel, object]:
    """A trained supernet again on `device` (None: the study's), every path from `weights`, all else the teacher's and frozen.

    Raises MissingInput without the weights, ValueError if they are not those of exactly these paths.
    """
    model, tokenizer = build(study, teacher, study.common.seed, device=device or study.common.device)
    saved = load_file(require(weights, "supernet"))
    surgery.freeze(model)
    expected = {name: p.shape for name, p in model.named_parameters() if p.requires_grad}
    shapes = {name: x.shape for name, x in saved.items()}
    if wrong := sorted(name for name in expected | shapes if expected.get(name) != shapes.get(name)):
        raise ValueError(
            f"{weights} must hold the {len(expected)} tensors of block {study.block!r} with {study.dims}, but {wrong[0]} is "
            f"{shapes.get(wrong[0], 'missing')} instead of {expected.get(wrong[0], 'nothing')}; run `dvc repro supernet`"
        )
    model.load_state_dict(saved, strict=False)
    return model.eval(), tokenizer


def difficulty_curve(study: SupernetStudy, model: PreTrainedModel, tokenizer, split: str = "select") -> list[dict]:
    """The calibration: accuracy of the supernet with no attention and with all of it, over the size of each task.

    Rows {task, size, all_linear, all_linear_se, all_full, chance}; sizes are quarters of the study's own.
    """
    n_layers = model.config.num_hidden_layers
    rows = []
    for task in (*SCORED, *SUB_AXES):
        sizes = study.tasks.sizes[task]
        varied = fields(TASKS[task])[0].name  # what a context holds more of as it grows
        for quarter in range(1, 5):
            size = max(2, round(sizes[varied] * quarter / 4))
            scaled = study.tasks.model_copy(update={"sizes": study.tasks.sizes | {task: sizes | {varied: size}}})
            paper = exam(scaled, tokenizer, split, study.common.seed, [task])
            surgery.activate(model, placement_kinds(n_layers, (), study.block))
            linear = paper.score(model)[task]
            surgery.activate(model, placement_kinds(n_layers, tuple(range(n_layers)), study.block))
            rows.append(
                {
                    "task": task,
                    "size": size,
                    "all_linear": linear.value,
                    "all_linear_se": linear.se,
                    "all_full": paper.score(model)[task].value,
                    "chance": linear.chance,
                }
            )
    return rows
