"""Specification of the released layout: rules and our model name the same tensors, and the check finds every difference."""

import copy
import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Qwen2Config

from jetlab.hf import JetNemotronConfig, JetNemotronForCausalLM
from jetlab.layers.dims import BlockDims
from jetlab.models import export, released, surgery, zoo
from jetlab.models.released import check_folder, expected_tensors

JET = {
    "mode": "chunk",
    "norm_eps": "1e-5",
    "conv_size": 4,
    "dconv_generator_reduction": 8,
    "dconv_implementation": "triton",
}
COMMON = {
    "architectures": ["JetNemotronForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151643,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "model_type": "jet_nemotron",
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.51.3",
    "use_cache": True,
    "use_mrope": False,
    "vocab_size": 151936,
}


def published(n_layers, attn, swa, window, jet, **widths):
    kinds = ["attn" if layer in attn else "swa" if layer in swa else "jet" for layer in range(n_layers)]
    sections = {"jet": JET | jet, "swa": {"window_size": window}}
    depth = {"num_hidden_layers": n_layers, "max_window_layers": n_layers, "layer_types": kinds}
    return COMMON | depth | {"efficient_attention_config": sections} | widths


# The two released config.json, each key of them.
RELEASED = {
    "Jet-Nemotron-2B": published(
        28, (14, 19), (20, 21), 1152,
        {"num_heads": 12, "head_dim": 96, "expand_v": 2.6666666667},
        hidden_size=1536, intermediate_size=8960, num_attention_heads=12, max_position_embeddings=131072,
    ),
    "Jet-Nemotron-4B": published(
        36, (17, 20, 32), (5, 16, 19, 21, 22, 25, 27), 2048,
        {"num_heads": 16, "head_dim": 128, "expand_v": 2},
        hidden_size=2048, intermediate_size=11008, num_attention_heads=16, max_position_embeddings=32768,
    ),
}  # fmt: skip
N_PARAMS = {"Jet-Nemotron-2B": 1_964_806_208, "Jet-Nemotron-4B": 3_960_424_768}
DIMS = BlockDims(d_model=32, n_heads=3, head_dim=6, head_dim_v=16)  # expand_v = 8 / 3, as of the 2B model
KINDS = ("jetblock", "attention", "sliding_attention", "jetblock")
every_model = pytest.mark.parametrize("name", RELEASED)


def shapes_of(model):
    return {name: tuple(x.shape) for name, x in model.state_dict().items()}


@every_model
def test_the_rules_and_our_model_name_the_same_tensors_at_full_size(name):
    config = RELEASED[name]
    with torch.device("meta"):
        model = JetNemotronForCausalLM(JetNemotronConfig.from_dict(config))
    head = {"lm_head.weight": (151936, config["hidden_size"])}  # tied: in the module, not in the file
    assert expected_tensors(config) | head == shapes_of(model)


@every_model
def test_a_shape_of_the_zoo_is_the_released_one(name):
    model = zoo.build(name)
    written = json.loads(model.config.to_json_string(use_diff=False))
    assert expected_tensors(written) == expected_tensors(RELEASED[name])
    assert written["layer_types"] == RELEASED[name]["layer_types"]


@every_model
def test_the_tensors_have_as_many_numbers_as_was_published(name):
    assert sum(math.prod(shape) for shape in expected_tensors(RELEASED[name]).values()) == N_PARAMS[name]


def test_tensors_that_the_published_list_gives_for_the_2b_model():
    shapes = expected_tensors(RELEASED["Jet-Nemotron-2B"])
    block = "model.layers.0.self_attn"
    assert shapes[f"{block}.q_proj.weight"] == (1152, 1536) and shapes[f"{block}.v_proj.weight"] == (3072, 1536)
    assert shapes[f"{block}.dynamic_conv1d.kernel_generator.w2.weight"] == (12288, 384)
    assert shapes["model.layers.14.self_attn.k_proj.bias"] == (256,) and shapes[f"{block}.A_log"] == (12,)


def qwen2(tokenizer, **changes):
    shape = {"hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = Qwen2Config(
        vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=128,
        bos_token_id=1, eos_token_id=1, **shape | changes,
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)


@pytest.fixture
def folder(tokenizer, tmp_path):
    """An exported hybrid of all that the released models are made of."""
    return exported(tmp_path / "model", tokenizer)


def exported(path, tokenizer, kinds=KINDS, model=None, dims=DIMS, **options):
    model = model or qwen2(tokenizer, tie_word_embeddings=True)
    window = {"window": 7} if "sliding_attention" in kinds else {}
    surgery.convert(model, kinds, dims, **window, **options)
    export.save(model, path, tokenizer, dims=dims, **options)
    return path


def test_an_exported_hybrid_of_the_released_kinds_has_no_difference(folder):
    assert check_folder(folder) == []
    config = json.loads((folder / "config.json").read_text())
    expected = RELEASED["Jet-Nemotron-2B"]
    assert config.keys() - {"pad_token_id"} == expected.keys()
    section = config["efficient_attention_config"]["jet"]
    assert section.keys() == expected["efficient_attention_config"]["jet"].keys()
    assert section["expand_v"] == 2.6666666667 and int(section["expand_v"] * 6) == 16
    assert section["dconv_generator_reduction"] == 8 and float(section["norm_eps"]) == 1e-5


def test_an_untied_hybrid_with_a_narrow_generator_has_no_difference_either(tokenizer, tmp_path):
    model = qwen2(tokenizer, tie_word_embeddings=False)
    exported(tmp_path, tokenizer, model=model, generator_hidden=2)
    assert check_folder(tmp_path) == []
    assert "lm_head.weight" in load_file(tmp_path / "model.safetensors")
    assert (
        json.loads((tmp_path / "config.json").read_text())["efficient_attention_config"]["jet"][
            "dconv_generator_reduction"
        ]
        == 24
    )
    again, _ = export.load(tmp_path)
    assert surgery.slots(again)[0].paths["jetblock"].dynamic_conv1d.kernel_generator.w1.out_features == 2


def test_what_an_exported_folder_computes_is_what_the_hybrid_computed(folder, tokenizer):
    again, _ = export.load(folder)
    product = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.arange(2, 22)[None]
    with torch.no_grad():
        expected = again.float()(ids, use_cache=False).logits
        torch.testing.assert_close(product(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_shards_are_read_by_their_index(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "shards" / name).write_bytes((folder / name).read_bytes())
    assert check_folder(tmp_path / "shards") == []
    shard = sorted((tmp_path / "shards").glob("model-*.safetensors"))[1]
    weights = load_file(shard)
    weights.pop(min(weights))
    save_file(weights, shard, metadata={"format": "pt"})
    (difference,) = check_folder(tmp_path / "shards")
    assert "model.safetensors.index.json and model-00002" in difference


def change_config(folder, change):
    path = folder / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    weights = load_file(path)
    change(weights)
    save_file(weights, path, metadata={"format": "pt"})


BLOCK = "model.layers.0.self_attn"
CONFIG_DAMAGE = {
    "a-key-less": (lambda c: c.pop("rope_theta"), "config.json must have rope_theta, as the released one, got none"),
    "a-key-more": (
        lambda c: c.update(sliding_window=7),
        "must have the released keys alone, got sliding_window = 7; rem",
    ),
    "heads-of-another-width": (
        lambda c: c.update(head_dim=16),
        "got head_dim = 16; readers take hidden_size / num_att",
    ),
    "a-number-as-text": (lambda c: c.update(hidden_size="32"), "hidden_size of config.json must be int, got '32'"),
    "true-is-no-number": (lambda c: c.update(vocab_size=True), "vocab_size of config.json must be int, got True"),
    "positions-that-are-scaled": (
        lambda c: c.update(rope_scaling={"factor": 2}),
        "rope_scaling of config.json must be nu",
    ),
    "another-architecture": (
        lambda c: c.update(architectures=["Qwen2ForCausalLM"]),
        r"architectures must be \['JetNemotronForCausalLM'\], by which a server finds its code",
    ),
    "code-that-is-not-there": (
        lambda c: c.update(auto_map={"AutoConfig": "configuration_jet_nemotron.JetNemotronConfig"}),
        "got configuration_jet_nemotron.py for AutoConfig; remove auto_map",
    ),
    "an-option-in-the-section": (
        lambda c: c["efficient_attention_config"]["jet"].update(head_dim_v=16),
        "got head_dim_v = 16; a server refuses a section with it",
    ),
    "epsilon-as-a-number": (
        lambda c: c["efficient_attention_config"]["jet"].update(norm_eps=1e-5),
        r"norm_eps of efficient_attention_config\['jet'\] must be str, got 1e-05",
    ),
    "a-width-that-is-cut": (
        lambda c: c["efficient_attention_config"]["jet"].update(expand_v=2.66),
        r"head_dim · expand_v must be whole when the rest is cut off, got 15\.96",
    ),
    "no-section": (lambda c: c["efficient_attention_config"].pop("swa"), "must have a section 'swa', got"),
    "a-layer-too-few": (lambda c: c["layer_types"].pop(), "a kind for each of 4 layers, got 3"),
    "heads-that-do-not-divide": (
        lambda c: c.update(num_attention_heads=5),
        "must be a multiple of num_attention_heads",
    ),
}


@pytest.mark.parametrize("damage", CONFIG_DAMAGE)
def test_a_difference_in_the_config_is_said_before_tensors_are_compared(damage, folder):
    change, message = CONFIG_DAMAGE[damage]
    change_config(folder, change)
    found = check_folder(folder)
    assert len(found) == 2 and "tensors are compared once config.json has no difference" in found[1]
    assert re.search(message, found[0]), found[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        pytest.param(lambda w: w.pop(f"{BLOCK}.A_log"), f"must have {BLOCK}.A_log [3], got none", id="missing"),
        pytest.param(
            lambda w: w.update({"lm_head.weight": torch.zeros(2, 2)}),
            "published names alone, got lm_head.weight [2, 2]",
            id="head-of-a-tied-model",
        ),
        pytest.param(
            lambda w: w.update({f"{BLOCK}.o_norm.weight": torch.ones(15)}),
            f"{BLOCK}.o_norm.weight must be [16], as config.json says, got [15]",
            id="another-shape",
        ),
    ],
)
def test_a_tensor_that_differs_is_named(change, message, folder):
    change_weights(folder, change)
    (found,) = check_folder(folder)
    assert message in found


@pytest.mark.parametrize("name", released.FILES)
def test_a_file_that_is_not_there_is_named(name, folder):
    (folder / name).unlink()
    (found,) = check_folder(folder)
    assert f"the folder must have {name}, got none" in found


def test_weights_that_are_damaged_or_absent_are_said_to_be(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:40])
    assert "must be readable, got SafetensorError" in check_folder(folder)[0]
    weights.unlink()
    assert "must be readable, got FileNotFoundError" in check_folder(folder)[0]


def test_a_config_that_is_no_json_is_said_to_be_none(folder):
    (folder / "config.json").write_text("{")
    (found,) = check_folder(folder)
    assert found.startswith("config.json must be JSON")


def test_ends_that_differ_and_a_tokeniser_of_transformers_5_are_found(folder):
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 3}))
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "PreTrainedTokenizerFast"
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer | {"tokenizer_class": "TokenizersBackend"}))
    first, second = check_folder(folder)
    assert "eos_token_id of generation_config.json must be that of config.json, got 3 and 1" in first
    assert "one that Transformers 4 knows" in second


def test_kinds_that_a_server_does_not_know_are_listed_with_their_layers(tokenizer, tmp_path):
    exported(tmp_path, tokenizer, kinds=["gla", "attention", "gla", "gla"])
    (found,) = check_folder(tmp_path)
    assert "must be of jet, attn, swa, got gla in layers 0, 2, 3; a server" in found
    config = json.loads((tmp_path / "config.json").read_text())
    with pytest.raises(ValueError, match=r"whose tensors are published, got gla; see surgery\.save"):
        expected_tensors(config)


def test_a_jetblock_that_is_not_the_published_one_is_found(tokenizer, tmp_path):
    exported(tmp_path, tokenizer, conv_v="static")
    found = check_folder(tmp_path)
    assert any("got options = {'conv_v': 'static'}; a server refuses a section with it" in line for line in found)


def test_the_bundled_teacher_has_heads_that_the_released_layout_cannot_say(tmp_path):
    model, tokenizer = surgery.load("assets/teacher/0")
    dims = BlockDims(64, 4, 8, 16)
    surgery.convert(model, ["jetblock"] * 7 + ["attention"], dims)
    export.save(model, tmp_path, tokenizer, dims=dims)
    first, _ = check_folder(tmp_path)
    assert "got head_dim = 32; readers take hidden_size / num_attention_heads" in first


def test_a_published_qwen2_has_no_head_dim_and_is_exported(tokenizer, tmp_path):
    model = qwen2(tokenizer)
    assert not hasattr(model.config, "head_dim")
    exported(tmp_path, tokenizer, model=model)
    assert check_folder(tmp_path) == []


def test_a_hybrid_without_a_jetblock_is_said_to_be_none_that_a_server_knows(tokenizer, tmp_path):
    exported(tmp_path, tokenizer, kinds=["attention", "sliding_attention"] * 2, dims=None)
    assert r"must have a section 'jet', got ['swa']" in check_folder(tmp_path)[0]


def test_the_check_changes_nothing_that_it_reads(folder):
    config = copy.deepcopy(RELEASED["Jet-Nemotron-2B"])
    expected_tensors(config)
    assert config == RELEASED["Jet-Nemotron-2B"]
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    check_folder(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
