"""One training run on text, on as many processes as torchrun starts:

    torchrun --standalone --nproc-per-node 8 -m jetlab.train.main JOB.json

A job is a `PathsJob` (the linear paths of a supernet or hybrid) or a `WeightsJob` (all weights of a hybrid, stage 2); the
stages write one and start this module by `jetlab.train.launch`. It leaves `weights.safetensors` (what was trained) and
`history.json` (the loss curve) in the job's folder. A run that was killed goes on from its last checkpoint there.
"""

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from pydantic import Field, TypeAdapter
from safetensors.torch import load_file, save_file
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from transformers import PreTrainedModel

from jetlab.config import StudyModel, Text, Training
from jetlab.data.corpus import PackedCorpus
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import replacing, resolve
from jetlab.run import die_with_parent
from jetlab.train.paths import LAWS, fixed_law, path_law
from jetlab.train.ranks import Ranks, started
from jetlab.train.text import train_paths_on_text, train_weights_on_text


class Job(StudyModel):
    folder: str  # of this job: checkpoints and what it leaves
    label: str  # of its line of progress
    teacher: str  # folder of the pretrained model
    text: Text
    seed: int  # of the order of the text, and of paths
    device: Literal["cpu", "cuda"]


class PathsJob(Job):
    """Train the linear paths of `teacher`, wrapped with `block` in `layers` (None: all)."""

    kind: Literal["paths"] = "paths"
    block: str
    dims: dict[str, int]  # of `BlockDims`
    options: dict  # of the block
    layers: list[int] | None
    init_seed: int  # of the paths' first weights
    law: Literal[LAWS] | None  # of a supernet; None: the architecture with `block` in `layers`
    max_full: int  # of the law
    training: Training


class WeightsJob(Job):
    """Train all weights of the hybrid in the folder `model`, as `surgery.save` writes it."""

    kind: Literal["weights"] = "weights"
    model: str
    n_steps: int
    learning_rate: float
    warmup: int


AnyJob = Annotated[PathsJob | WeightsJob, Field(discriminator="kind")]


def read_job(path: str | Path) -> PathsJob | WeightsJob:
    """The job in a JSON file."""
    return TypeAdapter(AnyJob).validate_json(Path(path).read_text(encoding="utf-8"))


def run(job: PathsJob | WeightsJob, ranks: Ranks) -> None:
    """Train, and let the first process write what was trained."""
    folder = resolve(job.folder)
    if isinstance(job, PathsJob):
        model, history = _paths(job, ranks, folder)
        trained = {name for name, p in model.named_parameters() if p.requires_grad}
    else:
        model, history = _weights(job, ranks, folder)
        trained = {name for name, _ in model.named_parameters()}
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    weights = get_model_state_dict(model, options=options)  # all processes hand theirs to the first
    if ranks.is_first:
        with replacing(folder / "weights.safetensors") as temporary:
            save_file({name: x.contiguous() for name, x in weights.items() if name in trained}, temporary)
        with replacing(folder / "history.json") as temporary:
            temporary.write_text(json.dumps(history), encoding="utf-8")
    ranks.wait()


def _corpus(job: Job, tokenizer, stage: Literal[1, 2], ranks: Ranks) -> PackedCorpus:
    return PackedCorpus(job.text.corpus(stage), tokenizer, seed=job.seed, rank=ranks.rank, world_size=ranks.world_size)


def _paths(job: PathsJob, ranks: Ranks, folder: Path) -> tuple[PreTrainedModel, list[dict]]:
    model, tokenizer = surgery.load(resolve(job.teacher))
    torch.manual_seed(job.init_seed)
    surgery.wrap(model, job.block, BlockDims(**job.dims), layers=job.layers, **job.options)
    _start_alike(model, ranks, folder / "start.safetensors")
    n_layers = model.config.num_hidden_layers
    if job.law is None:
        linear = range(n_layers) if job.layers is None else job.layers
        law = fixed_law(tuple(job.block if layer in linear else "attention" for layer in range(n_layers)))
    else:
        law = path_law(job.law, n_layers, job.block, job.max_full, job.seed)
    corpus = _corpus(job, tokenizer, 1, ranks)
    history = train_paths_on_text(model, corpus, law, job.training, job.text, ranks, folder, label=job.label)
    _report_damage(corpus, ranks)
    return model, history


def _start_alike(model: PreTrainedModel, ranks: Ranks, file: Path) -> None:
    """Every process takes the first one's new paths: on another processor a factor may come out with another sign."""
    surgery.freeze(model)
    new = {name: p for name, p in model.named_parameters() if p.requires_grad}
    if ranks.is_first and not file.exists():
        with replacing(file) as temporary:
            save_file({name: p.detach().contiguous() for name, p in new.items()}, temporary)
    ranks.wait()
    with torch.no_grad():
        for name, x in load_file(file).items():
            new[name].copy_(x)


def _weights(job: WeightsJob, ranks: Ranks, folder: Path) -> tuple[PreTrainedModel, list[dict]]:
    model, tokenizer = surgery.load(resolve(job.model))
    teacher = surgery.attach(surgery.load(resolve(job.teacher))[0]) if job.text.stage2_label_weight < 1 else None
    corpus = _corpus(job, tokenizer, 2, ranks)
    schedule = {"n_steps": job.n_steps, "learning_rate": job.learning_rate, "warmup": job.warmup}
    history = train_weights_on_text(model, teacher, corpus, job.text, ranks, folder, label=job.label, **schedule)
    _report_damage(corpus, ranks)
    return model, history


def _report_damage(corpus: PackedCorpus, ranks: Ranks) -> None:
    """What was left out, over all processes, on the terminal once the run is done."""
    damaged = sorted({str(damage) for part in ranks.gathered([str(d) for d in corpus.damaged]) for damage in part})
    if damaged and ranks.is_first:
        print("Files that could not be read to their end and were left out:", *damaged, sep="\n  ", file=sys.stderr)


def _may_pass(error: Exception) -> bool:
    """Whether a restart can help: the network, a device, or a partner that was killed, which gloo tells as a RuntimeError."""
    passing = (ConnectionError, dist.DistError, getattr(torch, "AcceleratorError", dist.DistError))
    return isinstance(error, passing) or (type(error) is RuntimeError and "gloo" in str(error))


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    # Under torchrun, which outlives the notebook that started it.
    die_with_parent(and_its_parent="JETLAB_LAUNCHED" in os.environ)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    job = read_job(arguments[0])
    try:
        with started(job.device) as ranks:
            if not ranks.is_first:
                os.environ["JETLAB_PROGRESS"] = os.devnull  # the first process draws the line
            run(job, ranks)
    except Exception as error:
        if not _may_pass(error):  # for the one who started it, who then does not try again
            with replacing(resolve(job.folder) / "error.txt") as temporary:
                temporary.write_text(f"{type(error).__name__}: {error}", encoding="utf-8")
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
