"""One hybrid at a given placement, with everything but its linear layers frozen: the unit of every comparison."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from jetlab.config import Study, Training, TrainingStudy
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import Score, exam
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.seeding import derive
from jetlab.tasks import build_tasks
from jetlab.train import launch
from jetlab.train.loop import file_digest
from jetlab.train.main import PathsJob
from jetlab.train.paths import fixed_law, placement_kinds, train_paths


@dataclass(frozen=True)
class HybridRun:
    """A trained hybrid with its loss curve, its scores, and its size.

    `selection` are its scores on split `select`, by which runs may be chosen; `scores` those on `test`, to be reported.
    `n_params` counts all its parameters, `block_params` those of a linear layer on average, `state_bytes` the state of
    one linear layer for one sequence in fp32.
    """

    model: PreTrainedModel
    tokenizer: object
    dims: BlockDims
    history: list[dict]
    selection: dict[str, Score]
    scores: dict[str, Score]
    n_params: int
    block_params: int
    state_bytes: int


def train_hybrid(
    study: TrainingStudy,
    training: Training,
    teacher: str,
    layers: tuple[int, ...],
    kind: str,
    dims: BlockDims,
    *,
    label: str,
    options: dict | None = None,
) -> HybridRun:
    """Convert the teacher to attention in `layers` and `kind` elsewhere, and train the linear layers.

    The seed, and with it data and initial values, is the study's; `options` are passed to the block. A study with `text`
    trains in processes of its own.
    """
    options = options or {}
    seed, device = study.common.seed, study.common.device
    # On text the GPUs belong to those processes until they are done.
    model, tokenizer = surgery.load(teacher, device=device if study.text is None else "cpu")
    n_layers = model.config.num_hidden_layers
    kinds = placement_kinds(n_layers, tuple(layers), kind)
    linear = [layer for layer in range(n_layers) if layer not in layers]
    init_seed = derive(seed, "hybrid") % 2**32
    torch.manual_seed(init_seed)
    surgery.wrap(model, kind, dims, layers=linear, **options)
    if study.text is not None:
        read = launch.what_is_read(study.text, 1)
        key = [seed, read, training.model_dump(), kinds, str(dims), options, launch.model_digest(teacher)]
        job = PathsJob(
            folder=launch.job_folder(label, key),
            label=label,
            teacher=str(teacher),
            text=study.text,
            seed=seed,
            device=device,
            block=kind,
            dims=asdict(dims),
            options=options,
            layers=linear,
            init_seed=init_seed,
            law=None,
            max_full=0,
            training=training,
        )
        trained, history = launch.train(job)
        launch.put(model, trained)
        surgery.prune(model.to(device).eval(), kinds)
        return measured(study, model, tokenizer, dims, history)
    mixture = Mixture(build_tasks(study.tasks.sizes), training.rows, tokenizer, study.tasks.seq_len, seed)
    digest = file_digest(Path(teacher) / "model.safetensors")
    key = [study.model_dump(), training.model_dump(), kinds, str(dims), options, digest]
    history = train_paths(model, mixture, fixed_law(kinds), training, label=label, resume_key=key)
    surgery.prune(model, kinds)
    return measured(study, model, tokenizer, dims, history)


def measured(study: Study, model: PreTrainedModel, tokenizer, dims: BlockDims, history: list[dict]) -> HybridRun:
    """The scores and the size of a trained hybrid with one path a layer."""
    seed = study.common.seed
    blocks = [path for slot in surgery.slots(model) for path in slot.linear.values()]
    return HybridRun(
        model,
        tokenizer,
        dims,
        history,
        exam(study.tasks, tokenizer, "select", seed).score(model),
        exam(study.tasks, tokenizer, "test", seed).score(model),
        sum(p.numel() for p in model.parameters()),
        round(sum(p.numel() for block in blocks for p in block.parameters()) / len(blocks)),
        blocks[0].state_bytes(1),
    )
