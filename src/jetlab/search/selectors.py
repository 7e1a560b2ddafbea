"""Which layers keep full attention: every selector sees a supernet only through `Supernet` and counts what it asks for.

A placement is the sorted tuple of the full layers, counted from 0. Placements of up to two layers can all be evaluated
at the laptop's depth, so that what an exhaustive search would choose is known.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations, count
from math import comb
from typing import Protocol

import numpy as np
from transformers import PreTrainedModel

from jetlab.evaluate.suite import Exam, Score, normalised, standard_error
from jetlab.seeding import rng
from jetlab.tasks import SCORED, TASKS
from jetlab.train.paths import placement_kinds

Placement = tuple[int, ...]
ScoreTable = dict[Placement, dict[str, Score]]


SELECTORS = (
    "single_layer", "beam", "greedy_add", "greedy_remove", "kl", "logit_error", "gates", "uniform", "random", "exhaustive"
)  # fmt: skip
TASKLESS = ("kl", "logit_error")  # selectors that are objectives themselves, whatever the objective of the search


class Supernet(Protocol):
    """What a selector may ask.

    An objective is a scored task, "all" of them, or a distance from the all-attention architecture with a minus: "kl", the
    divergence on plain text, or "logit_error", the mean squared error of the logits on training rows.
    """

    n_layers: int

    def scores(self, placements: Iterable[Placement], objective: str) -> dict[Placement, float]:
        """What a search maximises, for each placement."""

    def n_tokens(self, objective: str) -> int:
        """Tokens that are read to score one placement."""

    def gates(self, budget: int, objective: str) -> tuple[Sequence[float], int]:
        """A gate for each layer, trained with all weights frozen, and the tokens of their training."""


@dataclass(frozen=True)
class Choice:
    """What a selector chose, its score under the objective, and the cost: placements looked at and tokens read."""

    placement: Placement
    value: float
    n_evaluated: int
    n_tokens: int


def all_placements(n_layers: int, max_budget: int) -> list[Placement]:
    """Every placement of 0 … `max_budget` full layers."""
    return [full for k in range(max_budget + 1) for full in combinations(range(n_layers), k)]


def uniform(n_layers: int, budget: int) -> Placement:
    """The rule stated beforehand: ⌊(2j + 1) L / 2k⌋ for j < k; {4} and {2, 6} at 8 layers."""
    return tuple((2 * j + 1) * n_layers // (2 * budget) for j in range(budget))


def random_placement(n_layers: int, budget: int, seed: int) -> Placement:
    """`budget` layers drawn without replacement, all placements equally likely."""
    return tuple(sorted(rng(seed, "random placement", budget).sample(range(n_layers), budget)))


def random_placements(n_layers: int, budget: int, n: int) -> list[Placement]:
    """`n` placements of `budget` layers, no two alike and all sets of them equally likely; every one if there are no more."""
    if comb(n_layers, budget) <= n:
        return list(combinations(range(n_layers), budget))
    drawn: dict[Placement, None] = {}
    for seed in count():
        drawn[random_placement(n_layers, budget, seed)] = None
        if len(drawn) == n:
            return list(drawn)


def evaluate(model: PreTrainedModel, kind: str, exam: Exam, placements: Iterable[Placement], label: str = "placements"):
    """The scores of a supernet under each placement -> {placement: {task: Score}}."""
    kinds = {full: placement_kinds(model.config.num_hidden_layers, full, kind) for full in placements}
    scores = exam.score_all(model, kinds.values(), label=label)
    return {full: scores[architecture] for full, architecture in kinds.items()}


def objective(scores: dict[str, Score], task: str, ceilings: dict[str, float] | None = None) -> float:
    """What a search maximises for `task`: its accuracy, or for knowledge minus the loss of the right answer (Sec 2.2).

    Task "all" is the mean of the scored families, each from 0 (chance) to 1 (`ceilings`, the teacher).
    """
    if task == "all":
        return float(np.mean([normalised(scores[name], ceilings[name]) for name in SCORED]))
    return scores[task].neg_loss if TASKS[task].objective == "neg_loss" else scores[task].value


def select(
    supernet: Supernet, budget: int, objective: str, *, selector: str = "beam", width: int = 3, seed: int = 0
) -> Choice:
    """Choose `budget` full layers for an objective; ties go to the smaller layers.

    `beam` grows placements layer by layer and keeps the best `width` (the paper's, Sec 2.2); `greedy_add` is width 1;
    `greedy_remove` starts from all layers full and gives up the cheapest; `single_layer` takes the best layers of the
    one-layer map (Fig 5a); `kl` those of the one-layer map of divergence on text, whatever the objective: the idea of
    KL-LS (arXiv:2512.20569), which distils one model a layer, read off the one supernet instead; `logit_error` starts
    from all layers full and gives up the one whose loss changes the logits least, whatever the objective; `gates` takes
    the largest gates; `uniform` and `random` (by `seed`) look at nothing, `exhaustive` at all.

    `logit_error` is how Nemotron Nano 2 drops layers (arXiv:2508.14444, Sec 4), forward passes on its training data only.
    There a layer is skipped, and what is left is made narrower; here a trained linear path takes the place of a layer's
    attention, so that the error measures how well it does so.

    The score of the choice itself is not counted as cost, nor are passes of the teacher.
    Raises ValueError for an unknown selector, and for a budget or a width that does not fit.
    """
    if selector not in SELECTORS:
        raise ValueError(f"a selector must be one of {', '.join(SELECTORS)}, got {selector!r}")
    n_layers = supernet.n_layers
    if not 1 <= budget <= n_layers:
        raise ValueError(f"budget must be 1 … {n_layers} full layers, got {budget}")
    if width < 1:
        raise ValueError(f"a beam keeps at least 1 placement, got width {width}")
    what = selector if selector in TASKLESS else objective
    seen: dict[Placement, float] = {}
    n_trained = 0

    def best(candidates: Iterable[Placement], n: int) -> list[Placement]:
        candidates = sorted(set(candidates))
        if new := [full for full in candidates if full not in seen]:
            seen.update(supernet.scores(new, what))
        return sorted(candidates, key=lambda full: (-seen[full], full))[:n]

    match selector:
        case "beam" | "greedy_add":
            beam: list[Placement] = [()]
            for _ in range(budget):
                grown = [
                    tuple(sorted((*full, layer))) for full in beam for layer in range(n_layers) if layer not in full
                ]
                beam = best(grown, width if selector == "beam" else 1)
            chosen = beam[0]
        case "greedy_remove" | "logit_error":
            chosen = tuple(range(n_layers))
            while len(chosen) > budget:
                chosen = best(combinations(chosen, len(chosen) - 1), 1)[0]
        case "single_layer" | "kl":
            chosen = tuple(sorted(full[0] for full in best([(layer,) for layer in range(n_layers)], budget)))
        case "gates":
            gates, n_trained = supernet.gates(budget, objective)
            chosen = tuple(sorted(sorted(range(n_layers), key=lambda layer: (-gates[layer], layer))[:budget]))
        case "exhaustive":
            chosen = best(combinations(range(n_layers), budget), 1)[0]
        case "uniform":
            chosen = uniform(n_layers, budget)
        case "random":
            chosen = random_placement(n_layers, budget, seed)
    n_tokens = len(seen) * supernet.n_tokens(what) + n_trained if seen else n_trained
    return Choice(chosen, supernet.scores([chosen], objective)[chosen], len(seen), n_tokens)


def random_mean(scores: Iterable[Score]) -> tuple[float, float, int]:
    """What a random placement scores, from the scores of all: their mean, its standard error over contexts, contexts."""
    per_context = np.mean([score.correct for score in scores], axis=0)
    return float(per_context.mean()), standard_error(per_context), len(per_context)


def sampling_error(values: Sequence[float], n_all: int) -> float:
    """Standard error of the mean of `values`, drawn without repeats from `n_all`: s/√n · √(1 − n/n_all); 0 if all are there."""
    return standard_error(np.asarray(values)) * (1 - len(values) / n_all) ** 0.5


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's ρ: the correlation of ranks, ties sharing their mean rank. 0 where one side is constant."""

    def ranks(values: list[float]) -> np.ndarray:
        values = np.asarray(values)
        return np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])

    ra, rb = ranks(a), ranks(b)
    if ra.std() == 0 or rb.std() == 0:
        return 0.0
    return float(np.corrcoef(ra, rb)[0, 1])
