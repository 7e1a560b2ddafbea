"""The whole recipe on one folder: order of removal, candidates that fit, a longer distillation, and random pruning beside it.

As in arXiv:2508.14444, Sec 4, with four differences. Depth and width compete at once, where the report chose its depth first
and its width at that depth; candidates of a width are cut from the original and not from a depth distilled before; all
distillation is short; and the winner's rival, layers, neurons, channels and heads drawn at random at the same bytes, trained
for as many steps on the same rows, is added here.
"""

import dataclasses
import math
import tempfile
from collections.abc import Sequence
from functools import partial
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from transformers import NemotronHForCausalLM

from jetlab.compress.budget import Budget, Needed, bytes_per_token, needed
from jetlab.compress.calibration import Calibration, calibration
from jetlab.compress.distill import Lessons, distill
from jetlab.compress.importance import Importance, Removal, logit_error, measure, remove_layers, single_removals
from jetlab.compress.prune import apply
from jetlab.compress.search import Space, candidates, random_importance, random_target, target_at
from jetlab.compress.target import Target
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import Score, exam, paired_difference, standard_error
from jetlab.models import nemotron, surgery
from jetlab.models.zoo import Shape, n_params
from jetlab.parallel import dealt, parallel_map
from jetlab.seeding import derive
from jetlab.tasks import SCORED, build_tasks

DISTILLED = "-distilled"  # behind the name of a folder


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
    or not, and `candidates` were distilled for `rank_steps` and scored on split `select`, `winner` and each of `random` for
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
    random: list[Trial]
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
        """A row a trial; `step` is depth, candidate, winner or random. Accuracies of the first two are on `select`."""
        steps = {"depth": self.depths, "candidate": self.candidates, "winner": [self.winner], "random": self.random}
        return [{"step": step, **trial.row()} for step, trials in steps.items() for trial in trials]

    def score_rows(self) -> list[dict]:
        """A row for each stage, and each random pruning, and task: value on `test` with standard error over contexts."""
        models = self.stages | {trial.name: trial.scores for trial in self.random}
        return [
            {"model": name, "task": task, "value": score.value, "se": score.se, "n": len(score.correct)}
            for name, scores in models.items()
            for task, score in scores.items()
        ]

    def difference_rows(self) -> list[dict]:
        """Winner − random by task, paired by context, a row a seed and one, "mean", for the mean over seeds.

        `se` is over contexts; `se_seeds` that of the mean over seeds, None for one seed. Positive is better for accuracies,
        negative for bits per character.
        """
        rows = []
        for task, score in self.winner.scores.items():
            rivals = [trial.scores[task] for trial in self.random]
            differences = [paired_difference(score, rival) for rival in rivals]
            rows += [
                {"task": task, "rival": trial.name, "value": value, "se": se, "n": n, "se_seeds": None}
                for trial, (value, se, n) in zip(self.random, differences, strict=True)
            ]
            average = dataclasses.replace(score, correct=np.mean([rival.correct for rival in rivals], axis=0))
            value, se, n = paired_difference(score, average)
            values = np.array([value for value, _, _ in differences])
            se_seeds = standard_error(values) if len(values) > 1 else None
            rows.append({"task": task, "rival": "mean", "value": value, "se": se, "n": n, "se_seeds": se_seeds})
        return rows

    def loss_rows(self) -> list[dict]:
        """A row a record of each distillation: model, step, loss [nats]."""
        trials = [*self.depths, *self.candidates, self.winner, *self.random]
        return [{"model": trial.name, **record} for trial in trials for record in trial.history]


def mean_accuracy(scores: dict[str, Score]) -> float:
    """The mean over the scored tasks, by which the winner is chosen."""
    return float(np.mean([scores[task].value for task in SCORED if task in scores]))


def _mean_se(scores: dict[str, Score]) -> float:
    errors = [scores[task].se for task in SCORED if task in scores]
    return math.sqrt(sum(se**2 for se in errors)) / len(errors)


def compress(study, folder: str | Path, budget: Budget) -> CompressionRun:
    """Prune and distil the NemotronH in `folder` to a budget, by `study.compression`, `study.common` and `study.tasks`.

    Candidates of all depths in `n_removed` and of all widths compete: of those that fit, the `n_candidates` whose logits are
    closest as they are cut are distilled for `rank_steps`, and the most accurate on split `select` is the winner. Ranking runs
    in this process, where all share the original's logits; the winner, random pruning and the scores on `test` in `n_workers`
    of their own. Raises BudgetTooSmall, before anything is trained, if nothing fits; ValueError for tasks among which none
    is scored. Of equal accuracies the candidate that was closer before distillation is taken.
    """
    section = study.compression
    if not set(section.rows) & set(SCORED):
        raise ValueError(
            f"candidates are chosen by {', '.join(SCORED)}, got rows of {', '.join(section.rows)}; add one of them"
        )
    original, tokenizer = surgery.load(folder, device=study.common.device)
    shape = nemotron.shape_of(original.config, Path(folder).name)
    mixture = _mixture(study, tokenizer)
    data = calibration(mixture, section.n_calibration)
    single = single_removals(original, data)
    removed = remove_layers(original, data, max(*section.n_removed, *section.depths, 0), first=single)
    order = [removal.layer for removal in removed]
    space = Space(
        *(tuple(values) for values in (section.n_removed, section.d_model, section.d_ff, section.n_mamba_heads))
    )
    fitting = [candidate.target for candidate in candidates(shape, order, space, budget)]

    ranking = _Ranking(study, original, tokenizer, mixture, data, budget)
    depths = ranking.rank({f"depth {shape.n_layers - n}": target_at(shape, order, n) for n in section.depths})
    closest = sorted(fitting, key=ranking.error)[: section.n_candidates]
    ranked = ranking.rank({f"candidate {i}": target for i, target in enumerate(closest, 1)})
    winner, rivals, stages, model = _finals(study, folder, ranking, max(ranked, key=_by_accuracy))
    return CompressionRun(
        model=model,
        tokenizer=tokenizer,
        shape=shape,
        budget=budget,
        whole=needed(shape, budget),
        single=single,
        removed=removed,
        depths=depths,
        candidates=ranked,
        winner=winner,
        random=rivals,
        stages=stages,
    )


def _finals(
    study, folder: str | Path, ranking: "_Ranking", best: Trial
) -> tuple[Trial, list[Trial], dict[str, dict[str, Score]], NemotronHForCausalLM]:
    """The best trial cut anew and random pruning of its bytes, each distilled for `final_steps`; scores on `test`.

    -> (winner, random, stages, the winner's model). Models go to and from the processes as folders.
    """
    section, seed, original = study.compression, study.common.seed, ranking.original
    cut = {"winner": (best.target, ranking.importance(best.target))}
    for i in range(section.n_random):
        drawn = derive(seed, "random pruning", i)
        target = random_target(ranking.shape, best.target, drawn)
        cut[f"random {i}"] = (target, random_importance(ranking.shape, drawn))
    with tempfile.TemporaryDirectory() as scratch:
        errors, jobs = {}, []
        for name, (target, scores) in cut.items():
            pruned = apply(original, target, scores)
            errors[name] = logit_error(original, pruned, ranking.data)
            jobs.append(_Job(name, f"{scratch}/{name}", section.final_steps))
            pruned.save_pretrained(jobs[-1].folder)
        jobs += [_Job("original", str(folder), 0), _Job("pruned", f"{scratch}/winner", 0)]
        hands = dealt(jobs, section.n_workers)
        finish = partial(_finish, study=study, folder=str(folder))
        found = parallel_map(finish, hands, n_workers=section.n_workers, n_threads=study.common.n_threads)
        done = dict(chain.from_iterable(found))  # name -> (history, scores)
        model = NemotronHForCausalLM.from_pretrained(f"{scratch}/winner{DISTILLED}", dtype=torch.float32)
    trials = [ranking.trial(name, target, errors[name], *done[name]) for name, (target, _) in cut.items()]
    stages = {name: done[name][1] for name in ("original", "pruned")} | {"final": done["winner"][1]}
    return trials[0], trials[1:], stages, model.to(study.common.device).eval()


def _mixture(study, tokenizer) -> Mixture:
    tasks, rows = build_tasks(study.tasks.sizes), study.compression.rows
    return Mixture(tasks, rows, tokenizer, study.tasks.seq_len, derive(study.common.seed, "compression"))


def _by_accuracy(trial: Trial) -> float:
    return mean_accuracy(trial.scores)


class _Ranking:
    """Trials of `rank_steps` each, whose students share the original's logits."""

    def __init__(
        self, study, original: NemotronHForCausalLM, tokenizer, mixture: Mixture, data: Calibration, budget: Budget
    ):
        self.section, self.original, self.data, self.budget = study.compression, original, data, budget
        self.shape = nemotron.shape_of(original.config)
        self.lessons = Lessons(original, mixture)
        self.exam = exam(study.tasks, tokenizer, "select", study.common.seed, list(self.section.rows))
        self._importance: dict[tuple[int, ...], Importance] = {}
        self._errors: dict[Target, float] = {}

    def importance(self, target: Target) -> Importance:
        """Of neurons, channels and heads once the target's layers alone are left."""
        if target.layers not in self._importance:
            how = self.section.aggregate
            self._importance[target.layers] = measure(self.original, self.data, how=how, layers=target.layers)
        return self._importance[target.layers]

    def cut(self, target: Target) -> NemotronHForCausalLM:
        return apply(self.original, target, self.importance(target))

    def error(self, target: Target) -> float:
        """Of the logits, as the target is cut."""
        if target not in self._errors:
            self._errors[target] = logit_error(self.original, self.cut(target), self.data)
        return self._errors[target]

    def trial(self, name: str, target: Target, error: float, history: list[dict], scores: dict[str, Score]) -> Trial:
        pruned = target.of(self.shape)
        of_budget, traffic = needed(pruned, self.budget), bytes_per_token(pruned, self.budget)
        return Trial(name, target, n_params(pruned), of_budget, traffic, error, history, scores)

    def rank(self, targets: dict[str, Target]) -> list[Trial]:
        trials = []
        for name, target in targets.items():
            student = self.cut(target)
            (history,) = _teach(self.section, self.lessons, student, self.section.rank_steps, name)
            scores = self.exam.score(student, label=name)
            trials.append(self.trial(name, target, self.error(target), history, scores))
        return trials


def _teach(section, lessons: Lessons, student: NemotronHForCausalLM, n_steps: int, label: str) -> list[list[dict]]:
    settings = {"learning_rate": section.learning_rate, "warmup": section.warmup, "weights": section.weights}
    return distill(lessons, [student], n_steps=n_steps, label=label, **settings)


@dataclasses.dataclass(frozen=True)
class _Job:
    """Distil the model in `folder` for `n_steps`, none for 0, and score it."""

    name: str
    folder: str
    n_steps: int


def _finish(hand: Sequence[_Job], *, study, folder: str) -> list[tuple[str, tuple[list[dict], dict[str, Score]]]]:
    """The jobs of one process, sharing the original's logits -> (name, (history, scores on `test`)) of each.

    What was distilled is written beside the job's folder.
    """
    section, device = study.compression, study.common.device
    original, tokenizer = surgery.load(folder, device=device)
    lessons = Lessons(original, _mixture(study, tokenizer))
    paper = exam(study.tasks, tokenizer, "test", study.common.seed, list(section.rows))
    done = []
    for job in hand:
        model = NemotronHForCausalLM.from_pretrained(job.folder, dtype=torch.float32).to(device).eval()
        history: list[dict] = []
        if job.n_steps:
            (history,) = _teach(section, lessons, model, job.n_steps, job.name)
            model.save_pretrained(job.folder + DISTILLED)
        done.append((job.name, (history, paper.score(model, label=job.name))))
    return done
