"""Checkpoints of a run on many processes: every process writes its shards, any number of them reads them again.

    FOLDER/step-00000200/{.metadata, __0_0.distcp, …}    weights, optimiser (torch.distributed.checkpoint)
                        /streams-0.json …                where the text of each process stands
                        /run.json                        step and loss curve

A checkpoint gets its name when it is whole; the one before is kept until then.
"""

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter

from jetlab.train.ranks import Ranks

_NAME = "step-{:08d}"
N_KEPT = 2  # should the last one be damaged, deleting its folder goes back to the one before


class Position(Protocol):
    """What can say where it stands and go on from there."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class ShardedResume:
    """As `loop.Resume`, for sharded `parameters` and the text that they are trained on; every process calls it alike.

    `every` steps one is due, whatever the clock says, so that all processes agree. The folder's name must be all that
    decides the result, but for the code: a run of days is not thrown away for an edit beside it.
    """

    def __init__(
        self, folder: Path, parameters: Mapping[str, nn.Parameter], corpus: Position, ranks: Ranks, *, every: int
    ):
        self.folder, self._parameters, self._corpus, self._ranks, self._every = folder, parameters, corpus, ranks, every

    def due(self, step: int) -> bool:
        return step % self._every == 0

    def save(self, step: int, tensors: dict[str, Tensor], history: list[dict]) -> None:
        """Write it, unless this step has a whole one already, which then holds the same."""
        if self._ranks.of_first((self.folder / _NAME.format(step) / "run.json").exists()):
            return
        new = self.folder / f".{_NAME.format(step)}.partial"
        if self._ranks.is_first:
            shutil.rmtree(new, ignore_errors=True)
            new.mkdir(parents=True)
        self._ranks.wait()
        dcp.save({name: x.detach() for name, x in tensors.items()}, storage_writer=FileSystemWriter(new))
        (new / f"streams-{self._ranks.rank}.json").write_text(json.dumps(self._corpus.state_dict()))
        self._ranks.wait()
        if self._ranks.is_first:
            (new / "run.json").write_text(json.dumps({"step": step, "history": history}))
            new.rename(self.folder / _NAME.format(step))
            for old in self._whole()[:-N_KEPT]:
                shutil.rmtree(old)
        self._ranks.wait()

    def load(self) -> tuple[int, dict[str, Tensor], list[dict]] | None:
        """(step, tensors, history) of the last whole checkpoint, or None; the text goes on where it stood."""
        # One looks for all: on shared storage another may see a folder later.
        if (name := self._ranks.of_first(next((path.name for path in reversed(self._whole())), None))) is None:
            return None
        last = self.folder / name
        run = json.loads((last / "run.json").read_text())
        saved = FileSystemReader(last).read_metadata().state_dict_metadata
        tensors = {name: self._like(name, meta) for name, meta in saved.items()}
        dcp.load(tensors, storage_reader=FileSystemReader(last))
        parts = [json.loads(file.read_text()) for file in sorted(last.glob("streams-*.json"))]
        streams = {name: state for part in parts for name, state in part["streams"].items()}
        self._corpus.load_state_dict({"step": parts[0]["step"], "streams": streams})
        return run["step"], tensors, run["history"]

    def clear(self) -> None:
        self._ranks.wait()
        if self._ranks.is_first:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _like(self, name: str, meta) -> Tensor:
        """An empty tensor to read into: cut like its parameter, or whole where it has another shape (a count of steps)."""
        parameter = self._parameters[name.split(".", 1)[1]]
        if meta.size == parameter.shape:
            return torch.empty_like(parameter.detach(), dtype=meta.properties.dtype)
        return torch.empty(meta.size, dtype=meta.properties.dtype)

    def _whole(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if re.fullmatch(r"step-\d{8}", path.name))
