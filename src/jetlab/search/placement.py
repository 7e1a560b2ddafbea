"""The placement study on one supernet: every placement of a few layers scored on three splits, and read by every selector.

Split `search` is what selectors see, `select` decides the placement that later stages keep, `test` is what is reported.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np

from jetlab.config import PlacementStudy
from jetlab.evaluate.suite import Score, exam, paired_difference
from jetlab.parallel import parallel_map
from jetlab.search.selectors import (
    Placement,
    ScoreTable,
    all_placements,
    evaluate,
    objective,
    random_mean,
    select,
    uniform,
)
from jetlab.search.supernet import load, members
from jetlab.tasks import SCORED, SPLITS, SUB_AXES

SELECTORS = ("beam", "greedy", "single_layer", "uniform", "exhaustive")


@dataclass(frozen=True)
class PlacementRun:
    """All that the tables of one supernet say: `name` as in `supernet.members`.

    `tables` maps split to {placement: {task: Score}}, `full` to the teacher's own.
    """

    name: str
    teacher: str
    n_layers: int
    beam_width: int
    tables: dict[str, ScoreTable]
    full: dict[str, dict[str, Score]]

    @property
    def max_budget(self) -> int:
        return max(map(len, self.tables["test"]))

    def _score(self, split: str, task: str):
        ceilings = {name: score.value for name, score in self.full[split].items()}
        return lambda full: objective(self.tables[split][full], task, ceilings)

    def found(self, task: str, budget: int) -> Placement:
        """What beam search chooses for one task, on split `search`."""
        return select("beam", self._score("search", task), self.n_layers, budget, width=self.beam_width).placement

    def common(self, budget: int) -> Placement:
        """One placement for all: beam search on the mean of the normalised scores, on split `select`."""
        return select("beam", self._score("select", "all"), self.n_layers, budget, width=self.beam_width).placement

    def importance(self) -> list[dict]:
        """Fig 5a: the objective with one layer full, on split `search`, beside that of no full layer."""
        rows = []
        for task in SCORED:
            score = self._score("search", task)
            rows += [
                {"task": task, "layer": layer, "score": score((layer,)), "all_linear": score(())}
                for layer in range(self.n_layers)
            ]
        return rows

    def selectors(self) -> list[dict]:
        """Each selector's choice on split `search`, how many placements it looked at, and its regret on split `test`.

        Regret is the test score of the placement that an exhaustive search would choose less that of the one chosen; it
        can fall below zero, since both were chosen on other examples. `all` is the mean of the normalised scores.
        """
        rows = []
        for task in (*SCORED, "all"):
            seen, kept = self._score("search", task), self._score("test", task)
            for budget in range(1, self.max_budget + 1):
                choices = {s: select(s, seen, self.n_layers, budget, width=self.beam_width) for s in SELECTORS}
                optimum = kept(choices["exhaustive"].placement)
                rows += [
                    {
                        "task": task,
                        "budget": budget,
                        "selector": name,
                        "layers": " ".join(map(str, choice.placement)),
                        "regret": optimum - kept(choice.placement),
                        "forward_passes": choice.n_evaluated,
                    }
                    for name, choice in choices.items()
                ]
        return rows

    def pairs(self, task: str, split: str = "test") -> np.ndarray:
        """[layer, layer] scores of every pair of full layers, on the diagonal of single layers; NaN where not evaluated."""
        score, layers = self._score(split, task), range(self.n_layers)
        known = self.tables[split]
        both = [[tuple(sorted({a, b})) for b in layers] for a in layers]
        return np.array([[score(full) if full in known else np.nan for full in row] for row in both])

    def estimates(self) -> list[tuple[str, float, float, int]]:
        """(key, value, standard error, contexts) on split `test`, keys `{task}_k{budget}_{what}`; accuracies.

        `found` is chosen for the task, `common` for all tasks at once; differences are paired over contexts. Nothing is
        searched for a sub-axis, so it has no `found` and no `exhaustive`.
        """
        rows = []
        test = self.tables["test"]
        for axis, budget in product(SUB_AXES, range(1, self.max_budget + 1)):
            scores = {
                "common": test[self.common(budget)][axis],
                "uniform": test[uniform(self.n_layers, budget)][axis],
                "all_linear": test[()][axis],
                "teacher": self.full["test"][axis],
            }
            rows += [(f"{axis}_k{budget}_{what}", s.value, s.se, len(s.correct)) for what, s in scores.items()]
            rows.append((f"{axis}_k{budget}_random", *random_mean(test, axis, budget)))
        for task in SCORED:
            for budget in range(1, self.max_budget + 1):
                key = f"{task}_k{budget}"
                search = self._score("search", task)
                best = select("exhaustive", search, self.n_layers, budget).placement
                scores = {
                    "found": test[self.found(task, budget)][task],
                    "common": test[self.common(budget)][task],
                    "uniform": test[uniform(self.n_layers, budget)][task],
                    "exhaustive": test[best][task],
                    "all_linear": test[()][task],
                    "teacher": self.full["test"][task],
                }
                rows += [(f"{key}_{what}", s.value, s.se, len(s.correct)) for what, s in scores.items()]
                rows.append((f"{key}_random", *random_mean(test, task, budget)))
                rows.append((f"{key}_found_minus_uniform", *paired_difference(scores["found"], scores["uniform"])))
                others = [s[task].correct for full, s in test.items() if len(full) == budget]
                rows.append((f"{key}_found_minus_random", *_paired(scores["found"].correct, np.mean(others, axis=0))))
        return rows


def _paired(a: np.ndarray, b: np.ndarray) -> tuple[float, float, int]:
    difference = a - b
    return float(difference.mean()), float(difference.std(ddof=1) / len(difference) ** 0.5), len(difference)


def _search(member: tuple[str, str, str, int], study: PlacementStudy) -> PlacementRun:
    name, teacher, weights, _ = member
    model, tokenizer = load(study.supernet, teacher, weights)
    n_layers = model.config.num_hidden_layers
    placements = all_placements(n_layers, study.max_budget)
    tables, full = {}, {}
    for split in SPLITS[1:]:
        names = (*SCORED, *SUB_AXES) if split == "test" else SCORED  # the others are no objective
        paper = exam(study.tasks, tokenizer, split, study.common.seed, names)
        everything = tuple(range(n_layers))
        scores = evaluate(model, study.supernet.block, paper, [*placements, everything], f"placements, {split}")
        full[split] = scores.pop(everything)
        tables[split] = scores
    return PlacementRun(name, teacher, n_layers, study.beam_width, tables, full)


def search(study: PlacementStudy, teachers: list[str], weights_dir: str | Path) -> list[PlacementRun]:
    """Score every placement of up to `max_budget` layers on each supernet of each teacher, side by side."""
    every = members(study.supernet, teachers, weights_dir)
    return parallel_map(partial(_search, study=study), every, n_threads=study.common.n_threads)
