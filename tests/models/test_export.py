"""Specification of the exported model: a folder that the Auto classes load, and the same numbers as before."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import jetlab.hf  # noqa: F401 - registers the model
from jetlab.layers.dims import BlockDims
from jetlab.models import export, surgery
from jetlab.paths import MissingInput

KINDS = ["retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "jetblock", "rwkv7"]
OPTIONS = {"jetblock": {"conv_v": "static", "conv_k": "static"}}


DIMS = BlockDims(64, 4, 8, 16, conv_size=3)


def hybrid(kind: str, **options):
    model, tokenizer = surgery.load("assets/teacher/0")
    torch.manual_seed(0)
    kinds = ["attention" if layer == 3 else kind for layer in range(model.config.num_hidden_layers)]
    return surgery.convert(model, kinds, DIMS, **options), tokenizer, DIMS


@pytest.mark.parametrize("kind", KINDS)
def test_the_auto_class_computes_what_the_hybrid_computed_and_slots_come_back(kind, tmp_path):
    options = OPTIONS.get(kind, {})
    model, tokenizer, dims = hybrid(kind, **options)
    export.save(model, tmp_path, tokenizer, dims=dims, **options)
    ids = torch.randint(0, len(tokenizer), (2, 40), generator=torch.Generator().manual_seed(0))
    product = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=False)
    assert type(product).__name__ == "JetNemotronForCausalLM"
    again, read = export.load(tmp_path)
    assert surgery.kinds_of(again) == surgery.kinds_of(model)
    assert read("amber fox").input_ids == tokenizer("amber fox").input_ids
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        torch.testing.assert_close(product(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(again(ids, use_cache=False).logits, expected)


def test_a_window_survives(tmp_path):
    model, tokenizer = surgery.load("assets/teacher/0")
    kinds = ["sliding_attention" if layer % 2 else "attention" for layer in range(model.config.num_hidden_layers)]
    surgery.convert(model, kinds, None, window=5)
    export.save(model, tmp_path, tokenizer, dims=None)
    ids = torch.randint(0, len(tokenizer), (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        product = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(export.load(tmp_path)[0](ids, use_cache=False).logits, expected)


def test_windows_that_the_decoder_came_with_survive(tmp_path):
    teacher, tokenizer = surgery.load("assets/teacher/0")
    kinds = ["sliding_attention", "full_attention"] * 4
    config = Qwen2Config(
        **teacher.config.to_dict()
        | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0, "layer_types": kinds}
    )
    plain = Qwen2ForCausalLM(config).eval()
    plain.load_state_dict(teacher.state_dict())
    ids = torch.randint(0, len(tokenizer), (1, 30), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = plain(ids, use_cache=False).logits
        assert not torch.allclose(expected, teacher(ids, use_cache=False).logits, atol=1e-2)
        export.save(surgery.attach(plain), tmp_path, tokenizer, dims=None)
        product = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(product, expected, rtol=1e-4, atol=1e-4)
        again = export.load(tmp_path)[0]
        torch.testing.assert_close(again(ids, use_cache=False).logits, expected, rtol=1e-4, atol=1e-4)
    assert surgery.kinds_of(again) == ("sliding_attention", "attention") * 4


@pytest.mark.parametrize("units", [1, 5, 8, 64, 200], ids="{}-units-of-64-values".format)
def test_a_generator_of_any_width_comes_back(units, tmp_path):
    model, tokenizer, dims = hybrid("jetblock", generator_hidden=units, conv_v="dynamic")
    export.save(model, tmp_path, tokenizer, dims=dims, generator_hidden=units, conv_v="dynamic")
    again, _ = export.load(tmp_path)
    mine, theirs = (surgery.slots(m)[0].paths["jetblock"].state_dict() for m in (model, again))
    assert mine.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in mine.items())
    section = json.loads((tmp_path / "config.json").read_text())["efficient_attention_config"]["jet"]
    assert ("options" in section) == (64 // max(1, 64 // units) != units)  # what no whole reduction of 64 gives


@pytest.mark.slow
def test_a_fresh_process_generates_without_training_or_search(tmp_path):
    model, tokenizer, dims = hybrid("jetblock")
    export.save(model, tmp_path, tokenizer, dims=dims)
    code = f"""
import sys, torch, jetlab.hf
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
ids = torch.tensor([[5, 6, 7]])
assert model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False).shape == (1, 7)
assert not [name for name in sys.modules if name.startswith(("jetlab.train", "jetlab.search"))]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_other_decoders_and_supernets_are_refused(tmp_path):
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match=r"hybrid of a Qwen2, got LlamaForCausalLM; use surgery\.save"):
        export.save(surgery.attach(llama), tmp_path / "never", None, dims=None)
    model, tokenizer = surgery.load("assets/teacher/0")
    surgery.wrap(model, "gla", BlockDims(64, 4, 8, 16))
    with pytest.raises(ValueError, match=r"several paths a layer; choose one architecture with surgery\.prune"):
        export.save(model, tmp_path / "never", tokenizer, dims=BlockDims(64, 4, 8, 16))
    assert not (tmp_path / "never").exists()


def test_what_the_layout_cannot_say_is_refused(tmp_path):
    model, tokenizer, dims = hybrid("gla")
    model.config.rope_parameters = {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}
    with pytest.raises(ValueError, match=r"plain rotary positions, got rope_type 'linear'; use surgery\.save"):
        export.save(model, tmp_path / "never", tokenizer, dims=dims)
    model, tokenizer = surgery.load("assets/teacher/0")
    surgery.convert(model, ["sliding_attention"] * model.config.num_hidden_layers, None, window=5)
    surgery.slots(model)[2].paths["sliding_attention"].window = 9
    with pytest.raises(ValueError, match=r"one window for all layers, got \[5, 9\]"):
        export.save(model, tmp_path / "never", tokenizer, dims=None)
    assert not (tmp_path / "never").exists()


def test_dims_that_do_not_fit_the_tensors_are_found(tmp_path):
    model, tokenizer, _ = hybrid("gla")
    export.save(model, tmp_path, tokenizer, dims=BlockDims(64, 4, 8, 12))
    with pytest.raises(ValueError, match=r"of another shape .*run the stage that wrote it again"):
        export.load(tmp_path)


def test_the_dtype_is_that_of_the_tensors(tmp_path):
    model, tokenizer, dims = hybrid("gla")
    export.save(model.to(torch.bfloat16), tmp_path, tokenizer, dims=dims)
    assert AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto").dtype == torch.bfloat16


def test_a_folder_that_is_not_whole_says_what_lacks(tmp_path):
    model, tokenizer, dims = hybrid("gla")
    export.save(model, tmp_path, tokenizer, dims=dims)
    weights = export.load_file(tmp_path / "model.safetensors")
    weights.pop("model.layers.0.self_attn.o_proj.weight")
    export.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"tensors missing \['model\.layers\.0\.self_attn\.o_proj\.weight'\]"):
        export.load(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"model\.safetensors"):
        export.load(tmp_path)
