"""Which kind of mixer each layer gets under a budget of state and cache bytes, instead of a number of full layers.

An architecture names the kind of every layer, e.g. linear, sliding and full attention: n_kinds^n_layers of them, 6561 with
three kinds in eight layers. Its bytes at a context length are the sum over its layers, so none has to be built for them.
The models of the paper (arXiv:2508.15884, Tables 7-9) mix these three kinds; it chose them in two searches (Sec 3.1), by a
number of layers. Here one supernet holds all three, and bytes are the budget.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from jetlab.config import CacheBudgetStudy
from jetlab.data.packing import Mixture
from jetlab.evaluate.suite import Score, exam, standard_error
from jetlab.models import surgery
from jetlab.models.surgery import LayerKinds
from jetlab.parallel import parallel_map
from jetlab.paths import resolve
from jetlab.search.placement import OBJECTIVES
from jetlab.search.selectors import objective
from jetlab.search.supernet import members
from jetlab.seeding import derive, rng
from jetlab.tasks import SCORED, TASKS, build_tasks
from jetlab.train.loop import file_digest
from jetlab.train.paths import Law, train_paths

LETTERS = {"attention": "F", "sliding_attention": "W"}  # full, window; any other kind is linear, L
QUANTILES = {"q05": 0.05, "q50": 0.5, "q95": 0.95, "best": 1.0}
LayerBytes = Sequence[dict[str, int]]
"""Bytes of each kind in each layer at one context length, as `surgery.path_bytes` gives them."""


@dataclass(frozen=True)
class Point:
    """An architecture, its bytes of state and cache (lower is better), and its value (higher is better)."""

    kinds: LayerKinds
    n_bytes: int
    value: float


@dataclass(frozen=True)
class Grown:
    """The best architecture that a beam saw, and how many it looked at."""

    best: Point
    n_evaluated: int


def all_architectures(n_layers: int, kinds: Sequence[str], max_changed: int | None = None) -> list[LayerKinds]:
    """Every choice of one of `kinds` for each layer, len(kinds)^n_layers in all; the last layer varies first.

    With `max_changed` only those in which at most so many layers differ from `kinds[0]`: 17 at 1, three kinds, eight layers.
    """
    every = product(kinds, repeat=n_layers)
    return [each for each in every if max_changed is None or n_changed(each, kinds[0]) <= max_changed]


def n_changed(architecture: LayerKinds, kind: str) -> int:
    """Layers that are not of `kind`."""
    return sum(other != kind for other in architecture)


def architecture_bytes(layer_bytes: LayerBytes, kinds: LayerKinds) -> int:
    """Bytes of state and cache of an architecture: what `surgery.state_bytes` counts when it is active."""
    return sum(of[kind] for of, kind in zip(layer_bytes, kinds, strict=True))


def measure(
    architectures: Iterable[LayerKinds], score: Callable[[LayerKinds], float], layer_bytes: LayerBytes
) -> list[Point]:
    """Each architecture with its bytes and its score, e.g. `lambda kinds: objective(table[kinds], task)`."""
    return [Point(kinds, architecture_bytes(layer_bytes, kinds), score(kinds)) for kinds in architectures]


def pareto_front(points: Iterable[Point]) -> list[Point]:
    """The points that no other matches in both bytes and value and beats in one, from few bytes to many.

    Of points equal in both the one whose kinds sort first is kept.
    """
    front: list[Point] = []
    for point in sorted(points, key=lambda point: (point.n_bytes, -point.value, point.kinds)):
        if not front or point.value > front[-1].value:
            front.append(point)
    return front


def best_first(point: Point) -> tuple:
    """Sorts by value, then bytes, then kinds."""
    return -point.value, point.n_bytes, point.kinds


def grow(
    score: Callable[[LayerKinds], float],
    layer_bytes: LayerBytes,
    n_layers: int,
    kinds: Sequence[str],
    budget_bytes: int,
    width: int,
    max_changed: int | None = None,
) -> Grown:
    """Beam search within `budget_bytes`; `kinds` goes from the cheapest to the costliest, e.g. linear, sliding, attention.

    From `kinds[0]` in every layer, a move gives one layer any of the kinds behind its own. At each number of moves the best
    `width` architectures that fit the budget go on; one that does not fit is never scored, nor one in which more than
    `max_changed` layers differ from `kinds[0]`. With two kinds this is the beam of `selectors.select`, but for keeping
    fewer full layers where these score higher. Ties go to fewer bytes, then to the kinds that sort first.
    Raises ValueError if sizes do not fit together or the budget does not hold the architecture to begin with.
    """
    if len(layer_bytes) != n_layers or width < 1 or not kinds:
        raise ValueError(
            f"grow needs bytes for each of n_layers layers, a width ≥ 1 and at least one kind, "
            f"got {len(layer_bytes)} of {n_layers}, {width} and {len(kinds)}"
        )
    start = (kinds[0],) * n_layers
    needed = architecture_bytes(layer_bytes, start)
    if needed > budget_bytes:
        raise ValueError(
            f"budget_bytes must hold {kinds[0]} in every layer, {needed} bytes, got {budget_bytes}; raise it to that"
        )
    costlier = {kind: kinds[rank + 1 :] for rank, kind in enumerate(kinds)}
    seen: dict[LayerKinds, Point] = {}

    def ask(architecture: LayerKinds) -> Point:
        if architecture not in seen:
            n_bytes = architecture_bytes(layer_bytes, architecture)
            seen[architecture] = Point(architecture, n_bytes, score(architecture))
        return seen[architecture]

    beam = [ask(start)]
    while beam:
        grown = {
            (*point.kinds[:layer], kind, *point.kinds[layer + 1 :])
            for point in beam
            for layer in range(n_layers)
            for kind in costlier[point.kinds[layer]]
        }
        fitting = sorted(
            each
            for each in grown
            if architecture_bytes(layer_bytes, each) <= budget_bytes
            and (max_changed is None or n_changed(each, kinds[0]) <= max_changed)
        )
        beam = sorted(map(ask, fitting), key=best_first)[:width]
    return Grown(min(seen.values(), key=best_first), len(seen))


def estimate(
    scores: Mapping[str, Score], task: str, ceilings: Mapping[str, float], other: Mapping[str, Score] | None = None
) -> tuple[float, float]:
    """`selectors.objective` with its standard error over contexts; given `other`, scores less other, paired.

    For "all" the variances of the four families add, since each has contexts of its own.
    """
    mean = variance = 0.0
    for name in SCORED if task == "all" else (task,):
        score, scale = scores[name], 1.0
        by_loss = task != "all" and TASKS[name].objective == "neg_loss"
        values = -score.loss if by_loss else score.correct
        if other is not None:
            values = values - (-other[name].loss if by_loss else other[name].correct)
        elif task == "all":
            values = values - score.chance
        if task == "all":
            scale = len(SCORED) * max(ceilings[name] - score.chance, 1e-9)
        mean += float(values.mean()) / scale
        variance += (standard_error(values) / scale) ** 2
    return mean, math.sqrt(variance)


def spell(kinds: LayerKinds) -> str:
    """A letter a layer, the input's first: F full attention, W window, L linear."""
    return "".join(LETTERS.get(kind, "L") for kind in kinds)


def unspell(letters: str, linear: str) -> LayerKinds:
    """The kinds that `spell` wrote; L stands for `linear`."""
    kinds = {letter: kind for kind, letter in LETTERS.items()} | {"L": linear}
    return tuple(kinds[letter] for letter in letters)


@dataclass(frozen=True)
class CacheBudgetRun:
    """One supernet of three kinds, searched: `kinds` are linear, sliding and full, `values` of split `search`.

    `values` maps objective to the value of each architecture in which at most `max_changed` layers are not linear.
    `budgets` maps a budget, in full layers, to its bytes. `test` holds the scores on split `test` of `reported()`.
    """

    name: str
    kinds: LayerKinds
    layer_bytes: LayerBytes
    values: dict[str, dict[LayerKinds, float]]
    budgets: dict[float, int]
    beam_width: int
    max_changed: int
    history: list[dict]
    test: dict[LayerKinds, dict[str, Score]]

    @property
    def n_layers(self) -> int:
        return len(self.layer_bytes)

    def points(self, task: str, kinds: Sequence[str] | None = None) -> list[Point]:
        """Every architecture that was scored, or those of some `kinds` only."""
        values = self.values[task]
        chosen = [each for each in values if kinds is None or set(each) <= set(kinds)]
        return measure(chosen, values.__getitem__, self.layer_bytes)

    def best(self, task: str, budget_bytes: int, kinds: Sequence[str] | None = None) -> Point:
        """The exact optimum within a budget, of some `kinds` only if these are given."""
        return min((p for p in self.points(task, kinds) if p.n_bytes <= budget_bytes), key=best_first)

    def grown(self, task: str, budget_bytes: int) -> Grown:
        """What the beam finds within a budget."""
        score = self.values[task].__getitem__
        return grow(score, self.layer_bytes, self.n_layers, self.kinds, budget_bytes, self.beam_width, self.max_changed)

    def references(self) -> list[LayerKinds]:
        """Without windows and at most two full layers, and all layers of one kind."""
        linear, _, full = self.kinds
        few = all_architectures(self.n_layers, (linear, full), 2)
        return list(dict.fromkeys([*few, *((kind,) * self.n_layers for kind in self.kinds)]))

    def reported(self) -> list[LayerKinds]:
        """What is scored on split `test`: references, fronts, and what is best or grown within each budget."""
        linear, _, full = self.kinds
        found = self.references()
        for task in OBJECTIVES:
            found += [point.kinds for point in pareto_front(self.points(task))]
            for budget in self.budgets.values():
                found += [self.best(task, budget).kinds, self.best(task, budget, (linear, full)).kinds]
                found.append(self.grown(task, budget).best.kinds)
        return sorted(set(found))

    def _row(self, task: str, kinds: LayerKinds, prefix: str = "") -> dict:
        """Letters, bytes, value on split `search` (None if it was not scored there), value ± se on split `test`."""
        value, se = self._on_test(task, kinds)
        return {
            f"{prefix}kinds": spell(kinds),
            f"{prefix}bytes": architecture_bytes(self.layer_bytes, kinds),
            f"{prefix}value": self.values[task].get(kinds),
            f"{prefix}test": value,
            f"{prefix}test_se": se,
        }

    def _on_test(self, task: str, kinds: LayerKinds, other: LayerKinds | None = None) -> tuple[float, float]:
        teacher = self.test[(self.kinds[-1],) * self.n_layers]
        ceilings = {name: score.value for name, score in teacher.items()}
        return estimate(self.test[kinds], task, ceilings, None if other is None else self.test[other])

    def front_rows(self) -> list[dict]:
        """The Pareto front of each objective on split `search`, from few bytes to many."""
        fronts = {task: pareto_front(self.points(task)) for task in OBJECTIVES}
        return [
            {"teacher": self.name, "objective": task, **self._row(task, point.kinds)}
            for task, front in fronts.items()
            for point in front
        ]

    def reference_rows(self) -> list[dict]:
        """`references` under each objective."""
        every = product(OBJECTIVES, self.references())
        return [{"teacher": self.name, "objective": task, **self._row(task, kinds)} for task, kinds in every]

    def level_rows(self) -> list[dict]:
        """How values on split `search` spread over architectures of equal bytes, by objective: quantiles and the best."""
        rows = []
        for task in OBJECTIVES:
            levels = defaultdict(list)
            for point in self.points(task):
                levels[point.n_bytes].append(point.value)
            for n_bytes, values in sorted(levels.items()):
                spread = {name: float(np.quantile(values, share)) for name, share in QUANTILES.items()}
                rows.append({"teacher": self.name, "objective": task, "bytes": n_bytes, "n": len(values), **spread})
        return rows

    def budget_rows(self) -> list[dict]:
        """For each objective and budget the grown architecture, the exact optimum `best_…`, and that without windows `two_…`.

        `regret` is the optimum's value less the grown one's, both on split `search`, so never negative; `n_evaluated` of
        `n_fitting` architectures within the budget were looked at. `gain` ± `gain_se` is what the third kind brings on
        split `test`: the optimum less that without windows, paired over contexts.
        """
        linear, _, full = self.kinds
        rows = []
        for task, (budget, budget_bytes) in product(OBJECTIVES, self.budgets.items()):
            grown, best = self.grown(task, budget_bytes), self.best(task, budget_bytes)
            two = self.best(task, budget_bytes, (linear, full))
            gain, gain_se = self._on_test(task, best.kinds, two.kinds)
            rows.append(
                {
                    "teacher": self.name,
                    "objective": task,
                    "budget": budget,
                    "budget_bytes": budget_bytes,
                    **self._row(task, grown.best.kinds),
                    **self._row(task, best.kinds, "best_"),
                    **self._row(task, two.kinds, "two_"),
                    "regret": best.value - grown.best.value,
                    "n_evaluated": grown.n_evaluated,
                    "n_fitting": sum(point.n_bytes <= budget_bytes for point in self.points(task)),
                    "gain": gain,
                    "gain_se": gain_se,
                }
            )
        return rows


def kinds_of_layers(study: CacheBudgetStudy) -> LayerKinds:
    """Linear, sliding and full: the three kinds of each layer, from cheap to costly."""
    return study.supernet.block, "sliding_attention", "attention"


def build(study: CacheBudgetStudy, teacher: str | Path, seed: int) -> tuple[PreTrainedModel, object]:
    """An untrained supernet of three kinds over the teacher in a folder, and its tokeniser.

    Only the linear paths have weights of their own, drawn as in `supernet.build`; a window is the teacher's attention.
    """
    model, tokenizer = surgery.load(teacher, device=study.common.device)
    torch.manual_seed(derive(seed, "supernet") % 2**32)
    new, dims = kinds_of_layers(study)[:2], study.supernet.dims.block(model.config.hidden_size)
    return surgery.wrap(model, new, dims, window=study.window), tokenizer


def costs(study: CacheBudgetStudy, model: PreTrainedModel) -> LayerBytes:
    """Bytes of each kind in each layer at `context_tokens`: keys and values in bf16, linear states in fp32.

    Raises ValueError unless a layer's bytes grow from linear over sliding to full, as the search needs it.
    """
    layer_bytes = surgery.path_bytes(model, study.context_tokens, torch.bfloat16)
    for layer, of in enumerate(layer_bytes):
        linear, sliding, full = (of[kind] for kind in kinds_of_layers(study))
        if not linear <= sliding <= full:
            raise ValueError(
                f"bytes must grow from linear over sliding to full, got {linear}, {sliding}, {full} in layer {layer}; "
                f"raise window (now {study.window}) or context_tokens (now {study.context_tokens})"
            )
    return layer_bytes


def spread_law(kinds: Sequence[str], n_layers: int, seed: int) -> Law:
    """A number of layers uniform in 0 … n_layers − 1, that many layers, and for each any of `kinds` but the first, alike.

    So the cheap end of the front gets its share of the training: with every architecture equally likely all linear
    is drawn in one of 6561 steps. And each path has a layer of `kinds[0]`, without which nothing trains.
    """

    def law(step: int) -> LayerKinds:
        draw = rng(seed, "spread path", step)
        others = draw.sample(range(n_layers), draw.randrange(n_layers))
        return tuple(draw.choice(kinds[1:]) if layer in others else kinds[0] for layer in range(n_layers))

    return law


def train(study: CacheBudgetStudy, model: PreTrainedModel, tokenizer, name: str, teacher: str, seed: int) -> list[dict]:
    """Train the linear paths over paths of `spread_law`, layer-local phase first. Returns the loss curve."""
    training = study.supernet.training
    mixture = Mixture(build_tasks(study.tasks.sizes), training.rows, tokenizer, study.tasks.seq_len, seed)
    return train_paths(
        model,
        mixture,
        spread_law(kinds_of_layers(study), model.config.num_hidden_layers, seed),
        training,
        label=f"three kinds {name}",
        resume_key=[study.model_dump(), seed, file_digest(Path(teacher) / "model.safetensors")],
    )


def _search(member: tuple[str, str, str, int], study: CacheBudgetStudy) -> CacheBudgetRun:
    name, teacher, _, seed = member
    model, tokenizer = build(study, teacher, seed)
    kinds, layer_bytes = kinds_of_layers(study), costs(study, model)
    history = train(study, model, tokenizer, name, teacher, seed)
    n_layers = len(layer_bytes)
    full, wanted = (kinds[-1],) * n_layers, all_architectures(n_layers, kinds, study.max_changed)

    def scored(split: str, architectures: Iterable[LayerKinds]) -> dict[LayerKinds, dict[str, Score]]:
        paper = exam(study.tasks, tokenizer, split, study.common.seed, SCORED)
        return paper.score_all(model, architectures, label=f"architectures {name}, {split}")

    table = scored("search", [*wanted, full])
    ceilings = {task: score.value for task, score in table[full].items()}
    values = {task: {each: objective(table[each], task, ceilings) for each in wanted} for task in OBJECTIVES}
    linear = architecture_bytes(layer_bytes, (kinds[0],) * n_layers)
    one_full = max(of[kinds[-1]] - of[kinds[0]] for of in layer_bytes)
    budgets = {budget: linear + int(budget * one_full) for budget in study.budgets}
    run = CacheBudgetRun(
        name, kinds, layer_bytes, values, budgets, study.beam_width, study.max_changed, history, test={}
    )
    return replace(run, test=scored("test", run.reported()))


def search(study: CacheBudgetStudy) -> list[CacheBudgetRun]:
    """Train a supernet of three kinds for each teacher and score its architectures, teachers side by side."""
    teachers = [str(resolve(folder)) for folder in study.teachers]
    every = members(study.supernet.model_copy(update={"n_seeds": 1}), teachers, "")
    return parallel_map(partial(_search, study=study), every, n_threads=study.common.n_threads)
