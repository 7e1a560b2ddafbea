"""The two roads are measured with one stick: shapes of the study's own models count what those models hold."""

import json

import pytest
from transformers import AutoConfig, NemotronHConfig

from jetlab.compress import roads
from jetlab.compress.budget import Budget
from jetlab.models.zoo import n_params
from jetlab.paths import ROOT

TEACHER = AutoConfig.from_pretrained(ROOT / "assets/teacher/0")


def test_the_shapes_have_the_parameters_of_the_committed_models():
    teacher = roads.transformer_shape(TEACHER)
    assert n_params(teacher) == json.loads((ROOT / "results/teacher/metrics.json").read_text())["n_params"]
    distilled = ROOT / "results/distill"
    hybrid = roads.hybrid_shape(teacher, json.loads((distilled / "choice.json").read_text()))
    assert n_params(hybrid) == json.loads((distilled / "metrics.json").read_text())["n_params"]


def test_a_hybrid_keeps_less_and_moves_less():
    teacher = roads.transformer_shape(TEACHER)
    dims = {"n_heads": 4, "head_dim": 8, "head_dim_v": 16}
    kinds = ["jetblock"] * 7 + ["attention"]
    hybrid = roads.hybrid_shape(teacher, {"dims": dims, "layer_kinds": kinds})
    budget = Budget(n_bytes=1, context=512, batch=1)
    before, after = roads.sizes(teacher, budget), roads.sizes(hybrid, budget)
    assert before["kv_bytes"] == 8 * 2 * 2 * 32 * 512 * 2  # layers, keys and values, heads, width, tokens, bytes
    assert after["kv_bytes"] == before["kv_bytes"] // 8
    assert after["state_bytes"] == 7 * 512 * 4
    assert after["bytes"] == after["weight_bytes"] + after["kv_bytes"] + after["state_bytes"]
    moved = (
        after["weight_bytes"] + after["kv_bytes"] + 2 * after["state_bytes"]
    )  # tied embeddings are read for the logits
    assert after["bytes_per_token"] == moved


def test_another_family_is_refused():
    with pytest.raises(ValueError, match="got a model of type nemotron_h"):
        roads.transformer_shape(NemotronHConfig())
