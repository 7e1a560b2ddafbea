"""Starts `jetlab.train.main` under torchrun from a notebook, shows its progress, and brings back what it trained.

A kernel in which CUDA is in use cannot become many processes, and one that dies must not take a training of days with it
half-written: so training runs in processes of its own, and its folder holds all that is needed to go on.
"""

import gc
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedModel

from jetlab.config import Text
from jetlab.paths import ROOT, replacing, resolve, shown
from jetlab.train.loop import file_digest
from jetlab.train.main import PathsJob, WeightsJob

RESTARTS = 3  # of all processes, when one was killed, without a new checkpoint
_TAIL = 25  # lines of their output that an error shows


class TrainingFailed(RuntimeError):
    """The processes of a training run ended without a result."""


def what_is_read(text: Text, stage: Literal[1, 2]) -> dict:
    """The part of section `text` that decides a job's result; how many processes share the work, and how, does not."""
    how = {"n_processes", "rows_at_once", "recompute", "checkpoint_steps", "on_damage"}
    other = {"stage2_sources", "stage2_label_weight"} if stage == 1 else {"sources"}
    return text.model_dump(exclude=how | other)


def job_folder(label: str, key: object) -> str:
    """scratch/train/LABEL-HASH: the folder of a job, found again by all that decides its result."""
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:16]
    return f"scratch/train/{label.replace(' ', '-').replace(',', '')}-{digest}"


def model_digest(folder: str | Path) -> str:
    """SHA-256 over the config and the weights of a model's folder, for the key of a job."""
    digest = hashlib.sha256()
    for path in sorted(resolve(folder).glob("*.safetensors")):
        digest.update(file_digest(path).encode())
    digest.update((resolve(folder) / "config.json").read_bytes())
    return digest.hexdigest()


def hidden_size(folder: str | Path) -> int:
    """Model width of the model in a folder, from its config alone."""
    config = AutoConfig.from_pretrained(resolve(folder))
    return config.get_text_config().hidden_size


def train(job: PathsJob | WeightsJob) -> tuple[dict[str, Tensor], list[dict]]:
    """Run a job to its end -> (what was trained, by name, and the loss curve).

    Its folder stays until the stage has written its results, when `jetlab.run` removes it; a notebook that is run by hand
    leaves it in scratch/train. So no failure behind the training costs the training.

    `torchrun --standalone` with text.n_processes processes. JETLAB_TORCHRUN replaces these arguments, for several nodes:
    README.md, "More than one machine". When a process was killed, all start again from the last checkpoint, `RESTARTS`
    times at most without progress; when this one is killed, they end, and the same call goes on from their checkpoint.
    Raises TrainingFailed with the error of a process that raised one, or the end of what they printed.
    """
    folder = resolve(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    if "JETLAB_JOBS" in os.environ:
        with open(os.environ["JETLAB_JOBS"], "a", encoding="utf-8") as jobs:
            jobs.write(f"{folder}\n")
    with replacing(folder / "job.json") as temporary:
        temporary.write_text(job.model_dump_json(indent=2), encoding="utf-8")
    if torch.cuda.is_initialized():  # what this process keeps of a GPU the first of the others lacks
        gc.collect()
        torch.cuda.empty_cache()
    if not (folder / "history.json").exists():
        _torchrun(job, folder)
    weights = load_file(folder / "weights.safetensors")
    return weights, json.loads((folder / "history.json").read_text(encoding="utf-8"))


def put(model: PreTrainedModel, trained: dict[str, Tensor]) -> None:
    """Give a model what a job trained. Raises ValueError for a tensor that it has no place for, or of another shape."""
    mine = dict(model.named_parameters())
    if wrong := sorted(name for name, x in trained.items() if name not in mine or mine[name].shape != x.shape):
        raise ValueError(
            f"a job trained {len(wrong)} tensors that do not fit the model, the first is {wrong[0]}; remove scratch/train and "
            "run the stage again"
        )
    with torch.no_grad():
        for name, x in trained.items():
            mine[name].copy_(x)


def _checkpoints(folder: Path) -> list[str]:
    """The checkpoints in a job's folder: a new one says that an attempt got on."""
    return sorted(str(path) for path in folder.glob("*/step-*/run.json"))


def _torchrun(job: PathsJob | WeightsJob, folder: Path) -> None:
    given = os.environ.get("JETLAB_TORCHRUN")
    how = ["--standalone", f"--nproc-per-node={job.text.n_processes}"] if given is None else shlex.split(given)
    arguments = [*how, "-m", "jetlab.train.main", shown(folder / "job.json")]
    with replacing(folder / "command.txt") as temporary:  # for the other nodes, and for whoever wants to run it by hand
        temporary.write_text(shlex.join(["torchrun", *arguments]) + "\n", encoding="utf-8")
    log, error = folder / "output.txt", folder / "error.txt"
    attempt, reached = 0, _checkpoints(folder)
    while attempt <= RESTARTS:
        attempt += 1
        error.unlink(missing_ok=True)
        with log.open("a", encoding="utf-8") as file:
            done = subprocess.run(
                [sys.executable, "-m", "torch.distributed.run", *arguments],
                cwd=ROOT,
                env=os.environ | {"JETLAB_LAUNCHED": "1"},
                stdout=file,
                stderr=file,
                check=False,
            )
        if (folder / "history.json").exists():
            return
        if error.exists():
            raise TrainingFailed(f"{job.label}: {error.read_text(encoding='utf-8')} (all output: {shown(log)})")
        print(f"{job.label}: a process died (attempt {attempt}); all go on from the last checkpoint", file=sys.stderr)
        if _checkpoints(folder) != reached:  # a run of days may lose a process a day
            attempt, reached = 0, _checkpoints(folder)
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    raise TrainingFailed(
        f"{job.label}: processes died {attempt} times without a new checkpoint, the last time with code {done.returncode}; "
        f"the end of {shown(log)} is below; set right what it says and run the stage again, which goes on from the last "
        "checkpoint\n" + "\n".join(lines)
    )
