"""The benchmarks run, check themselves, and show what grows: no time is asked here, only what they print."""

import csv
import re
import subprocess
import sys

import pytest
import torch

from jetlab.paths import ROOT

pytestmark = pytest.mark.slow


def printed(script, *arguments):
    command = [sys.executable, ROOT / "benchmarks" / script, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_both_sides_of_the_gated_delta_rule_agree_at_every_shape():
    lines = printed("ops.py", "--repeats", "1").split("\n\n")[0].splitlines()[1:]
    assert len(lines) > 8
    for line in lines:
        ratio, error = map(float, line.split()[-2:])
        assert ratio > 0
        assert error < 1e-5


def test_every_block_is_trained_and_decoded_beside_its_floor():
    text = printed("blocks.py", "--repeats", "1", "training", "decode")
    for kind in ("retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "jetblock", "rwkv7"):
        assert len(re.findall(rf"^{kind} ", text, re.MULTILINE)) == 2


def test_placements_scored_together_score_as_they_do_alone_for_half_the_layers():
    text = printed("placements.py", "--contexts", "2", "--repeats", "1")
    alone, together, ratio = (line.split()[-4:] for line in text.splitlines()[2:5])
    assert (alone[0], together[0]) == ("296", "128")
    assert float(ratio[0]) > 2 and float(ratio[2]) > 2  # layer evaluations, and their products
    correct, loss = map(float, re.findall(r"\d\.\de[+-]\d\d", text))
    assert correct == 0 and loss < 1e-4


def test_decoding_steps_hold_the_state_that_their_setting_says():
    text = printed("decode_grid.py", "--context", "64", "--batch", "2", "--repeats", "1")
    rows = list(csv.DictReader(text.splitlines()))
    assert len(rows) == 21
    by_setting = {row["setting"]: {k: float(v) for k, v in row.items() if k != "setting"} for row in rows}
    plain, half, twice = (
        by_setting[f"96/{v}/12{what}"] for v, what in ((256, ""), (128, " half state"), (512, " twice the state"))
    )
    channels = (
        12 * 32
    )  # of the values, at an eighth of the widths: 12 numbers a matrix row, 3 carried by the convolution
    layer = 4 * channels * (12 + 3)  # bytes in fp32
    assert plain["state_bytes"] - half["state_bytes"] == 24 * layer / 2
    assert twice["state_bytes"] - plain["state_bytes"] == 24 * layer
    longer = by_setting["96/256/12 twice the context"]
    assert longer["kv_bytes"] == 2 * plain["kv_bytes"] and longer["state_bytes"] == plain["state_bytes"]
    assert all(row["ms"] > 0 and row["floor_ms"] > 0 for row in by_setting.values())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and they would run for minutes")
@pytest.mark.parametrize("script", ["kernels.py", "tune_kernels.py", "training.py"])
def test_what_measures_a_gpu_says_that_there_is_none(script, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / script, "--out", tmp_path / "record"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert "measures on a CUDA device, and PyTorch sees none" in done.stderr
    assert not (tmp_path / "record").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of a process from /proc")
@pytest.mark.parametrize("kind", ["gla", "jetblock", "rwkv7"])  # one on each recurrence
def test_peak_memory_grows_linearly_in_the_number_of_tokens(kind):
    short, long = (int(printed("blocks.py", "--peak", kind, str(T))) for T in (4096, 16384))
    assert 3 < long / short < 5
