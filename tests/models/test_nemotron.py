"""NemotronH: layer strings, shapes and configurations are one thing in three words."""

import dataclasses

import pytest
from transformers import NemotronHConfig, Qwen3Config

from jetlab.models import nemotron, zoo

NANO = ("NVIDIA-Nemotron-Nano-12B-v2-Base", "NVIDIA-Nemotron-Nano-9B-v2")


@pytest.mark.parametrize(("name", "published"), list(zip(NANO, (12_310_001_152, 8_888_227_328), strict=True)))
def test_transformers_builds_the_published_parameters(name, published):
    model = zoo.build(name)  # on the meta device: no memory is taken
    assert type(model).__name__ == "NemotronHForCausalLM"
    assert sum(p.numel() for p in model.parameters()) == zoo.n_params(zoo.shape(name)) == published


@pytest.mark.parametrize("name", NANO)
def test_shape_and_configuration_say_the_same(name):
    shape = zoo.shape(name)
    config = nemotron.config_of(shape)
    assert nemotron.shape_of(config, name) == shape
    assert config.hybrid_override_pattern == nemotron.layer_string(shape.layer_kinds)  # Transformers' own spelling


def test_what_pruning_took_from_the_12b():
    large, small = (zoo.shape(name) for name in NANO)
    lost = {kind: large.count(kind) - small.count(kind) for kind in ("mamba2", "mlp", "attention")}
    assert lost == {"mamba2": 1, "mlp": 3, "attention": 2}


@pytest.mark.parametrize(
    ("pattern", "n_layers", "message"),
    [
        ("", None, "name a layer"),
        ("M-X*", None, r"got 'M-X\*' with X; write each layer"),
        ("M-M", 4, r"one letter a layer, 4 here, got 3: 'M-M'; add 1"),
        ("M-M*-", 4, r"4 here, got 5: 'M-M\*-'; take out 1"),
    ],
)
def test_a_layer_string_that_does_not_fit_is_refused(pattern, n_layers, message):
    with pytest.raises(ValueError, match=message):
        zoo.layer_kinds(pattern, n_layers)


def test_heads_must_fill_their_groups():
    shape = zoo.shape(NANO[1])
    uneven = dataclasses.replace(shape, linear=dataclasses.replace(shape.linear, n_heads=124))
    with pytest.raises(ValueError, match=r"multiple of the 8 groups .* got 124; try 120"):
        nemotron.config_of(uneven)
    with pytest.raises(ValueError, match=r"multiple of the 8 key-value heads, got 12; try 8"):
        nemotron.config_of(dataclasses.replace(shape, n_heads=12))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: Qwen3Config(), "got a model of type qwen3"),
        (lambda: NemotronHConfig(hybrid_override_pattern="ME*-"), "got moe"),
        (lambda: NemotronHConfig(hybrid_override_pattern="M*-", use_bias=True), "got use_bias"),
        (lambda: NemotronHConfig(hybrid_override_pattern="M*-", tie_word_embeddings=True), "never ties its embeddings"),
    ],
)
def test_what_is_no_nano_2_has_no_shape(config, message):
    with pytest.raises(ValueError, match=message):
        nemotron.shape_of(config())
