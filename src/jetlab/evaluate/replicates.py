"""Statistics over seeds: runs of the same cells for several teachers and seeds (notebook 16).

A seed draws data, initial values and the examples of every split, for all teachers alike: within one, all cells see the same
data and answer the same test examples, and two teachers with one seed are not independent. So scores are averaged over
the teachers, differences are taken within a seed, and n counts seeds. The standard error holds what another seed changes;
the teachers are these few and no sample. Few seeds know their own spread badly: intervals are Student's, with n − 1 degrees
of freedom.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations, permutations

import numpy as np
import pandas as pd
from scipy import stats

from jetlab.paths import require
from jetlab.tasks import SCORED

RECORDS = "records/h100"


def read(record: str) -> pd.DataFrame:
    """The cells of records/h100/`record`, with the column `mean` over the scored tasks. Raises MissingInput without it."""
    cells = pd.read_csv(require(f"{RECORDS}/{record}/16_cells/cells.csv", "16_cells"))
    return pd.concat([cells, cells[list(SCORED)].mean(axis=1, skipna=False).rename("mean")], axis=1)


@dataclass(frozen=True)
class Mean:
    """A mean over n seeds with its standard error, sd / √n, and its 95 % interval by Student's t."""

    value: float
    se: float
    n: int

    @property
    def half_width(self) -> float:
        return float(stats.t.ppf(0.975, self.n - 1) * self.se)

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval leaves out 0."""
        return abs(self.value) > self.half_width


def mean_of(values: Sequence[float]) -> Mean:
    """Raises ValueError for fewer than two values, whose spread is not known."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"a mean over seeds needs two or more of them, got {len(values)}; add seeds")
    return Mean(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), len(values))


def runs(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row a teacher and seed, one column a name: `column` of the cells of one placement, as they came.

    Raises ValueError if a name has several cells there: choose one placement and one `equal` first.
    """
    if cells.duplicated(["teacher", "seed", "name"]).any():
        raise ValueError(
            "one cell for each name, teacher and seed is needed, got several; choose a placement and `equal`"
        )
    wide = cells.pivot(index=["seed", "teacher"], columns="name", values=column)
    return wide[list(dict.fromkeys(cells["name"]))]


def table(cells: pd.DataFrame, column: str, names: Sequence[str] | None = None) -> pd.DataFrame:
    """One row a seed, one column a name: the mean over teachers. A seed in which a run of `names` diverged is left out."""
    wide = runs(cells, column)
    wide = wide if names is None else wide[list(names)]
    seeds = wide.groupby(level="seed", sort=True)
    whole = seeds.size() == wide.index.get_level_values("teacher").nunique()
    return seeds.agg(lambda scores: scores.mean(skipna=False))[whole].dropna()


def summary(cells: pd.DataFrame, column: str) -> dict[str, Mean]:
    """The mean of each name."""
    return {name: mean_of(table(cells, column, [name])[name]) for name in dict.fromkeys(cells["name"])}


def contrast(cells: pd.DataFrame, first: Sequence[str], second: Sequence[str], column: str) -> Mean:
    """Mean of the names `first` minus the mean of the names `second`, paired within seeds."""
    wide = table(cells, column, [*first, *second])
    return mean_of(wide[list(first)].mean(axis=1) - wide[list(second)].mean(axis=1))


def difference(cells: pd.DataFrame, first: str, second: str, column: str) -> Mean:
    """Mean of first − second, paired within seeds."""
    return contrast(cells, [first], [second], column)


def cheapest_of_the_best(cells: pd.DataFrame, tasks: Sequence[str]) -> str:
    """The name with the fewest bytes of state, then parameters, among those as good as the best: `search.hardware.RULE`.

    As good is no further from the highest mean of `tasks` on split `select` than the standard error of that difference,
    paired within seeds. Raises ValueError for cells of several placements, or of one seed.
    """
    score = cells[[f"{task}_select" for task in tasks]].mean(axis=1, skipna=False)
    wide = table(cells.assign(score=score), "score")
    top = wide.mean().idxmax()
    size = cells.drop_duplicates("name").set_index("name")
    gaps = {name: mean_of(wide[top] - wide[name]) for name in wide}
    equal = [name for name, gap in gaps.items() if gap.value <= gap.se]
    return min(equal, key=lambda name: (size["state_bytes"][name], size["params"][name], name))


def ranks(cells: pd.DataFrame, column: str) -> dict[str, Mean]:
    """The mean rank of each name, 1 the highest within a seed; ties share their mean rank."""
    ranked = table(cells, column).rank(axis=1, ascending=False)
    return {name: mean_of(ranked[name]) for name in ranked}


def rank_correlation(first: pd.DataFrame, second: pd.DataFrame, column: str) -> tuple[Mean, float]:
    """Spearman's correlation of the names that both have, and the probability of one as large if the orders were unrelated.

    The mean is over the seeds that both have, each with its own orders; the probability is that of the orders of the
    means over seeds, one-sided, over all permutations of the names. The error holds what another seed changes, and not
    other names.
    """
    a, b = table(first, column), table(second, column)
    names, seeds = [name for name in a if name in b], a.index.intersection(b.index)
    a, b = a.loc[seeds, names].to_numpy(), b.loc[seeds, names].to_numpy()

    def spearman(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.corrcoef(stats.rankdata(x), stats.rankdata(y))[0, 1])

    of_means = spearman(a.mean(0), b.mean(0))
    shuffled = [spearman(a.mean(0)[list(order)], b.mean(0)) for order in permutations(range(len(names)))]
    chance = float(np.mean([rho >= of_means - 1e-12 for rho in shuffled]))
    return mean_of([spearman(x, y) for x, y in zip(a, b, strict=True)]), chance


def detectable(cells: pd.DataFrame, first: str, second: str, column: str, power: float = 0.8) -> float:
    """The smallest true difference that so many seeds would find clear of 0 with probability `power`.

    Solves P(|t'| > t_{0.975, n−1}) = power for a noncentral t' with δ = difference / se, at the standard error seen; ∞ if no
    difference up to 60 standard errors would do.
    """
    seen = difference(cells, first, second, column)
    freedom = seen.n - 1
    limit = stats.t.ppf(0.975, freedom)
    grid = np.linspace(0, 60, 6001)
    found = np.nan_to_num(stats.nct.sf(limit, freedom, grid)) >= power
    return float(seen.se * grid[np.argmax(found)]) if found.any() else float("inf")


def spread(cells: pd.DataFrame, columns: Sequence[str]) -> list[dict]:
    """A row for each placement and column: standard deviations over the seeds of a teacher, in the unit of the score.

    `one_run`: of a single score, pooled over names and teachers. `difference`: of the difference of two names with the same
    seed, pooled over pairs of names and teachers. Blank where no teacher has two seeds.
    """
    rows = []
    for placement, group in cells.groupby("placement", sort=False):
        for column in columns:
            single, paired = [], []
            for _, own in runs(group, column).dropna().groupby(level="teacher"):
                if len(own) < 2:
                    continue
                single += [own[name].var(ddof=1) for name in own]
                paired += [(own[a] - own[b]).var(ddof=1) for a, b in combinations(own, 2)]
            rows.append(
                {
                    "placement": placement,
                    "score": column,
                    "one_run": float(np.sqrt(np.mean(single))) if single else None,
                    "difference": float(np.sqrt(np.mean(paired))) if paired else None,
                }
            )
    return rows
