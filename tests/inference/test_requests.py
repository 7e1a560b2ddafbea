"""A request is a prompt read and an answer written, put together from rows made up so that the sums are known."""

import math

import pytest

from jetlab.inference import requests


def row(context, ms, *, phase="decode", batch=4, cap=None, sd=0.0, share=0.5, model="m"):
    """A decoding step of `ms`, or `context` tokens of one prompt read in `ms`."""
    tokens = batch if phase == "decode" else context
    speed = 1e3 * tokens / ms
    base = {"model": model, "runner": "engine", "phase": phase, "context": context, "batch": batch, "state": "float32"}
    base |= {"tokens_per_s": speed, "tokens_per_s_sd": sd * speed, "n": 4, "fraction_of_floor": share, "status": "ok"}
    return base | {"cap_gb": math.nan if cap is None else cap}


def rows(**changes):
    """1000 tokens in, 2000 out: steps of 10, 12 and 14 ms at a batch of 4; a prompt takes 100 ms."""
    steps = [row(n, ms, **changes) for n, ms in ((1000, 10), (2000, 12), (3000, 14))]
    return [*steps, row(1000, 100, phase="prefill", **changes | {"batch": 1})]


def test_the_answer_takes_the_mean_step_where_steps_grow_linearly():
    found = requests.request(rows(), "m", 1000, 2000)
    assert found.batch == 4
    assert found.prefill_s == pytest.approx(4 * 0.1)  # four prompts, one after the other
    assert found.decode_s == pytest.approx(2000 * 0.012)
    assert found.tokens_per_s == pytest.approx(4 * 2000 / 24.4)
    assert found.fraction_of_floor == pytest.approx(0.5)


def test_the_batch_is_the_largest_that_fits_at_the_end_and_the_same_throughout():
    smaller = [row(n, 1, batch=2) for n in (1000, 2000, 3000)]
    alone = [row(2000, 1, batch=9)]  # fits in the middle, not at the end
    assert requests.request([*smaller, *alone, *rows()], "m", 1000, 2000).decode_s == pytest.approx(24)


def test_lines_within_a_cap_and_without_one_are_kept_apart():
    both = [*rows(), *rows(cap=23.69, batch=2)]
    assert requests.request(both, "m", 1000, 2000).batch == 4
    assert requests.request(both, "m", 1000, 2000, cap_gb=23.69).batch == 2
    assert requests.request(both, "m", 1000, 2000, cap_gb=80.0) is None


@pytest.mark.parametrize("missing", range(4))
def test_a_record_that_lacks_a_line_gives_no_request(missing):
    assert requests.request([r for i, r in enumerate(rows()) if i != missing], "m", 1000, 2000) is None


def test_a_ratio_carries_the_errors_of_both():
    exact = requests.request(rows(), "m", 1000, 2000)
    noisy = requests.request(rows(sd=0.1), "m", 1000, 2000)
    value, se = requests.ratio(noisy, exact)
    assert value == pytest.approx(1)
    one = 1.25 * 0.1 / 2  # of a median of four timings
    parts = [2000 * weight * ms / 6e3 * one for weight, ms in ((1, 10), (4, 12), (1, 14))]
    assert se == pytest.approx(math.hypot(*parts, 0.4 * one) / 24.4)
    assert requests.ratio(exact, exact)[1] == 0
