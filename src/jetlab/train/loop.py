"""The one training loop: AdamW, warm-up and linear decay, progress on the terminal, and exact resume after a kill.

A step is a function of its number alone (data and random choices are drawn from seeds that contain it), so a run that
resumes from a checkpoint at step n ends with the same bits as one that was never interrupted.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from jetlab.paths import ROOT, replacing, resolve
from jetlab.progress import progress
from jetlab.train.captured import Captured, FixedShapes

if TYPE_CHECKING:
    from jetlab.train.checkpoint import ShardedResume

CHECKPOINT_SECONDS = 15.0  # at most so much work is lost by a kill


class TrainingDiverged(RuntimeError):
    """The loss is no longer a number."""


def schedule(step: int, n_steps: int, warmup: int, floor: float = 0.05) -> float:
    """The factor on the peak learning rate: linear over `warmup` steps, 1 to 60 % of `n_steps`, then linear to `floor`."""
    if step < warmup:
        return (step + 1) / warmup
    hold = 0.6 * n_steps
    return 1.0 if step < hold else 1 - (1 - floor) * (step - hold) / max(n_steps - hold, 1)


@dataclass(frozen=True)
class Accumulated:
    """A step whose gradient is a sum over parts, and perhaps over processes: for `fit`.

    `losses_at(step)` yields the losses of the parts, each differentiated before the next is made, so that activations of
    one part are alive at a time. `whole` makes the step's loss of the sum over this process's parts.
    """

    losses_at: Callable[[int], Iterator[Tensor]]
    whole: Callable[[Tensor], Tensor]
    log_at: Callable[[int], dict[str, float]] = lambda step: {}


class Resume:
    """A checkpoint in scratch/resume/, found again by everything that decides the result: `key` and the package's code.

    It is written as safetensors, so reading one back executes nothing, and goes when the run is done.
    """

    def __init__(self, name: str, key: object):
        text = json.dumps(key, sort_keys=True, default=str) + _code_digest()
        self.path = resolve(f"scratch/resume/{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.safetensors")
        self._saved_at = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether so much time has passed that a kill would lose too much; `step` plays no part."""
        return time.monotonic() - self._saved_at > CHECKPOINT_SECONDS

    def save(self, step: int, tensors: dict[str, Tensor], history: list[dict]) -> None:
        meta = {"step": str(step), "history": json.dumps(history)}
        with replacing(self.path) as temporary:
            save_file({name: x.detach().contiguous() for name, x in tensors.items()}, temporary, metadata=meta)
        self._saved_at = time.monotonic()

    def load(self) -> tuple[int, dict[str, Tensor], list[dict]] | None:
        """(step, tensors, history) of the last checkpoint, or None."""
        if not self.path.exists():
            return None
        with safe_open(self.path, framework="pt") as file:
            meta = file.metadata()
            return int(meta["step"]), {name: file.get_tensor(name) for name in file.keys()}, json.loads(meta["history"])  # noqa: SIM118

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)


def _code_digest() -> str:
    digest = hashlib.sha256(torch.__version__.encode())
    for path in sorted((ROOT / "src").rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def file_digest(path: str | Path) -> str:
    """SHA-256 of a file, for the key of a `Resume`."""
    with resolve(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def adamw(
    parameters: Iterable[nn.Parameter],
    learning_rate: float,
    *,
    weight_decay: float = 0.0,
    betas: tuple[float, float] = (0.9, 0.98),
    capturable: bool = True,
) -> torch.optim.Optimizer:
    """AdamW in which vectors (norms, biases, decays) take no weight decay; on a GPU one that a graph can capture.

    Sharded parameters need `capturable=False`: they take no rate that lies in a tensor.
    """
    parameters = list(parameters)
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    if parameters and parameters[0].is_cuda:
        rate = torch.tensor(learning_rate, device=parameters[0].device) if capturable else learning_rate
        return torch.optim.AdamW(groups, lr=rate, betas=betas, fused=True, capturable=capturable)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, foreach=True)


def fit(
    named_parameters: Iterable[tuple[str, nn.Parameter]],
    optimisers: Sequence[torch.optim.Optimizer],
    loss_at: Callable[[int], tuple[Tensor, dict[str, float]]] | FixedShapes | Accumulated,
    *,
    n_steps: int,
    label: str,
    warmup: int = 20,
    clip: float = 1.0,
    log_every: int = 10,
    measure: Callable[[int], dict[str, float]] | None = None,
    resume: "Resume | ShardedResume | None" = None,
) -> list[dict]:
    """Train for `n_steps` steps; returns one record per `log_every` steps: step, mean loss and what `loss_at` adds.

    `loss_at(step)` returns the loss and numbers to log; a GPU captures a step of `FixedShapes` and replays it, one that is
    `Accumulated` runs part by part. The learning
    rates that the optimisers come with are peaks, which `schedule` scales. Gradients are clipped to norm `clip`.
    `measure(n)` after n steps, where a record is due, adds to it.
    Raises TrainingDiverged when the loss is not finite, with the step and the way out.
    """
    parameters = {name: p for name, p in named_parameters if p.requires_grad}
    if not parameters:
        raise ValueError(
            "nothing to train: no parameter requires a gradient; wrap or convert the model, then freeze it"
        )
    groups = [group for optimiser in optimisers for group in optimiser.param_groups]
    peaks = [float(group["lr"]) for group in groups]
    first, history = _restore(resume, parameters, optimisers)
    advance = stepper(loss_at, list(parameters.values()), optimisers, clip)
    pending: list[Tensor] = []
    with progress(n_steps, label) as bar:
        bar.update(first)
        for step in range(first, n_steps):
            for group, peak in zip(groups, peaks, strict=True):
                _set_rate(group, peak * schedule(step, n_steps, warmup))
            loss, extra = advance(step)
            pending.append(loss)
            if (step + 1) % log_every and step + 1 < n_steps:
                continue
            mean = float(torch.stack(pending).mean())
            if not math.isfinite(mean):
                raise TrainingDiverged(
                    f"{label}: the loss must be a finite number, got {mean} within steps {step + 2 - len(pending)} to "
                    f"{step + 1}; lower the learning rate (now at most {max(peaks):g}) or raise warmup (now {warmup})"
                )
            history.append({"step": step + 1, "loss": mean, **extra, **(measure(step + 1) if measure else {})})
            bar.update(len(pending), loss=mean)
            pending.clear()
            if resume is not None and resume.due(step + 1):
                resume.save(step + 1, _tensors(parameters, optimisers), history)
    return history


def stepper(
    loss_at: Callable | FixedShapes | Accumulated,
    parameters: list[nn.Parameter],
    optimisers: Sequence[torch.optim.Optimizer],
    clip: float,
) -> Callable[[int], tuple[Tensor, dict[str, float]]]:
    """From a step's number to its loss and what it logs, with the weights moved."""
    fixed = loss_at if isinstance(loss_at, FixedShapes) else None
    if fixed is not None and parameters[0].is_cuda:
        captured = []

        def replay(step: int):
            inputs = fixed.inputs_at(step)
            if not captured:
                captured.append(Captured(fixed.loss_of, inputs, parameters, optimisers, clip))
            return captured[0](inputs), fixed.log_at(step)

        return replay

    def differentiate(step: int):
        if isinstance(loss_at, Accumulated):
            parts = []
            for part in loss_at.losses_at(step):
                part.backward()
                parts.append(part.detach())
            return loss_at.whole(torch.stack(parts).sum()), loss_at.log_at(step)
        loss, extra = loss_at(step) if fixed is None else (fixed.loss_of(*fixed.inputs_at(step)), fixed.log_at(step))
        loss.backward()
        return loss.detach(), extra

    def advance(step: int):
        for optimiser in optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss, extra = differentiate(step)
        torch.nn.utils.clip_grad_norm_(parameters, clip)
        for optimiser in optimisers:
            optimiser.step()
        return loss, extra

    return advance


def _set_rate(group: dict, rate: float) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)  # a captured step reads this tensor
    else:
        group["lr"] = rate


def _tensors(parameters: dict[str, nn.Parameter], optimisers: Sequence[torch.optim.Optimizer]) -> dict[str, Tensor]:
    tensors = {f"value.{name}": p for name, p in parameters.items()}
    for optimiser in optimisers:
        for name, p in parameters.items():
            tensors |= {f"{key}.{name}": x for key, x in optimiser.state.get(p, {}).items() if isinstance(x, Tensor)}
    return tensors


def _restore(
    resume: Resume | None, parameters: dict[str, nn.Parameter], optimisers: Sequence[torch.optim.Optimizer]
) -> tuple[int, list[dict]]:
    found = resume.load() if resume is not None else None
    if found is None:
        return 0, []
    step, tensors, history = found
    owner = {id(p): optimiser for optimiser in optimisers for group in optimiser.param_groups for p in group["params"]}
    state: dict[str, dict[str, Tensor]] = {name: {} for name in parameters}
    for full_name, x in tensors.items():
        key, name = full_name.split(".", 1)
        state[name][key] = x
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(state[name].pop("value"))
            if state[name]:
                owner[id(p)].state[p] = {key: x.to(p.device) for key, x in state[name].items()}
    return step, history


def merge(histories: Sequence[tuple[str, list[dict]]]) -> list[dict]:
    """Histories of phases that follow one another, as one curve with the column `phase` and steps counted through."""
    rows, offset = [], 0
    for phase, history in histories:
        rows += [{"phase": phase, **row, "step": row["step"] + offset} for row in history]
        offset += history[-1]["step"] if history else 0
    return rows
