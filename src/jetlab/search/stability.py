"""How far a ranking of layers can be trusted: over the tokens of a supernet, over its seeds and over teachers.

A history is what training a supernet returns, or its loss_*.csv: rows that at a check hold `tokens` and, with
`check_budget` 1, `{task}_layer{l}`, the objective with layer l full (Fig 5a of arXiv:2508.15884).
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from scipy import stats

from jetlab.search.selectors import rank_correlation
from jetlab.tasks import SCORED

Rows = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class Check:
    """The one-layer maps of a supernet after `tokens` tokens: task -> objective, layer by layer."""

    tokens: int
    maps: dict[str, list[float]]

    def top(self, task: str) -> int:
        """The layer that is worth most alone; of equal ones the smallest, as in `selectors.select`."""
        scores = self.maps[task]
        return scores.index(max(scores))


def checks(history: Rows) -> list[Check]:
    """The checks of a supernet, in order. Raises ValueError if there is none with one-layer maps."""
    found = []
    for row in history:
        maps = {task: [] for task in SCORED}
        for task, scores in maps.items():
            while _given(row.get(f"{task}_layer{len(scores)}")):
                scores.append(float(row[f"{task}_layer{len(scores)}"]))
        if all(maps.values()):
            found.append(Check(int(row["tokens"]), maps))
    if not found:
        raise ValueError(
            "a history needs checks of single layers, got none; train with n_checks >= 1, check_budget = 1"
        )
    return found


def stability(history: Rows) -> list[dict]:
    """Each check beside the last one, by task: Spearman's ρ of the maps, the top layer, 1 if it is the final one.

    At the last check ρ and `is_final` are 1 by construction; ρ is 0 where a map is constant.
    """
    every = checks(history)
    return [
        {
            "task": task,
            "tokens": check.tokens,
            "spearman": rank_correlation(check.maps[task], every[-1].maps[task]),
            "top": check.top(task),
            "is_final": int(check.top(task) == every[-1].top(task)),
        }
        for task in SCORED
        for check in every
    ]


def top_layers(histories: Mapping[str, Rows]) -> list[dict]:
    """The final top layer of each supernet, by task, and `since`: the tokens of the check since which it has been that."""
    rows = []
    for name, history in histories.items():
        every = checks(history)
        for task in SCORED:
            top, since = every[-1].top(task), every[-1].tokens
            for check in reversed(every):
                if check.top(task) != top:
                    break
                since = check.tokens
            rows.append({"supernet": name, "task": task, "top": top, "since": since})
    return rows


def map_agreement(histories: Mapping[str, Rows]) -> list[dict]:
    """Spearman's ρ of the maps of every two supernets after equally many tokens, by task.

    Supernets are named as in `supernet.members`, so that t0 and t0_s1 have one teacher.
    """
    every = {name: {check.tokens: check for check in checks(history)} for name, history in histories.items()}
    return [
        {
            "task": task,
            "a": a,
            "b": b,
            "same_teacher": int(teacher_of(a) == teacher_of(b)),
            "tokens": tokens,
            "spearman": rank_correlation(every[a][tokens].maps[task], every[b][tokens].maps[task]),
        }
        for a, b in combinations(every, 2)
        for tokens in sorted(set(every[a]) & set(every[b]))
        for task in SCORED
    ]


def teacher_of(name: str) -> str:
    """The teacher in a supernet's name: t1 of t1_s2."""
    return name.partition("_")[0]


def chance_beyond(n: int, errors: float = 2.0) -> float:
    """How often the mean of `n` draws around 0 lies more than `errors` of its standard errors from 0.

    Student's t with n − 1 degrees of freedom, both sides: 0.30 for two draws, 0.10 for six, 0.05 for many. With `n` = 1
    the error is not that of the draws but one over many contexts, and the normal distribution is taken.
    """
    if n < 1:
        raise ValueError(f"a mean needs at least one draw, got {n}")
    return float(2 * (stats.t.sf(errors, n - 1) if n > 1 else stats.norm.sf(errors)))


def _given(value: Any) -> bool:
    return value is not None and value == value  # NaN, pandas' blank, differs from itself
