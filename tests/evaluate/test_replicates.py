"""Specification of the statistics over replicates, against hand-made tables and textbook values."""

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from jetlab.evaluate import replicates


def cells(teachers=1, **by_name):
    """`by_name` maps a name to its scores: those of all seeds of teacher 0, then of teacher 1."""
    rows = []
    for name, scores in by_name.items():
        n_seeds = len(scores) // teachers
        for i, score in enumerate(scores):
            place = {"teacher": i // n_seeds, "seed": i % n_seeds, "placement": "none", "equal": "state"}
            rows.append({"name": name, "score": score, **place})
    return pd.DataFrame(rows)


SHARED = np.array([0.1, 0.5, 0.3, 0.9, 0.2, 0.6])  # what makes a seed hard or easy
NOISE = np.array([0.02, 0.04, 0.03, 0.05, 0.01, 0.03])


def test_a_mean_has_its_standard_error_and_the_interval_of_student():
    mean = replicates.mean_of([1.0, 2.0, 3.0, 6.0])
    assert mean.value == 3.0 and mean.n == 4
    assert mean.se == pytest.approx(np.std([1, 2, 3, 6], ddof=1) / 2)
    low, high = stats.t.interval(0.95, 3, loc=3.0, scale=mean.se)
    assert mean.half_width == pytest.approx((high - low) / 2)
    assert not mean.clear and replicates.mean_of([3.0, 3.1, 2.9]).clear


def test_one_seed_has_no_spread_and_says_so():
    with pytest.raises(ValueError, match="two or more of them, got 1; add seeds"):
        replicates.mean_of([0.5])


def test_differences_are_paired_within_seeds():
    table = cells(a=SHARED + NOISE, b=SHARED)
    gap = replicates.difference(table, "a", "b", "score")
    assert gap.value == pytest.approx(NOISE.mean()) and gap.se == pytest.approx(NOISE.std(ddof=1) / np.sqrt(6))
    assert gap.clear
    unpaired = np.hypot(*(replicates.summary(table, "score")[name].se for name in "ab"))
    assert gap.se < unpaired / 10  # what the names of a seed share is gone
    turned = replicates.difference(table, "b", "a", "score")
    assert turned.value == -gap.value


def test_a_contrast_is_between_means_of_groups():
    table = cells(a=SHARED, b=SHARED + 0.2, c=SHARED - NOISE)
    gap = replicates.contrast(table, ["a", "b"], ["c"], "score")
    assert gap.value == pytest.approx(0.1 + NOISE.mean())


def test_ranks_are_taken_within_seeds_and_ties_share_theirs():
    table = cells(a=SHARED + 1, b=SHARED, c=SHARED)
    ranks = replicates.ranks(table, "score")
    assert [ranks[name].value for name in "abc"] == [1.0, 2.5, 2.5]


def test_teachers_are_averaged_and_count_as_no_further_seeds():
    apart = np.array([0.3, 0.3, 0.3])  # a teacher on which the lead is larger, whatever the seed
    first, second = np.array([0.1, 0.2, 0.15]), np.array([0.1, 0.1, 0.1])
    table = cells(teachers=2, a=[*first, *(first + apart)], b=[*second, *second])
    gap = replicates.difference(table, "a", "b", "score")
    assert gap.n == 3 and gap.value == pytest.approx((first - second + apart / 2).mean())
    assert gap.se == pytest.approx((first - second).std(ddof=1) / np.sqrt(3))  # the teacher's part is in no seed's


def test_a_diverged_run_takes_its_seed_with_it_where_it_is_asked_for_and_nowhere_else():
    table = cells(a=SHARED + NOISE, b=[np.nan, *SHARED[1:]], c=SHARED)
    assert replicates.difference(table, "a", "b", "score").n == 5
    assert replicates.difference(table, "a", "c", "score").n == 6
    means = replicates.summary(table, "score")
    assert means["b"].n == 5 and means["c"].n == 6
    half = cells(teachers=2, a=[0.1, 0.2, 0.3, np.nan, 0.2, 0.3], b=[0.1] * 6)
    assert replicates.difference(half, "a", "b", "score").n == 2  # of both teachers or of none


def test_several_cells_of_a_name_are_refused():
    table = pd.concat([cells(a=SHARED), cells(a=SHARED).assign(placement="found")])
    with pytest.raises(ValueError, match="choose a placement and `equal`"):
        replicates.table(table, "score")


def test_the_detectable_difference_is_that_of_the_noncentral_t():
    table = cells(a=SHARED + NOISE, b=SHARED)
    effect = replicates.detectable(table, "a", "b", "score")
    se = replicates.difference(table, "a", "b", "score").se
    limit = stats.t.ppf(0.975, 5)
    power = stats.nct.sf(limit, 5, effect / se) + stats.nct.cdf(-limit, 5, effect / se)
    assert power == pytest.approx(0.8, abs=0.01)


def test_two_seeds_cannot_detect_what_many_errors_would_need():
    table = cells(a=[0.0, 1.0], b=[0.0, 0.0])
    assert replicates.detectable(table, "a", "b", "score", power=1.0) == float("inf")


def test_orders_that_agree_correlate_and_are_no_chance():
    levels = dict(zip("abcde", np.linspace(0, 1, 5), strict=True))
    first = cells(**{name: level + 0.001 * SHARED for name, level in levels.items()})
    turned = cells(**{name: -level + 0.001 * SHARED for name, level in levels.items()})
    mean, chance = replicates.rank_correlation(first, first, "score")
    assert (mean.value, mean.n, chance) == (pytest.approx(1.0), 6, pytest.approx(1 / 120))
    mean, chance = replicates.rank_correlation(first, turned, "score")
    assert (mean.value, chance) == (pytest.approx(-1.0), 1.0)
    some = first[first.name.isin(list("abd")) & (first.seed < 4)]
    mean, chance = replicates.rank_correlation(first, some, "score")
    assert (mean.value, mean.n, chance) == (
        pytest.approx(1.0),
        4,
        pytest.approx(1 / 6),
        # over the names and the seeds that both have
    )


def test_spread_is_within_teachers():
    table = cells(teachers=2, a=[0.0, 1.0, 10.0, 11.0], b=[0.0, 3.0, 10.0, 13.0])  # one teacher is 10 above the other
    (row,) = replicates.spread(table, ["score"])
    assert row["one_run"] == pytest.approx(np.sqrt((0.5 + 4.5) / 2))
    assert row["difference"] == pytest.approx(np.sqrt(2.0))
    (alone,) = replicates.spread(table[table.seed == 0], ["score"])
    assert alone["one_run"] is None and alone["difference"] is None


TASKS = ("retrieval", "math")


def test_the_rule_for_widths_reads_select_and_pairs_within_seeds():
    shared = {1: 0.0, 2: 0.3, 3: -0.2}  # what makes a seed easy or hard is no difference between settings
    shapes = (("large", 9, (0.6, 0.61, 0.605)), ("small", 5, (0.604, 0.6, 0.606)), ("poor", 1, (0.5, 0.49, 0.5)))
    rows = [
        {"name": name, "params": params, "state_bytes": 100, "teacher": 0, "seed": seed, "placement": "none"}
        | {"retrieval_select": score + shared[seed], "math_select": score + shared[seed]}
        for name, params, scores in shapes
        for seed, score in zip(shared, scores, strict=True)
    ]
    assert (
        replicates.cheapest_of_the_best(pd.DataFrame(rows), TASKS) == "small"
    )  # no further from the highest than its error, and cheaper
    with pytest.raises(ValueError, match="choose a placement and `equal`"):
        replicates.cheapest_of_the_best(pd.DataFrame(rows + [row | {"placement": "found"} for row in rows]), TASKS)
    with pytest.raises(ValueError, match="add seeds"):
        replicates.cheapest_of_the_best(pd.DataFrame([row for row in rows if row["seed"] == 1]), TASKS)
