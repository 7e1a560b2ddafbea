"""What a decoding step's time depends on: least squares over measured steps (Sec 2.5: cache size, not parameters)."""

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import stats


def explain(times: Sequence[float], causes: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float]]:
    """Ordinary least squares of `times` on all `causes` at once with an intercept.

    cause -> slope with its standard error `se`, its p-value by Student's t, and `share`, the part of the mean time that it
    takes, slope · mean cause / mean time, with `share_se`. Shares of variance are not given: they say how far the causes
    were varied. The row "all" has the share of variance explained by all (R²) and the number of steps n. Raises ValueError
    unless there are more steps than coefficients.
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
    found = {}
    for i, name in enumerate(names, start=1):
        part = float(x[:, i - 1].mean() / y.mean())
        found[name] = {
            "slope": float(slopes[i]),
            "se": float(errors[i]),
            "p": float(2 * stats.t.sf(abs(slopes[i] / errors[i]), n - k - 1)),
            "share": float(slopes[i]) * part,
            "share_se": float(errors[i]) * part,
        }
    explained = float(1 - left @ left / ((y - y.mean()) @ (y - y.mean())))
    return found | {"all": {"explained": explained, "n": n}}
