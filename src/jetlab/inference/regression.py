"""What a decoding step's time depends on: least squares over measured steps (Sec 2.5: cache size, not parameters)."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


def explain(times: Sequence[float], causes: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Ordinary least squares of `times` on all `causes` at once with an intercept.

    cause -> slope with its standard error, its p-value by Student's t, `unique`, the share of the variance of `times` that
    is lost without this cause, and `alone`, the share that it explains by itself. The row "all" has the share explained
    (R²) and the number of steps n. Raises ValueError unless there are more steps than coefficients.
    """
    y = np.asarray(times, dtype=float)
    names = list(causes)
    x = np.column_stack([np.asarray(causes[name], dtype=float) for name in names])
    n, k = x.shape
    if n <= k + 1:
        raise ValueError(f"a regression on {k} causes needs more than {k + 1} steps, got {n}; measure more settings")
    design = np.column_stack([np.ones(n), x])
    slopes, _, rank, _ = np.linalg.lstsq(design, y, rcond=None)
    if rank < k + 1:
        raise ValueError("the causes must not determine one another: vary each without the others")
    left = y - design @ slopes
    variance = left @ left / (n - k - 1)
    errors = np.sqrt(variance * np.diag(np.linalg.inv(design.T @ design)))
    explained = _share(y, x)
    found = {}
    for i, name in enumerate(names):
        others = np.delete(x, i, axis=1)
        found[name] = {
            "slope": float(slopes[i + 1]),
            "se": float(errors[i + 1]),
            "p": float(2 * stats.t.sf(abs(slopes[i + 1] / errors[i + 1]), n - k - 1)),
            "unique": explained - _share(y, others),
            "alone": _share(y, x[:, [i]]),
        }
    return found | {"all": {"explained": explained, "n": n}}


def _share(y: np.ndarray, x: np.ndarray) -> float:
    """R² of y on the columns of x and a constant."""
    design = np.column_stack([np.ones(len(y)), x])
    left = y - design @ np.linalg.lstsq(design, y, rcond=None)[0]
    return float(1 - left @ left / ((y - y.mean()) @ (y - y.mean())))
