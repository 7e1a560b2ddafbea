"""Ratios, chains and predictions from the record's rows, on rows made up so that the answers are known."""

import math

import pytest

from jetlab.inference import roofline, speeds
from jetlab.models import zoo


def row(model, context=65536, *, batch=8, speed=100.0, share=0.8, cap=None, **other):
    base = {
        "model": model,
        "runner": "engine",
        "phase": "decode",
        "context": context,
        "batch": batch,
        "state": "float32",
    }
    base |= {"tokens_per_s": speed, "tokens_per_s_sd": 2.0, "n": 4, "fraction_of_floor": share, "status": "ok"}
    return base | {"cap_gb": math.nan if cap is None else cap} | other


def test_finds_the_largest_batch_within_the_cap_or_the_one_named():
    rows = [
        row("m", batch=8),
        row("m", batch=40, cap=80.0),
        row("m", batch=90),
        row("m", batch=95, status="out of memory"),
    ]
    assert speeds.find(rows, "m", 65536, batch=8)["batch"] == 8
    assert speeds.find(rows, "m", 65536, cap_gb=80.0)["batch"] == 40
    assert speeds.find(rows, "m", 65536)["batch"] == 90
    assert speeds.find(rows, "m", 4096) is None
    assert speeds.find(rows, "m", 65536, state="bfloat16") is None
    assert speeds.find(rows, "m", 65536, runner="transformers", batch=8) is None


def test_a_ratio_has_the_errors_of_both_medians():
    value, se = speeds.ratio(row("a", speed=300.0), row("b", speed=100.0))
    assert value == 3.0
    one, other = 1.25 * 2.0 / 2 / 300, 1.25 * 2.0 / 2 / 100
    assert se == pytest.approx(3.0 * math.hypot(one, other))


def test_factors_of_a_chain_multiply_to_the_whole_and_floors_likewise():
    rows = [
        row(speeds.QWEN3, runner="transformers", speed=50.0, share=0.25),
        row(speeds.QWEN3, batch=9, cap=80.0, speed=180.0, share=0.9),
        row(speeds.QWEN25, batch=39, cap=80.0, speed=700.0, share=0.7),
        row(speeds.JET, batch=400, cap=80.0, speed=7000.0, share=0.7),
        row(speeds.JET, batch=500, cap=80.0, speed=7700.0, share=0.7, state="bfloat16"),
    ]
    chain = speeds.steps(rows, 65536, batch=None)
    assert [step["row"]["batch"] for step in chain] == [8, 9, 39, 400, 500]  # the windowless variant has no row
    assert math.prod(step["factor"] for step in chain) == pytest.approx(7700 / 50)
    assert [round(step["floor"], 6) for step in chain] == [1.0, 1.0, 5.0, 10.0, 1.1]


def test_one_number_is_fitted_on_short_contexts_and_held_against_long_ones():
    rows = [row("m", n, cap=80.0, batch=5, share=share) for n, share in ((4096, 0.5), (8192, 0.6), (16384, 0.7))]
    rows += [row("m", 65536, cap=80.0, batch=3, speed=120.0, share=0.8)]
    rows += [row("m", 4096, share=0.1), row("m 1/2/3", 4096, cap=80.0, share=0.1)]
    share = speeds.efficiency(rows)
    assert share == 0.6  # batches that were set and derived shapes have no say
    (found,) = speeds.predictions(rows, share)
    assert found["predicted"] == pytest.approx(0.6 * 120 / 0.8)
    assert found["gap"] == pytest.approx(0.6 / 0.8 - 1)
    with pytest.raises(ValueError, match="up to 16384 tokens at the largest batch, got none"):
        speeds.efficiency(rows[3:4])


def test_other_devices_get_their_floor_times_the_share():
    found = speeds.elsewhere("RTX 3090", 65536, 0.5, speeds.JET)
    exact = roofline.decode_tokens_per_s(zoo.shape(speeds.JET), 65536, roofline.DEVICES["RTX 3090"])
    assert found == {speeds.JET: pytest.approx(exact / 2)}
