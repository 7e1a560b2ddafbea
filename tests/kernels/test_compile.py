"""Every kernel builds for Hopper at the widths of the study and of the papers, on a machine without a GPU."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

SHAPES = [  # key and value width of a head, format of q, k, v
    pytest.param("96,256,bfloat16", id="jetblock-2b"),
    pytest.param("128,256,bfloat16", id="jetblock-4b"),
    pytest.param("256,288,bfloat16", id="gated-deltanet-at-its-state"),
    pytest.param("96,256,bfloat16,packed", id="packed"),
    pytest.param("8,16,float32", id="laptop"),
    pytest.param("96,256,float32", id="jetblock-2b-fp32"),
    pytest.param("128,256,float16", id="jetblock-4b-fp16"),
    pytest.param("128,80,bfloat16", id="mamba2-of-nemotron-nano-9b"),
    pytest.param("16,16,bfloat16,single", id="one-head-of-one-token"),
]
SHARED_BYTES = 227 * 1024  # of a multiprocessor of sm_90 for one program
WGMMA = {"_prepare", "_scan", "_scan_back", "_gradients", "_forward", "_values", "_hidden", "_weight"}
LAUNCHES = {"_prepare": 2, "_invert": 1, "_scan": 4, "_scan_back": 2, "_gradients": 2}
LAUNCHES |= {"_forward": 1, "_values": 1, "_hidden": 1, "_weight": 1, "_jetblock_step": 2}
LAUNCHES |= {"_mamba2_conv": 1, "_mamba2_state": 1, "_mamba2_norm": 1}
LAUNCHES |= {"_norm_forward": 1, "_norm_backward": 1, "_split": 1, "_join": 1, "_rotary": 2, "_swiglu": 1}


@pytest.mark.parametrize("shape", SHAPES)
def test_builds_for_hopper(shape, tmp_path):
    # A process of its own: with the interpreter switched on Triton compiles nothing.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("aot.py")), shape]
    done = subprocess.run(
        command, env=environment | {"TRITON_CACHE_DIR": str(tmp_path)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    programs = [json.loads(line) for line in done.stdout.splitlines()]
    assert Counter(program["kernel"] for program in programs) == LAUNCHES
    assert all(program["target_sm_90"] for program in programs)
    assert max(program["shared"] for program in programs) <= SHARED_BYTES
    if "256,bfloat16" in shape:  # wide tiles of 64 rows: Hopper's own matrix instructions
        assert all(program["wgmma"] for program in programs if program["kernel"] in WGMMA)
