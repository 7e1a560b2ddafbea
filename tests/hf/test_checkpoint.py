"""Specification of loading and saving: the released layout, round trips, and tensors that do not fit."""

import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from jetlab.hf import JetNemotronForCausalLM, JetNemotronModel

HYBRID = ["jetblock", "attention", "sliding_attention", "gla"]

# The released layout scaled down: 4 layers, D 16, MLP 20, 4 heads and 2 key-value heads of 4, vocabulary 50,
# JetBlock with 2 heads of 6 and 16 (expand_v 2.6666666667), so Kd 12, Vd 32, generator of 32 // 8 = 4 units.
RELEASED_CONFIG = {
    "architectures": ["JetNemotronForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 43,
    "efficient_attention_config": {
        "jet": {
            "mode": "chunk",
            "expand_v": 2.6666666667,
            "num_heads": 2,
            "head_dim": 6,
            "norm_eps": "1e-5",
            "conv_size": 4,
            "dconv_generator_reduction": 8,
            "dconv_implementation": "triton",
        },
        "swa": {"window_size": 5},
    },
    "eos_token_id": 43,
    "hidden_act": "silu",
    "hidden_size": 16,
    "initializer_range": 0.02,
    "intermediate_size": 20,
    "layer_types": ["jet", "attn", "swa", "jet"],
    "max_position_embeddings": 131072,
    "max_window_layers": 4,
    "model_type": "jet_nemotron",
    "num_attention_heads": 4,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": None,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "use_mrope": False,
    "vocab_size": 50,
}
EVERY_LAYER = {
    "input_layernorm.weight": (16,),
    "post_attention_layernorm.weight": (16,),
    "mlp.gate_proj.weight": (20, 16),
    "mlp.up_proj.weight": (20, 16),
    "mlp.down_proj.weight": (16, 20),
}
ATTENTION = {
    "self_attn.q_proj.weight": (16, 16),
    "self_attn.q_proj.bias": (16,),
    "self_attn.k_proj.weight": (8, 16),
    "self_attn.k_proj.bias": (8,),
    "self_attn.v_proj.weight": (8, 16),
    "self_attn.v_proj.bias": (8,),
    "self_attn.o_proj.weight": (16, 16),
}
JET = {
    "self_attn.A_log": (2,),
    "self_attn.dt_bias": (2,),
    "self_attn.q_proj.weight": (12, 16),
    "self_attn.k_proj.weight": (12, 16),
    "self_attn.v_proj.weight": (32, 16),
    "self_attn.b_proj.weight": (2, 16),
    "self_attn.a_proj.weight": (2, 16),
    "self_attn.g_proj.weight": (32, 16),
    "self_attn.o_proj.weight": (16, 32),
    "self_attn.o_norm.weight": (16,),
    "self_attn.dynamic_conv1d.kernel_generator.w1.weight": (4, 16),
    "self_attn.dynamic_conv1d.kernel_generator.w2.weight": (128, 4),
    "self_attn.dynamic_conv1d.kernel_generator.w2.bias": (128,),
}


def released_tensors():
    shapes = {"model.embed_tokens.weight": (50, 16), "model.norm.weight": (16,)}
    for layer, mixer in enumerate((JET, ATTENTION, ATTENTION, JET)):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in (EVERY_LAYER | mixer).items()}
    rng = torch.Generator().manual_seed(0)
    return {name: (0.3 * torch.randn(shape, generator=rng)).bfloat16() for name, shape in shapes.items()}


def write(folder, tensors):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(RELEASED_CONFIG))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


class TestReleasedLayout:
    def test_the_folder_loads_and_every_tensor_is_in_its_place(self, tmp_path):
        tensors = released_tensors()
        model = AutoModelForCausalLM.from_pretrained(write(tmp_path, tensors))
        assert isinstance(model, JetNemotronForCausalLM)
        state = model.state_dict()
        assert set(state) == {*tensors, "lm_head.weight"}
        assert all(torch.equal(state[name], x) for name, x in tensors.items())
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.model.layers[0].self_attn.o_norm.eps == 1e-5
        text = model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4, do_sample=False)
        assert text.shape == (1, 7)

    def test_the_dtype_can_be_chosen(self, tmp_path):
        model = AutoModelForCausalLM.from_pretrained(write(tmp_path, released_tensors()), dtype=torch.float32)
        assert {p.dtype for p in model.parameters()} == {torch.float32}

    def test_what_is_saved_has_the_layout_that_was_read(self, tmp_path):
        tensors = released_tensors()
        AutoModelForCausalLM.from_pretrained(write(tmp_path / "a", tensors)).save_pretrained(tmp_path / "b")
        saved = load_file(tmp_path / "b" / "model.safetensors")
        assert set(saved) == set(tensors)
        assert all(torch.equal(saved[name], x) for name, x in tensors.items())
        config = json.loads((tmp_path / "b" / "config.json").read_text())
        assert {key: config[key] for key in RELEASED_CONFIG} == RELEASED_CONFIG


class TestRoundTrip:
    @torch.no_grad()
    def test_a_saved_model_computes_the_same(self, mixture, build_model, tokens, tmp_path):
        model, ids = build_model(mixture), tokens(2, 9)
        model.save_pretrained(tmp_path)
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(again(ids).logits, model(ids).logits)  # tensors of a file lie unaligned in memory
        assert again.config.layer_kinds == mixture

    @torch.no_grad()
    def test_shards_make_the_same_model(self, build_model, tokens, tmp_path):
        model, ids = build_model(HYBRID, tie_word_embeddings=False), tokens(2, 9)
        model.save_pretrained(tmp_path, max_shard_size="40KB")
        assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
        again = AutoModelForCausalLM.from_pretrained(tmp_path)
        torch.testing.assert_close(again.state_dict(), model.state_dict(), rtol=0, atol=0)
        torch.testing.assert_close(again(ids).logits, model(ids).logits)

    @torch.no_grad()
    def test_layers_that_stay_on_the_disk_compute_the_same(self, mixture, build_model, tokens, tmp_path):
        model, ids = build_model(mixture).float(), tokens(2, 9)
        model.save_pretrained(tmp_path / "model")
        places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "lm_head": "cpu", "model.layers": "disk"}
        again = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=places, offload_folder=tmp_path / "offload"
        )
        assert all(p.device.type == "meta" for p in again.model.layers.parameters())
        torch.testing.assert_close(again(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)

    @pytest.mark.gpu
    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="splits a model over two GPUs")
    @torch.no_grad()
    def test_layers_on_two_gpus_compute_the_same(self, mixture, build_model, tokens, tmp_path):
        model, ids = build_model(mixture), tokens(2, 9).cuda()
        model.save_pretrained(tmp_path)
        places = {"model.embed_tokens": 0, "model.norm": 1, "lm_head": 0}
        places |= {f"model.layers.{i}": int(i >= len(mixture) // 2) for i in range(len(mixture))}
        again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=places)
        torch.testing.assert_close(again(ids).logits, model.cuda()(ids).logits)

    def test_the_decoder_of_an_untied_model_loads_without_its_head(self, build_model, tmp_path):
        model = build_model(HYBRID, tie_word_embeddings=False)
        model.save_pretrained(tmp_path)
        decoder = AutoModel.from_pretrained(tmp_path)
        assert isinstance(decoder, JetNemotronModel)
        torch.testing.assert_close(decoder.state_dict(), model.model.state_dict(), rtol=0, atol=0)

    def test_loading_information_is_given_on_request(self, build_model, tmp_path):
        build_model(HYBRID).save_pretrained(tmp_path)
        model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
        assert isinstance(model, JetNemotronForCausalLM)
        assert not info["missing_keys"]


class TestTensorsThatDoNotFit:
    def test_a_missing_tensor_is_named(self, tmp_path):
        tensors = released_tensors()
        for name in ("model.layers.0.self_attn.A_log", "model.layers.2.mlp.up_proj.weight"):
            del tensors[name]
        with pytest.raises(
            ValueError, match=r"missing: model.layers.0.self_attn.A_log, model.layers.2.mlp.up_proj.wei"
        ):
            AutoModelForCausalLM.from_pretrained(write(tmp_path, tensors))

    def test_an_extra_tensor_is_named(self, tmp_path):
        tensors = released_tensors() | {"model.layers.0.self_attn.q_conv1d.weight": torch.zeros(12, 1, 4)}
        with pytest.raises(ValueError, match=r"not expected: model.layers.0.self_attn.q_conv1d.weight; correct config"):
            AutoModelForCausalLM.from_pretrained(write(tmp_path, tensors))

    def test_a_tensor_of_another_shape_is_named_with_both_shapes(self, tmp_path):
        tensors = released_tensors()
        tensors["model.layers.3.self_attn.o_norm.weight"] = torch.ones(15).bfloat16()
        with pytest.raises(
            ValueError, match=r"of another shape: model.layers.3.self_attn.o_norm.weight \[15\] for \[16\]"
        ):
            AutoModelForCausalLM.from_pretrained(write(tmp_path, tensors))

    def test_a_tensor_missing_in_a_shard_is_named(self, build_model, tmp_path):
        build_model(HYBRID).save_pretrained(tmp_path, max_shard_size="40KB")
        shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
        tensors = load_file(shard)
        name = min(tensors)
        del tensors[name]
        save_file(tensors, shard, metadata={"format": "pt"})
        with pytest.raises(ValueError, match=rf"missing: {re.escape(name)}; correct config"):
            AutoModelForCausalLM.from_pretrained(tmp_path)

    def test_a_head_that_differs_from_the_embeddings_it_is_tied_to_is_refused(self, tmp_path):
        tensors = released_tensors()
        tensors["lm_head.weight"] = -tensors["model.embed_tokens.weight"]
        with pytest.raises(
            ValueError, match=r"lm_head.weight of .* must equal the embeddings, because config.json ties"
        ):
            AutoModelForCausalLM.from_pretrained(write(tmp_path, tensors))

    def test_an_untied_model_needs_its_head(self, build_model, tmp_path):
        build_model(HYBRID).save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=r"missing: lm_head.weight; correct config.json"):
            AutoModelForCausalLM.from_pretrained(tmp_path, tie_word_embeddings=False)

    def test_drawing_what_does_not_fit_is_refused(self, tmp_path):
        with pytest.raises(
            ValueError, match="ignore_mismatched_sizes must be False, got True: the tensors that do not"
        ):
            AutoModelForCausalLM.from_pretrained(write(tmp_path, released_tensors()), ignore_mismatched_sizes=True)


def test_importing_the_model_loads_layers_and_operations_alone():
    code = (
        "import sys, torch, jetlab.hf\n"
        "from transformers import AutoConfig, AutoModelForCausalLM\n"
        "with torch.device('meta'):\n"
        "    AutoModelForCausalLM.from_config(AutoConfig.for_model('jet_nemotron'))\n"
        "print(sorted({name.split('.')[1] for name in sys.modules if name.startswith('jetlab.')}))"
    )
    printed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == "['hf', 'layers', 'ops']"
