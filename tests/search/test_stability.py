"""Specification of what the study calls a stable ranking, on maps that are written down here."""

import math

import pytest

from jetlab.search.stability import chance_beyond, checks, map_agreement, stability, teacher_of, top_layers
from jetlab.tasks import SCORED


def check(tokens, scores):
    return {"tokens": tokens} | {f"{task}_layer{i}": score for task in SCORED for i, score in enumerate(scores)}


NO_CHECK = {"tokens": 15, "loss": 1.0, "math_layer0": math.nan}  # a logged step between checks, as pandas reads it
REVERSED_THEN_RIGHT = [
    check(10, [0.3, 0.2, 0.1]),
    NO_CHECK,
    check(20, [0.1, 0.2, 0.3]),
    check(30, [0.2, 0.1, 0.3]),
    check(40, [0.1, 0.2, 0.3]),
]


def test_only_rows_with_maps_are_checks():
    assert [c.tokens for c in checks(REVERSED_THEN_RIGHT)] == [10, 20, 30, 40]
    with pytest.raises(ValueError, match="check_budget = 1"):
        checks([NO_CHECK, {"tokens": 20, "math_all_linear": 0.5}])


def test_stability_compares_each_check_with_the_last_one():
    rows = [row for row in stability(REVERSED_THEN_RIGHT) if row["task"] == "math"]
    assert [row["spearman"] for row in rows] == pytest.approx([-1.0, 1.0, 0.5, 1.0])  # 1 − 6 Σd² / n(n² − 1)
    assert [row["top"] for row in rows] == [0, 2, 2, 2]
    assert [row["is_final"] for row in rows] == [0, 1, 1, 1]
    assert {row["task"] for row in stability(REVERSED_THEN_RIGHT)} == set(SCORED)


def test_of_equal_layers_the_smallest_is_on_top():
    assert checks([check(10, [0.1, 0.9, 0.9])])[0].top("code") == 1


def test_the_top_layer_counts_since_it_last_changed():
    back_and_forth = [check(10, [0.0, 1.0]), check(20, [1.0, 0.0]), check(30, [0.0, 1.0])]
    rows = top_layers({"t0": REVERSED_THEN_RIGHT, "t1": back_and_forth})
    by_name = {row["supernet"]: row for row in rows if row["task"] == "retrieval"}
    assert (by_name["t0"]["top"], by_name["t0"]["since"]) == (2, 20)
    assert (by_name["t1"]["top"], by_name["t1"]["since"]) == (1, 30)


def test_supernets_are_compared_at_equal_tokens_and_by_teacher():
    up, down = [0.1, 0.2, 0.3], [0.3, 0.2, 0.1]
    histories = {
        "t0": [check(10, up), check(20, up)],
        "t1": [check(10, down), check(20, up)],
        "t0_s1": [check(20, up), check(30, down)],
    }
    rows = [row for row in map_agreement(histories) if row["task"] == "code"]
    found = {(row["a"], row["b"], row["tokens"]): (row["same_teacher"], row["spearman"]) for row in rows}
    assert found == {
        ("t0", "t1", 10): (0, pytest.approx(-1.0)),
        ("t0", "t1", 20): (0, pytest.approx(1.0)),
        ("t0", "t0_s1", 20): (1, pytest.approx(1.0)),
        ("t1", "t0_s1", 20): (0, pytest.approx(1.0)),
    }
    assert teacher_of("t1_s2") == "t1"
    assert map_agreement({"t0": histories["t0"]}) == []


@pytest.mark.parametrize(
    ("n", "expected"),
    [
        pytest.param(2, 1 - 2 / math.pi * math.atan(2), id="two-draws-are-Cauchy"),
        pytest.param(3, 1 - 2 / math.sqrt(6), id="three-draws"),
        pytest.param(6, 0.101939, id="six-draws-from-a-table-of-t"),
        pytest.param(1, math.erfc(math.sqrt(2)), id="one-supernet-is-normal"),
    ],
)
def test_two_standard_errors_mean_less_with_few_draws(n, expected):
    assert chance_beyond(n) == pytest.approx(expected, abs=1e-6)


def test_many_draws_come_near_the_normal_distribution():
    for n in (2000, 2001):  # odd and even degrees of freedom have different sums
        assert chance_beyond(n) == pytest.approx(chance_beyond(1), abs=3e-4)
    with pytest.raises(ValueError, match="at least one"):
        chance_beyond(0)
