"""Specification of the regression of decoding times, against numbers that were put in."""

import numpy as np
import pytest
from scipy import stats

from jetlab.inference.regression import explain


def steps(noise=0.0, n=40):
    draw = np.random.default_rng(0)
    cache, weights = draw.uniform(1, 5, n), draw.uniform(1, 2, n)
    return {"cache": cache, "weights": weights}, 2.0 + 0.3 * cache + 0.1 * weights + noise * draw.normal(size=n)


def test_slopes_that_were_put_in_come_out():
    causes, times = steps()
    found = explain(times, causes)
    assert found["cache"]["slope"] == pytest.approx(0.3) and found["weights"]["slope"] == pytest.approx(0.1)
    assert found["all"]["explained"] == pytest.approx(1.0)
    assert found["cache"]["share"] == pytest.approx(0.3 * causes["cache"].mean() / times.mean())


def test_one_cause_gives_what_scipy_gives():
    causes, times = steps(noise=0.2)
    found = explain(times, {"cache": causes["cache"]})["cache"]
    expected = stats.linregress(causes["cache"], times)
    assert found["slope"] == pytest.approx(expected.slope) and found["se"] == pytest.approx(expected.stderr)
    assert found["p"] == pytest.approx(expected.pvalue)
    whole = explain(times, {"cache": causes["cache"]})["all"]
    assert whole["explained"] == pytest.approx(expected.rvalue**2) and whole["n"] == 40


def test_a_share_does_not_depend_on_how_far_a_cause_was_varied():
    draw = np.random.default_rng(0)
    wide, narrow = draw.uniform(0, 4, 60), draw.uniform(1.9, 2.1, 60)
    found = explain(0.5 * wide + 0.5 * narrow, {"wide": wide, "narrow": narrow})
    assert found["wide"]["share"] == pytest.approx(found["narrow"]["share"], rel=0.2)


def test_a_cause_of_no_effect_has_none():
    causes, times = steps(noise=0.2)
    causes["luck"] = np.random.default_rng(1).normal(size=len(times))
    found = explain(times, causes)["luck"]
    assert found["p"] > 0.05 and abs(found["share"]) < 0.05


def test_too_few_steps_and_causes_that_are_one_are_refused():
    causes, times = steps(n=3)
    with pytest.raises(ValueError, match="2 causes needs more than 3 steps, got 3; measure more settings"):
        explain(times, causes)
    causes, times = steps()
    with pytest.raises(ValueError, match="must not determine one another"):
        explain(times, causes | {"twice": 2 * causes["cache"]})
