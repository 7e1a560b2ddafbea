"""Which layers keep full attention: every selector sees a placement only through its score and counts what it asks for.

A placement is the sorted tuple of the full layers, counted from 0. Placements of up to two layers can all be evaluated
at the laptop's depth, so that each selector's regret against the exhaustive optimum is known exactly.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from transformers import PreTrainedModel

from jetlab.evaluate.suite import Exam, Score, normalised, standard_error
from jetlab.tasks import SCORED, TASKS
from jetlab.train.paths import placement_kinds

Placement = tuple[int, ...]
ScoreTable = dict[Placement, dict[str, Score]]


@dataclass(frozen=True)
class Choice:
    """What a selector chose, its score under the objective, and how many placements it looked at (forward passes)."""

    placement: Placement
    value: float
    n_evaluated: int


def all_placements(n_layers: int, max_budget: int) -> list[Placement]:
    """Every placement of 0 … `max_budget` full layers."""
    return [full for k in range(max_budget + 1) for full in combinations(range(n_layers), k)]


def uniform(n_layers: int, budget: int) -> Placement:
    """The rule stated beforehand: ⌊(2j + 1) L / 2k⌋ for j < k; {4} and {2, 6} at 8 layers."""
    return tuple((2 * j + 1) * n_layers // (2 * budget) for j in range(budget))


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


def select(name: str, score: Callable[[Placement], float], n_layers: int, budget: int, *, width: int = 3) -> Choice:
    """Choose `budget` full layers by the selector `name`; ties go to the smaller layers.

    `beam` grows placements layer by layer and keeps the best `width` (the paper's, Sec 2.2); `greedy` is width 1;
    `single_layer` takes the best layers of the one-layer map (Fig 5a); `uniform` looks at nothing; `exhaustive` at all.
    Raises ValueError for an unknown name or a budget that does not fit.
    """
    if not 1 <= budget <= n_layers:
        raise ValueError(f"budget must be 1 … {n_layers} full layers, got {budget}")
    seen: dict[Placement, float] = {}

    def ask(full: Placement) -> float:
        if full not in seen:
            seen[full] = score(full)
        return seen[full]

    def best(candidates: Iterable[Placement], n: int) -> list[Placement]:
        return sorted(candidates, key=lambda full: (-ask(full), full))[:n]

    match name:
        case "beam" | "greedy":
            beam: list[Placement] = [()]
            for _ in range(budget):
                grown = {
                    tuple(sorted((*full, layer))) for full in beam for layer in range(n_layers) if layer not in full
                }
                beam = best(sorted(grown), width if name == "beam" else 1)
            chosen = beam[0]
        case "single_layer":
            chosen = tuple(sorted(full[0] for full in best([(layer,) for layer in range(n_layers)], budget)))
        case "exhaustive":
            chosen = best(combinations(range(n_layers), budget), 1)[0]
        case "uniform":
            chosen = uniform(n_layers, budget)
        case _:
            raise ValueError(f"a selector must be beam, greedy, single_layer, exhaustive or uniform, got {name!r}")
    n_evaluated = len(seen)
    return Choice(chosen, score(chosen), n_evaluated)


def random_mean(table: ScoreTable, task: str, budget: int) -> tuple[float, float, int]:
    """Score of a random placement of `budget` layers: mean over all of them, standard error over contexts, contexts."""
    per_context = np.mean([scores[task].correct for full, scores in table.items() if len(full) == budget], axis=0)
    return float(per_context.mean()), standard_error(per_context), len(per_context)


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's ρ: the correlation of ranks, ties sharing their mean rank. 0 where one side is constant."""

    def ranks(values: list[float]) -> np.ndarray:
        values = np.asarray(values)
        return np.array([(values < x).sum() + ((values == x).sum() - 1) / 2 for x in values])

    ra, rb = ranks(a), ranks(b)
    if ra.std() == 0 or rb.std() == 0:
        return 0.0
    return float(np.corrcoef(ra, rb)[0, 1])
