"""Every number that a user may set is checked before anything runs, and the message says how to set it right."""

import copy

import pytest

from jetlab import run
from jetlab.config import (
    BlockStudy,
    ConfigError,
    SizeStudy,
    ThroughputStudy,
    VariantStudy,
    check_params,
    parse_size,
)
from jetlab.layers.jetblock import VARIANTS, JetBlock
from jetlab.paths import ROOT

FILES = [ROOT / "params.yaml", *sorted((ROOT / "profiles").glob("*.yaml"))]


@pytest.fixture
def params():
    return run.read_params(ROOT / "params.yaml")


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_every_profile_describes_a_study(file):
    check_params(run.read_params(file))


def put(params, path, value):
    *parents, key = path.split(".")
    section = params
    for name in parents:
        section = section[name]
    if value is None:
        del section[key]
    else:
        section[key] = value


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param("supernet", None, "supernet is missing; the sections are", id="missing-section"),
        pytest.param("extra", {}, "extra is no known section", id="unknown-section"),
        pytest.param("blocks.training.n_steps", None, "training.n_steps is missing", id="missing-key"),
        pytest.param("blocks.training.n_step", 3, "training.n_step is no known key", id="misspelt-key"),
        pytest.param("supernet.training.n_steps", 0, "greater than or equal to 1, got 0", id="no-steps"),
        pytest.param("supernet.training.learning_rate", "3e-3", "without quotes", id="number-as-text"),
        pytest.param("supernet.training.learning_rate", float("nan"), "finite number", id="not-a-number"),
        pytest.param("supernet.training.rows", {"poetry": 1}, "must name tasks among", id="unknown-task"),
        pytest.param(
            "supernet.block", "jetblok", "a block must be one of jetblock, gated_deltanet", id="unknown-block"
        ),
        pytest.param("supernet.block", "attention", "a block must be one of", id="attention-is-no-linear-block"),
        pytest.param("placement.budget", 3, "less than or equal to 2, got 3", id="more-layers-than-evaluated"),
        pytest.param("variants.jetblock", ["moving"], "'none', 'static', 'dynamic'", id="unknown-convolution"),
        pytest.param("variants.blocks", [], "at least 1 item", id="empty-matrix"),
        pytest.param("variants.sizes", ["4x16x16"], "is written h<heads>_k<key width>_v", id="size-in-another-form"),
        pytest.param("variants.sizes", ["h1_k1_v1"], "must hold state_size = ", id="another-state-size"),
        pytest.param("teacher.source", "hub", "source: hub needs hub_id", id="hub-without-id"),
        pytest.param("common.device", "tpu", "'cpu' or 'cuda', got 'tpu'", id="unknown-device"),
        pytest.param("throughput.contexts", [0], "greater than or equal to 1, got 0", id="empty-context"),
    ],
)
def test_a_broken_rule_is_named_with_its_key_and_value(params, path, value, message):
    changed = copy.deepcopy(params)
    put(changed, path, value)
    with pytest.raises(ConfigError, match=None) as caught:
        check_params(changed)
    assert message in str(caught.value)


def test_all_broken_rules_are_named_at_once(params):
    section = params["blocks"] | {"training": params["blocks"]["training"] | {"n_steps": 0, "warmup": -1}}
    with pytest.raises(ConfigError, match=r"n_steps.*warmup"):
        BlockStudy.from_params(common=params["common"], tasks=params["tasks"], variant="jetblock", **section)


def test_a_size_is_its_heads_and_widths(params):
    name = params["variants"]["sizes"][0]
    study = SizeStudy.from_params(common=params["common"], tasks=params["tasks"], size=name, **params["hardware"])
    assert study.dims == parse_size(name)
    assert study.dims.n_heads * study.dims.head_dim * study.dims.head_dim_v == study.state_size


@pytest.mark.parametrize(
    ("variant", "options"),
    [
        ("none", {"conv_v": "none"}),
        ("dynamic", {}),
        ("static_qk", {"conv_v": "static", "conv_q": "static", "conv_k": "static"}),
        ("dynamic_8_taps", {}),
    ],
)
def test_a_variant_is_a_choice_of_convolutions(params, variant, options):
    sections = {"common": params["common"], "tasks": params["tasks"], **params["jetblock"]}
    study = VariantStudy.from_params(variant=variant, **sections)
    assert study.options == options
    assert study.block(64).conv_size == (8 if variant == "dynamic_8_taps" else 4)


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_every_variant_of_the_jetblock_can_be_built(params, variant):
    sections = {"common": params["common"], "tasks": params["tasks"], **params["jetblock"]}
    study = VariantStudy.from_params(variant=variant, **sections)
    dims = study.block(64)
    block = JetBlock(dims, **study.options)
    assert sum(p.numel() for p in block.parameters()) == JetBlock.n_params(dims, **study.options)


def test_a_study_seeds_every_generator_and_sets_its_threads(params):
    import torch

    study = ThroughputStudy.from_params(common=params["common"] | {"n_threads": 1}, **params["throughput"])
    study.common.apply()
    first = torch.rand(3)
    study.common.apply()
    assert torch.equal(torch.rand(3), first)
    assert torch.get_num_threads() == 1
