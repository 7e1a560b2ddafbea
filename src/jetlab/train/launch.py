"""Starts `jetlab.train.main` under torchrun from a notebook, shows its progress, and brings back what it trained.

A kernel in which CUDA is in use cannot become many processes, and one that dies must not take a training of days with it
half-written: so training runs in processes of its own, and its folder holds all that is needed to go on.
"""

import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig

from jetlab.paths import ROOT, replacing, resolve, shown
from jetlab.train.loop import file_digest
from jetlab.train.main import PathsJob, WeightsJob

RESTARTS = 3  # of all processes, when one was killed
_TAIL = 25  # lines of their output that an error shows


class TrainingFailed(RuntimeError):
    """The processes of a training run ended without a result."""


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
    """Run a job to its end -> (what was trained, by name, and the loss curve); `clear` it once these are safe.

    `torchrun --standalone` with text.n_processes processes. JETLAB_TORCHRUN replaces these arguments, for several nodes:
    README.md, "More than one machine". When a process was killed, all start again from the last checkpoint, `RESTARTS`
    times at most; when this one is killed, they end, and the same call goes on from their checkpoint.
    Raises TrainingFailed with the error of a process that raised one, or the end of what they printed.
    """
    folder = resolve(job.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / "job.json") as temporary:
        temporary.write_text(job.model_dump_json(indent=2), encoding="utf-8")
    if not (folder / "history.json").exists():
        _torchrun(job, folder)
    weights = load_file(folder / "weights.safetensors")
    return weights, json.loads((folder / "history.json").read_text(encoding="utf-8"))


def clear(folder: str | Path) -> None:
    """Remove a job's folder, with its checkpoints and results."""
    shutil.rmtree(resolve(folder), ignore_errors=True)


def _torchrun(job: PathsJob | WeightsJob, folder: Path) -> None:
    given = os.environ.get("JETLAB_TORCHRUN")
    how = ["--standalone", f"--nproc-per-node={job.text.n_processes}"] if given is None else shlex.split(given)
    arguments = [*how, "-m", "jetlab.train.main", shown(folder / "job.json")]
    with replacing(folder / "command.txt") as temporary:  # for the other nodes, and for whoever wants to run it by hand
        temporary.write_text(shlex.join(["torchrun", *arguments]) + "\n", encoding="utf-8")
    log, error = folder / "output.txt", folder / "error.txt"
    for attempt in range(1 + RESTARTS):
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
        print(
            f"{job.label}: a process died (attempt {attempt + 1}); all go on from the last checkpoint", file=sys.stderr
        )
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL:]
    raise TrainingFailed(
        f"{job.label}: processes died {1 + RESTARTS} times, the last time with code {done.returncode}; the end of "
        f"{shown(log)} is below; set right what it says and run the stage again, which goes on from the last checkpoint\n"
        + "\n".join(lines)
    )
