"""The whole recipe on one folder: order of removal, candidates that fit, a longer distillation, and rivals drawn at random.

As in arXiv:2508.14444, Sec 4, with four differences. Depth and width compete at once, where the report chose its depth first
and its width at that depth; candidates of a width are cut from the original and not from a depth distilled before; all
distillation is short; and rivals of exactly the same bytes are added, trained for as many steps on the same rows:

random           as many layers of each kind as the winner has, drawn evenly, and so are neurons, channels and heads
attention kept   the same, but with the winner's own attention layers
narrowed random  the layers of `narrowed`, the best candidate with a width below the original's, with neurons, channels and
                 heads drawn
"""

import dataclasses
import math
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig, NemotronHForCausalLM

from jetlab.compress.budget import Budget, Needed, bytes_per_token, needed
from jetlab.compress.calibration import Calibration, calibration
from jetlab.compress.distill import Lessons, distill
from jetlab.compress.importance import Importance, Removal, logit_error, measure, remove_layers, single_removals
from jetlab.compress.prune import apply
from jetlab.compress.search import Space, candidates, random_importance, random_target, require_reachable, target_at
from jetlab.compress.target import Target
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import Score, exam, standard_error
from jetlab.models import nemotron, surgery
from jetlab.models.zoo import Shape, n_params
from jetlab.parallel import workers
from jetlab.seeding import derive
from jetlab.tasks import SCORED, build_tasks

DISTILLED = "-distilled"  # behind the name of a folder
SCORE_STEPS = 12  # of distillation take about as long as a score


@dataclasses.dataclass(frozen=True)
class Trial:
    """A target, what it costs, its logit error before distillation, and its loss curve and scores after."""

    name: str
    target: Target
    n_params: int
    needed: Needed
    bytes_per_token: float
    logit_error: float
    history: list[dict]
    scores: dict[str, Score]

    def row(self) -> dict:
        """One line of a table; `accuracy` is the mean over the scored tasks."""
        return {
            "name": self.name,
            "n_layers": len(self.target.layers),
            "d_model": self.target.d_model,
            "d_ff": self.target.d_ff,
            "n_mamba_heads": self.target.n_mamba_heads,
            "n_params": self.n_params,
            "bytes": self.needed.total,
            "bytes_per_token": self.bytes_per_token,
            "logit_error": self.logit_error,
            "accuracy": mean_accuracy(self.scores),
            "se": _mean_se(self.scores),
        }


@dataclasses.dataclass(frozen=True)
class CompressionRun:
    """The winner and the way to it.

    `single` is the one-layer map, `removed` the layers in the order of their removal. `depths`, at full width whether they fit
    or not, and `candidates` were distilled for `rank_steps` and scored on split `select`, `winner` and each of `others` for
    `final_steps` and scored on `test`, as are the `stages` original, pruned (not distilled) and final of the winner.
    """

    model: NemotronHForCausalLM
    tokenizer: object
    shape: Shape
    budget: Budget
    whole: Needed
    single: list[Removal]
    removed: list[Removal]
    depths: list[Trial]
    candidates: list[Trial]
    winner: Trial
    others: list[Trial]
    stages: dict[str, dict[str, Score]]

    def save(self, folder: str | Path) -> None:
        """The winner as an ordinary Hugging Face folder, which AutoModelForCausalLM reads."""
        self.model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)

    def layer_rows(self) -> list[dict]:
        """A row a layer: its kind, the error of its removal alone, and its place in the order of removal, None if it stays."""
        place = {removal.layer: i for i, removal in enumerate(self.removed, 1)}
        return [
            {
                "layer": removal.layer,
                "kind": self.shape.layer_kinds[removal.layer],
                "error": removal.error,
                "removed_as": place.get(removal.layer),
            }
            for removal in self.single
        ]

    def removal_rows(self) -> list[dict]:
        """A row a removal, in order: the layer, its kind, and the error with all of those before it gone too."""
        return [
            {"n_removed": i, "layer": r.layer, "kind": self.shape.layer_kinds[r.layer], "error": r.error}
            for i, r in enumerate(self.removed, 1)
        ]

    def trial_rows(self) -> list[dict]:
        """A row a trial; `step` is its name without a number. Accuracies of depths and candidates are on `select`."""
        trials = [*self.depths, *self.candidates, self.winner, *self.others]
        return [{"step": trial.name.rstrip(" 0123456789"), **trial.row()} for trial in trials]

    def score_rows(self) -> list[dict]:
        """A row for each stage, and each of `others`, and task: value on `test` with standard error over contexts."""
        models = self.stages | {trial.name: trial.scores for trial in self.others}
        return [
            {"model": name, "task": task, "value": score.value, "se": score.se, "n": len(score.correct)}
            for name, scores in models.items()
            for task, score in scores.items()
        ]

    def difference_rows(self) -> list[dict]:
        """What importance is worth, by task and as "mean" of the scored ones: {rival, task, value, se, n}.

        The winner less each of `random` and `attention kept`, and `narrowed` less each of `narrowed random`, averaged over
        the n draws. `se` is that of the mean over draws, which holds the error over contexts too; None for one draw.
        Positive is better for accuracies, negative for bits per character.
        """
        by_name, rows = {trial.name: trial for trial in self.others}, []
        for rival, ours in (
            ("random", self.winner),
            ("attention kept", self.winner),
            ("narrowed random", by_name.get("narrowed")),
        ):
            drawn = [t.scores for name, t in by_name.items() if name.rstrip(" 0123456789") == rival]
            if not drawn:
                continue
            leads = {task: [score.value - d[task].value for d in drawn] for task, score in ours.scores.items()}
            leads["mean"] = [mean_accuracy(ours.scores) - mean_accuracy(d) for d in drawn]
            for task, values in leads.items():
                se = standard_error(np.array(values)) if len(values) > 1 else None
                rows.append({"rival": rival, "task": task, "value": float(np.mean(values)), "se": se, "n": len(values)})
        return rows

    def loss_rows(self) -> list[dict]:
        """A row a record of each distillation: model, step, loss [nats]."""
        trials = [*self.depths, *self.candidates, self.winner, *self.others]
        return [{"model": trial.name, **record} for trial in trials for record in trial.history]


def _narrowed(target: Target, shape: Shape) -> bool:
    return (target.d_model, target.d_ff, target.n_mamba_heads) != (shape.d_model, shape.d_ff, shape.linear.n_heads)


def mean_accuracy(scores: dict[str, Score]) -> float:
    """The mean over the scored tasks, by which the winner is chosen."""
    return float(np.mean([scores[task].value for task in SCORED if task in scores]))


def _mean_se(scores: dict[str, Score]) -> float:
    errors = [scores[task].se for task in SCORED if task in scores]
    return math.sqrt(sum(se**2 for se in errors)) / len(errors)


def compress(study, folder: str | Path, budget: Budget) -> CompressionRun:
    """Prune and distil the NemotronH in `folder` to a budget, by `study.compression`, `study.common` and `study.tasks`.

    Candidates of all depths in `n_removed` and of all widths compete: of those that fit, the `n_candidates` whose logits are
    closest as they are cut are distilled for `rank_steps`, and the most accurate on split `select` is the winner. All that
    trains runs in `n_workers` processes. Raises BudgetTooSmall, before anything is measured if no choice of layers could fit,
    and before anything is trained otherwise; ValueError for tasks among which none is scored. Of equal accuracies the
    candidate that was closer before distillation is taken.
    """
    section = study.compression
    if not set(section.rows) & set(SCORED):
        raise ValueError(
            f"candidates are chosen by {', '.join(SCORED)}, got rows of {', '.join(section.rows)}; add one of them"
        )
    widths = (section.n_removed, section.d_model, section.d_ff, section.n_mamba_heads)
    space = Space(*map(tuple, widths))
    shape = nemotron.shape_of(AutoConfig.from_pretrained(folder), Path(folder).name)
    require_reachable(shape, space, budget)
    processes = workers(section.n_workers, n_threads=study.common.n_threads, module=__name__)
    with tempfile.TemporaryDirectory() as scratch, processes as run:
        original, tokenizer = surgery.load(folder, device=study.common.device)
        data = calibration(_mixture(study, tokenizer), section.n_calibration)
        single = single_removals(original, data)
        removed = remove_layers(original, data, max(*section.n_removed, *section.depths, 0), first=single)
        order = [removal.layer for removal in removed]
        fitting = [c.target for c in candidates(shape, order, space, budget)]

        trials = _Trials(study, str(folder), original, data, budget, run, scratch)
        closest = sorted(fitting, key=lambda target: trials.error(target, trials.importance(target)))
        wanted = {f"depth {shape.n_layers - n}": target_at(shape, order, n) for n in section.depths}
        wanted |= {f"candidate {i}": target for i, target in enumerate(closest[: section.n_candidates], 1)}
        chosen = {name: (target, trials.importance(target)) for name, target in wanted.items()}
        ranked, _ = trials.distilled(chosen, section.rank_steps, "select")
        competing = [trial for trial in ranked if trial.name.startswith("candidate")]
        best = max(competing, key=lambda trial: mean_accuracy(trial.scores)).target

        finals = {"winner": (best, trials.importance(best))}
        narrow = [trial for trial in competing if _narrowed(trial.target, shape)]
        if narrow:
            target = max(narrow, key=lambda trial: mean_accuracy(trial.scores)).target
            finals["narrowed"] = (target, trials.importance(target))
        for i in range(section.n_random):
            drawn = derive(study.common.seed, "random pruning", Path(folder).name, i)
            finals[f"random {i}"] = (random_target(shape, best, drawn), random_importance(shape, drawn))
        for i in range(section.n_controls):
            drawn = derive(study.common.seed, "controlled pruning", Path(folder).name, i)
            kept = random_target(shape, best, drawn, keep="attention")
            finals[f"attention kept {i}"] = (kept, random_importance(shape, drawn))
            if narrow:
                finals[f"narrowed random {i}"] = (target, random_importance(shape, drawn))
        (winner, *others), stages = trials.distilled(finals, section.final_steps, "test", stages_of="winner")
        model = NemotronHForCausalLM.from_pretrained(f"{scratch}/winner{DISTILLED}", dtype=torch.float32)
    return CompressionRun(
        model=model.to(study.common.device).eval(),
        tokenizer=tokenizer,
        shape=shape,
        budget=budget,
        whole=needed(shape, budget),
        single=single,
        removed=removed,
        depths=[trial for trial in ranked if trial not in competing],
        candidates=competing,
        winner=winner,
        others=others,
        stages=stages | {"final": winner.scores},
    )


def _mixture(study, tokenizer) -> Mixture:
    tasks, rows = build_tasks(study.tasks.sizes), study.compression.rows
    return Mixture(tasks, rows, tokenizer, study.tasks.seq_len, derive(study.common.seed, "compression"))


class _Trials:
    """Cuts targets out of the original, and has them distilled and scored by `run`, to which models go as folders."""

    def __init__(self, study, folder: str, original, data: Calibration, budget: Budget, run: Callable, scratch: str):
        self.study, self.folder, self.original, self.data, self.budget = study, folder, original, data, budget
        self.shape, self.run, self.scratch = nemotron.shape_of(original.config), run, scratch
        self._importance: dict[tuple[int, ...], Importance] = {}

    def importance(self, target: Target) -> Importance:
        """Of neurons, channels and heads once the target's layers alone are left."""
        if target.layers not in self._importance:
            how = self.study.compression.aggregate
            self._importance[target.layers] = measure(self.original, self.data, how=how, layers=target.layers)
        return self._importance[target.layers]

    def error(self, target: Target, importance: Importance) -> float:
        """Of the logits, as the target is cut."""
        return logit_error(self.original, apply(self.original, target, importance), self.data)

    def distilled(
        self, chosen: dict[str, tuple[Target, Importance]], n_steps: int, split: str, *, stages_of: str | None = None
    ) -> tuple[list[Trial], dict[str, dict[str, Score]]]:
        """A trial of each, and where `stages_of` names one, the scores of the original and of that one before distillation."""
        jobs = []
        for name, (target, importance) in chosen.items():
            jobs.append(_Job(name, f"{self.scratch}/{name}", n_steps))
            apply(self.original, target, importance).save_pretrained(jobs[-1].folder)
        if stages_of is not None:
            jobs += [_Job("original", self.folder, 0), _Job("pruned", f"{self.scratch}/{stages_of}", 0)]
        work = partial(_finish, study=self.study, folder=self.folder, split=split)
        found = self.run(work, _hands(jobs, self.study.compression.n_workers))
        done = dict(chain.from_iterable(found))  # name -> (history, scores)
        trials = [self._trial(name, *chosen[name], *done[name]) for name in chosen]
        return trials, {name: scores for name, (_, scores) in done.items() if name not in chosen}

    def _trial(self, name: str, target: Target, importance: Importance, history: list[dict], scores) -> Trial:
        pruned = target.of(self.shape)
        of_budget, traffic = needed(pruned, self.budget), bytes_per_token(pruned, self.budget)
        return Trial(
            name, target, n_params(pruned), of_budget, traffic, self.error(target, importance), history, scores
        )


def _teach(section, lessons: Lessons, student: NemotronHForCausalLM, n_steps: int, label: str) -> list[list[dict]]:
    settings = {"learning_rate": section.learning_rate, "warmup": section.warmup, "weights": section.weights}
    return distill(lessons, [student], n_steps=n_steps, label=label, **settings)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Distil the model in `folder` for `n_steps`, none for 0, and score it."""

    name: str
    folder: str
    n_steps: int


def _hands(jobs: Sequence[_Job], n: int) -> list[list[_Job]]:
    """The jobs of `n` processes, about equally long: the longest first, each to who has least."""
    hands: list[list[_Job]] = [[] for _ in range(min(n, len(jobs)))]
    for job in sorted(jobs, key=lambda job: -job.n_steps):
        min(hands, key=lambda hand: sum(other.n_steps + SCORE_STEPS for other in hand)).append(job)
    return hands


def _finish(
    hand: Sequence[_Job], *, study, folder: str, split: str
) -> list[tuple[str, tuple[list[dict], dict[str, Score]]]]:
    """The jobs of one process, sharing the original's logits -> (name, (history, scores on `split`)) of each.

    What was distilled is written beside the job's folder.
    """
    section, device = study.compression, study.common.device
    original, tokenizer = surgery.load(folder, device=device)
    lessons = Lessons(original, _mixture(study, tokenizer))
    paper = exam(study.tasks, tokenizer, split, study.common.seed, list(section.rows))
    done = []
    for job in hand:
        model = NemotronHForCausalLM.from_pretrained(job.folder, dtype=torch.float32).to(device).eval()
        history: list[dict] = []
        if job.n_steps:
            (history,) = _teach(section, lessons, model, job.n_steps, job.name)
            model.save_pretrained(job.folder + DISTILLED)
        done.append((job.name, (history, paper.score(model, label=job.name))))
    return done
