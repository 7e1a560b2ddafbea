"""Statistics over replicates: runs of the same cells for several teachers and seeds (notebook 16).

A replicate is a teacher with a seed. Cells within one see the same data and answer the same test examples, so their
differences are taken within a replicate and averaged over replicates. The standard error over replicates then holds
everything that another seed changes: initial weights, data and test examples. Few replicates know their own spread badly:
intervals use Student's t with n − 1 degrees of freedom.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import pandas as pd
from scipy import stats

from jetlab.paths import require
from jetlab.tasks import SCORED

REPLICATE = ["teacher", "seed"]
RECORDS = "records/h100"


@dataclass(frozen=True)
class Mean:
    """A mean over n replicates with its standard error, sd / √n, and its 95 % interval by Student's t."""

    value: float
    se: float
    n: int

    @property
    def half_width(self) -> float:
        return float(stats.t.ppf(0.975, self.n - 1) * self.se) if self.n > 1 else float("inf")

    @property
    def clear(self) -> bool:
        """Whether the 95 % interval leaves out 0."""
        return abs(self.value) > self.half_width


def read(record: str) -> pd.DataFrame:
    """The cells of records/h100/`record`, with the column `mean` over the scored tasks. Raises MissingInput without it."""
    cells = pd.read_csv(require(f"{RECORDS}/{record}/16_cells/cells.csv", "16_cells"))
    return pd.concat([cells, cells[list(SCORED)].mean(axis=1, skipna=False).rename("mean")], axis=1)


def mean_of(values: Sequence[float]) -> Mean:
    """Raises ValueError for fewer than two values, whose spread is not known."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        raise ValueError(f"a mean over replicates needs two or more of them, got {len(values)}; add seeds or teachers")
    return Mean(float(values.mean()), float(values.std(ddof=1) / np.sqrt(len(values))), len(values))


def table(cells: pd.DataFrame, column: str) -> pd.DataFrame:
    """One row a replicate, one column a name: `column` of the cells of one placement. Diverged runs leave out their replicate.

    Raises ValueError if a name has several cells in a replicate: choose one placement and one `equal` first.
    """
    if cells.duplicated([*REPLICATE, "name"]).any():
        raise ValueError("one cell for each name and replicate is needed, got several; choose a placement and `equal`")
    wide = cells.pivot(index=REPLICATE, columns="name", values=column)
    return wide[list(dict.fromkeys(cells["name"]))].dropna()


def summary(cells: pd.DataFrame, column: str) -> dict[str, Mean]:
    """The mean of each name."""
    wide = table(cells, column)
    return {name: mean_of(wide[name]) for name in wide}


def difference(cells: pd.DataFrame, first: str, second: str, column: str) -> Mean:
    """Mean of first − second, paired within replicates."""
    wide = table(cells[cells["name"].isin([first, second])], column)
    return mean_of(wide[first] - wide[second])


def contrast(cells: pd.DataFrame, first: Sequence[str], second: Sequence[str], column: str) -> Mean:
    """Mean of the names `first` minus the mean of the names `second`, paired within replicates."""
    wide = table(cells, column)
    return mean_of(wide[list(first)].mean(axis=1) - wide[list(second)].mean(axis=1))


def ranks(cells: pd.DataFrame, column: str) -> dict[str, Mean]:
    """The mean rank of each name, 1 the highest within a replicate; ties share their mean rank."""
    ranked = table(cells, column).rank(axis=1, ascending=False)
    return {name: mean_of(ranked[name]) for name in ranked}


def rank_correlation(
    first: pd.DataFrame, second: pd.DataFrame, column: str, *, n_draws: int = 4000, seed: int = 0
) -> tuple[float, float, float]:
    """Spearman's correlation of the means of the names that both have, and its 95 % interval by the bootstrap.

    A draw takes as many replicates as there are, with replacement, on either side by itself. Few names and few replicates
    make the interval wide; it holds what another set of seeds would change, not what other names would.
    """
    a, b = table(first, column), table(second, column)
    names = [name for name in a if name in b]
    a, b = a[names].to_numpy(), b[names].to_numpy()
    draw = np.random.default_rng(seed)

    def spearman(x: np.ndarray, y: np.ndarray) -> float:
        return float(np.corrcoef(stats.rankdata(x.mean(0)), stats.rankdata(y.mean(0)))[0, 1])

    def again(x: np.ndarray) -> np.ndarray:
        return x[draw.integers(len(x), size=len(x))]

    drawn = np.array([spearman(again(a), again(b)) for _ in range(n_draws)])
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    return spearman(a, b), float(low), float(high)


def detectable(cells: pd.DataFrame, first: str, second: str, column: str, power: float = 0.8) -> float:
    """The smallest true difference that these replicates would find clear of 0 with probability `power`.

    Solves P(|t'| > t_{0.975, n−1}) = power for a noncentral t' with δ = difference / se, at the standard error seen.
    """
    seen = difference(cells, first, second, column)
    freedom = seen.n - 1
    limit = stats.t.ppf(0.975, freedom)
    grid = np.linspace(0, 12, 2401)
    found = stats.nct.sf(limit, freedom, grid) + stats.nct.cdf(-limit, freedom, grid)
    return float(seen.se * grid[np.argmax(found >= power)])


def spread(cells: pd.DataFrame, columns: Sequence[str]) -> list[dict]:
    """A row for each placement and column: standard deviations over the seeds of a teacher, in the unit of the score.

    `one_run`: of a single score, pooled over names and teachers. `difference`: of the difference of two names within a
    replicate, pooled over pairs of names and teachers. Blank where no teacher has two seeds.
    """
    rows = []
    for placement, group in cells.groupby("placement", sort=False):
        for column in columns:
            wide = table(group, column)
            single, paired = [], []
            for _, own in wide.groupby(level="teacher"):
                if len(own) < 2:
                    continue
                single += [own[name].var(ddof=1) for name in wide]
                paired += [(own[a] - own[b]).var(ddof=1) for a, b in combinations(wide, 2)]
            rows.append(
                {
                    "placement": placement,
                    "score": column,
                    "one_run": float(np.sqrt(np.mean(single))) if single else None,
                    "difference": float(np.sqrt(np.mean(paired))) if paired else None,
                }
            )
    return rows
