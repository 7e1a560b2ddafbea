"""Specification of the configuration: the released config.json in and out, and what it refuses."""

import json

import pytest
import torch
from transformers import AutoConfig

from jetlab.hf import JetNemotronConfig

RELEASED = {
    "architectures": ["JetNemotronForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "efficient_attention_config": {
        "jet": {
            "mode": "chunk",
            "expand_v": 2.6666666667,
            "num_heads": 12,
            "head_dim": 96,
            "norm_eps": "1e-5",
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "dconv_implementation": "triton",
        },
        "swa": {"window_size": 1152},
    },
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "hidden_size": 1536,
    "initializer_range": 0.02,
    "intermediate_size": 8960,
    "layer_types": ["jet"] * 14 + ["attn"] + ["jet"] * 4 + ["attn", "swa", "swa"] + ["jet"] * 6,
    "max_position_embeddings": 131072,
    "max_window_layers": 28,
    "model_type": "jet_nemotron",
    "num_attention_heads": 12,
    "num_hidden_layers": 28,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "vocab_size": 151936,
}


@pytest.fixture
def released(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RELEASED))
    return tmp_path


def test_the_released_words_become_kinds_of_the_study(released):
    config = AutoConfig.from_pretrained(released)
    assert isinstance(config, JetNemotronConfig)
    assert [i for i, kind in enumerate(config.layer_kinds) if kind == "attention"] == [14, 19]
    assert [i for i, kind in enumerate(config.layer_kinds) if kind == "sliding_attention"] == [20, 21]
    assert config.layer_kinds.count("jetblock") == 24
    assert not hasattr(config, "layer_types")
    assert config.sliding_window == 1152
    assert (config.head_dim, config.attention_bias, config.dtype) == (128, True, torch.bfloat16)


def test_the_released_block_has_256_value_channels_and_384_generator_units(released):
    config = AutoConfig.from_pretrained(released)
    dims = config.block_dims("jetblock")
    assert (dims.n_heads, dims.head_dim, dims.head_dim_v, dims.conv_size) == (12, 96, 256, 4)
    assert config.block_options("jetblock") == {"generator_hidden": 384}
    assert config.norm_eps("jetblock") == 1e-5


def test_what_was_read_is_written_back_under_the_same_keys(released, tmp_path):
    config = AutoConfig.from_pretrained(released)
    assert {key: config.to_dict()[key] for key in RELEASED} == RELEASED
    config.save_pretrained(tmp_path / "again")
    written = json.loads((tmp_path / "again" / "config.json").read_text())
    assert {key: written[key] for key in RELEASED} == RELEASED
    assert "layer_kinds" not in written
    again = AutoConfig.from_pretrained(tmp_path / "again")
    assert again.to_dict() | {"_name_or_path": ""} == config.to_dict() | {"_name_or_path": ""}


def test_every_kind_survives_the_round_trip(mixture, build_config, tmp_path):
    config = build_config(mixture)
    config.save_pretrained(tmp_path)
    again = JetNemotronConfig.from_pretrained(tmp_path)
    assert again.layer_kinds == mixture
    assert again.to_dict() == config.to_dict()
    assert {kind: again.block_dims(kind) for kind in mixture if "attention" not in kind} == {
        kind: config.block_dims(kind) for kind in mixture if "attention" not in kind
    }


def test_the_defaults_are_those_of_the_2b_model(released):
    default, read = JetNemotronConfig(), AutoConfig.from_pretrained(released)
    assert default.layer_kinds == read.layer_kinds
    assert default.block_dims("jetblock") == read.block_dims("jetblock")
    assert default.block_options("jetblock") == read.block_options("jetblock")
    assert (default.sliding_window, default.head_dim) == (read.sliding_window, read.head_dim)
    assert JetNemotronConfig().efficient_attention_config is not default.efficient_attention_config


def test_keywords_take_the_place_of_what_the_file_says(released):
    kinds = ["jet", "attn"]
    config = AutoConfig.from_pretrained(released, layer_types=kinds, num_hidden_layers=2, rms_norm_eps="1e-5")
    assert (config.layer_kinds, config.rms_norm_eps) == (["jetblock", "attention"], 1e-5)
    assert AutoConfig.from_pretrained(released, layer_kinds=["attention"] * 28).layer_kinds[0] == "attention"
    _, unused = AutoConfig.from_pretrained(released, use_cache=False, no_such_key=1, return_unused_kwargs=True)
    assert unused == {"no_such_key": 1}
    with pytest.raises(ValueError, match=r"rope_scaling must be null"):
        AutoConfig.from_pretrained(released, rope_scaling={"rope_type": "yarn", "factor": 2.0})
    with pytest.raises(ValueError, match=r"one kind for each of the num_hidden_layers=1 layers, got 28"):
        AutoConfig.from_pretrained(released, num_hidden_layers=1)


def test_keys_that_would_mislead_are_left_behind(tmp_path):
    files = {"AutoConfig": "configuration_jet_nemotron.JetNemotronConfig"}  # which a saved folder does not hold
    (tmp_path / "config.json").write_text(json.dumps(RELEASED | {"sliding_window": 4096, "auto_map": files}))
    config = AutoConfig.from_pretrained(tmp_path, trust_remote_code=False)
    assert config.sliding_window == 1152
    assert not {"sliding_window", "auto_map"} & set(config.to_dict())


def test_positions_written_by_transformers_5_are_read():
    config = JetNemotronConfig(rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    assert config.rope_theta == 5e5


JET = RELEASED["efficient_attention_config"]["jet"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        pytest.param(
            {"layer_types": ["jet", "jat", "attn", "swa"]},
            r"layer_kinds\[1\] must be one of attention, .*got 'jat'; closest is 'jet'",
            id="unknown-kind",
        ),
        pytest.param(
            {"layer_types": ["jet", "attn"]},
            r"one kind for each of the num_hidden_layers=4 layers, got 2; change one of the two",
            id="too-few-kinds",
        ),
        pytest.param(
            {"layer_types": ["gla", "jet", "attn", "swa"]},
            r"efficient_attention_config must have a section 'gla' because layer_kinds has 'gla', got the sections "
            r"\['jetblock', 'sliding_attention'\]; add one",
            id="kind-without-section",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET, "swa": {"window_size": 0}}},
            r"efficient_attention_config\['swa'\]\['window_size'\] must be a whole number ≥ 1, got 0; 1 sees the",
            id="window-of-zero",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET, "swa": {"window_size": -5}}},
            r"must be a whole number ≥ 1, got -5; .*use the kind 'attention'",
            id="negative-window",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET, "swa": {}}},
            r"efficient_attention_config\['swa'\] must have 'window_size', got \[\]; add it",
            id="no-window",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET, "jetblock": JET, "swa": {"window_size": 4}}},
            r"one section for each kind, got jet, jetblock, swa, of which two name the same one",
            id="section-twice",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET | {"head_dim": 16}, "swa": {"window_size": 4}}},
            r"\['jet'\]: head_dim · expand_v must be a whole number, got 16 · 2.6666666667 = 42.6667; give head_dim_v=43",
            id="value-width-not-whole",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET | {"num_heads": 0}, "swa": {"window_size": 4}}},
            r"efficient_attention_config\['jet'\]: n_heads must be a whole number ≥ 1, got 0",
            id="no-heads",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET | {"norm_eps": "small"}, "swa": {"window_size": 4}}},
            r"efficient_attention_config\['jet'\]\['norm_eps'\] must be a number above 0, .*got 'small'",
            id="epsilon-without-number",
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": {"num_heads": 2, "head_dim": 8}, "swa": {"window_size": 4}}},
            r"\['jet'\] must have 'expand_v' or 'head_dim_v', got \['head_dim', 'num_heads'\]",
            id="no-value-width",
        ),
        pytest.param(
            {
                "efficient_attention_config": {
                    "jet": JET | {"dconv_generator_reduction": 9999},
                    "swa": {"window_size": 4},
                }
            },
            r"dconv_generator_reduction'\] must not exceed num_heads · head_dim_v = 3072, got 9999",
            id="generator-without-units",
        ),
        pytest.param(
            {"num_key_value_heads": 5},
            r"num_attention_heads must be a multiple of num_key_value_heads, got 12 and 5; num_key_value_heads=12",
            id="heads-not-shared-evenly",
        ),
        pytest.param(
            {"hidden_size": 1000},
            r"hidden_size must be a multiple of num_attention_heads, got 1000 and 12; .*give head_dim",
            id="odd-head-split",
        ),
        pytest.param({"head_dim": 7}, r"head_dim must be even, for the rotary halves, got 7", id="odd-head"),
        pytest.param({"num_attention_heads": 0}, r"num_attention_heads must be a whole number ≥ 1, got 0", id="none"),
        pytest.param(
            {"rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"rope_scaling must be null or of the type 'default', got .*yarn.*; this model has plain rotary positions",
            id="scaled-positions",
        ),
        pytest.param(
            {"rope_scaling": {"factor": 4.0}}, r"rope_scaling must be null .*got \{'factor': 4.0\}", id="no-type"
        ),
        pytest.param({"rope_scaling": "yarn"}, r"rope_scaling must be null .*got yarn", id="positions-by-name"),
        pytest.param({"rope_theta": -1}, r"rope_theta must be a number above 0, .*got -1", id="negative-base"),
        pytest.param({"rms_norm_eps": "nan"}, r"rms_norm_eps must be a number above 0, .*got 'nan'", id="nan-epsilon"),
        pytest.param(
            {"attention_dropout": 1.5}, r"attention_dropout must be 0 or more and below 1, got 1.5", id="dropout"
        ),
        pytest.param({"hidden_act": "foo"}, r"hidden_act must be known to Transformers, got 'foo'", id="activation"),
        pytest.param(
            {"norm_eps": 1e-5}, r"'norm_eps' must be no key of config.json, got 1e-05; remove it", id="no-key"
        ),
        pytest.param(
            {"efficient_attention_config": {"jet": JET | {"head_dim_v": 128}, "swa": {"window_size": 4}}},
            r"\['jet'\]: head_dim_v must be head_dim · expand_v where both are given, got 128 and 256",
            id="two-value-widths",
        ),
        pytest.param(
            {
                "efficient_attention_config": {
                    "jet": JET | {"options": {"generator_hidden": 32}},
                    "swa": {"window_size": 4},
                }
            },
            r"\['jet'\]: options\['generator_hidden'\] must be 384, as dconv_generator_reduction says, got 32",
            id="two-generators",
        ),
    ],
)
def test_a_bad_value_is_answered_with_rule_value_and_way_out(changes, message):
    kept = {"layer_types": ["jet", "attn", "swa", "jet"], "num_hidden_layers": 4}
    with pytest.raises(ValueError, match=message):
        JetNemotronConfig(**RELEASED | kept | changes)
