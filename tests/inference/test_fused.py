"""While the engine runs, a decoder's norms, rotary positions and gates are a launch each; behind, all is its own again."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama import modeling_llama
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen3 import modeling_qwen3

from jetlab.hf import JetNemotronConfig, JetNemotronForCausalLM
from jetlab.inference import fused
from jetlab.inference.attention import engaged
from jetlab.inference.engine import Engine

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
WIDTHS |= {"num_attention_heads": 4, "num_key_value_heads": 2}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 8}
PROMPTS = [list(range(1, 14)), [5, 6, 7]]


def jet(**options):
    blocks = {"gla": {"num_heads": 2, "head_dim": 8, "expand_v": 2.0, "norm_eps": 1e-5}}
    kinds = ["gla", "attention", "gla"]
    return JetNemotronForCausalLM(
        JetNemotronConfig(**WIDTHS | options, layer_kinds=kinds, efficient_attention_config=blocks)
    )


MODELS = {
    "qwen2": lambda **options: Qwen2ForCausalLM(Qwen2Config(**WIDTHS | options)),
    "qwen3": lambda **options: Qwen3ForCausalLM(Qwen3Config(**WIDTHS | options, head_dim=8)),
    "llama": lambda **options: LlamaForCausalLM(LlamaConfig(**WIDTHS | options)),
    "jet": jet,
}
TRANSFORMERS = {"qwen2": modeling_qwen2, "qwen3": modeling_qwen3, "llama": modeling_llama}


def made(name, dtype=torch.float32, **options):
    """With norms that do more than divide, and weights so large that tokens depend on the whole prompt."""
    torch.manual_seed(0)
    model = MODELS[name](**options)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(mean=float(parameter.ndim == 1), std=0.3)
    return model.to(DEVICE, dtype).eval()


def generated(model, prompts, n_new):
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    options = {"max_new_tokens": n_new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()


def forwards(model):
    return {name: vars(module)["forward"] for name, module in model.named_modules() if "forward" in vars(module)}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"hidden_act": "gelu"}, id="another-activation"),
        pytest.param({"rms_norm_eps": 0.1}, id="a-large-eps"),
        pytest.param({"rope_parameters": YARN}, id="scaled-angles"),
    ],
)
def test_tokens_are_those_of_generate(name, options):
    if name == "jet" and "rope_parameters" in options:
        pytest.skip("Jet-Nemotron has plain rotary positions alone")
    model = made(name, **options)
    expected = generated(model, PROMPTS, 8)
    assert Engine(model, batch_size=2, max_len=24, prefill_chunk=5).generate(PROMPTS, 8) == expected


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_nothing_of_transformers_norms_positions_and_gates_is_left(name, monkeypatch):
    model = made(name)
    expected = generated(model, PROMPTS, 5)
    module, prefix = TRANSFORMERS[name], name.capitalize()
    for part in (f"{prefix}RMSNorm", f"{prefix}MLP", f"{prefix}Attention"):
        monkeypatch.setattr(getattr(module, part), "forward", None)
    monkeypatch.setattr(module, "apply_rotary_pos_emb", None)
    assert Engine(model, batch_size=2, max_len=24).generate(PROMPTS, 5) == expected


@pytest.mark.skipif(DEVICE == "cuda", reason="a graph does not come back to Python")
def test_a_step_rotates_once_a_layer_with_its_norms_and_gates_once(monkeypatch):
    engine, calls = Engine(made("qwen3"), batch_size=2, max_len=24), []
    engine.prefill(PROMPTS)
    for op in ("rotary", "swiglu"):
        own = getattr(fused, op)
        monkeypatch.setattr(
            fused, op, lambda *x, op=op, own=own, **given: calls.append((op, given)) or own(*x, **given)
        )
    engine.step()
    assert [op for op, _ in calls] == ["rotary", "swiglu"] * 3
    attention = engine.model.model.layers[0].self_attn
    assert calls[0][1]["q_weight"] is attention.q_norm.weight and calls[0][1]["k_weight"] is attention.k_norm.weight


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "llama"])
def test_logits_in_bf16_are_as_near_the_exact_ones_as_those_of_transformers(name):
    exact, model = made(name, torch.float64), made(name, torch.bfloat16)
    engine, errors = Engine(model, batch_size=1, max_len=24), []
    for last in range(16):  # both round, not alike: the errors of a single token say little
        ids = torch.tensor([[*PROMPTS[0][:-1], last + 1]], device=DEVICE)
        with torch.no_grad():
            truth, theirs = exact(ids).logits[0, -1], model(ids).logits[0, -1]
        engine.prefill([PROMPTS[0][:-1]])
        ours = engine.step(ids[0, -1:])[0]
        errors.append([(x.double() - truth).square().sum() for x in (ours, theirs)])
    ours, theirs = torch.tensor(errors).sum(0).sqrt()
    assert ours < 1.5 * theirs


@pytest.mark.parametrize("name", MODELS)
def test_all_is_the_models_own_again_even_behind_an_error(name, monkeypatch):
    model = made(name)
    attention = model.base_model.layers[1].self_attn
    hook = lambda *x, **y: type(attention).forward(attention, *x, **y)  # noqa: E731  as accelerate sets one
    attention.forward = hook
    before, implementation = forwards(model), model.config._attn_implementation
    assert list(before.values()) == [hook]
    engine = Engine(model, batch_size=1, max_len=24)
    assert forwards(model) == before
    with engaged(model):
        assert len(forwards(model)) > 3 and attention.forward is not hook
    with pytest.raises(KeyboardInterrupt), engaged(model):
        raise KeyboardInterrupt
    assert forwards(model) == before
    monkeypatch.setattr(fused, "rotary", None)
    with pytest.raises(TypeError):
        engine.generate([[1, 2]], 2)
    assert forwards(model) == before and model.config._attn_implementation == implementation
    assert generated(model, [[1, 2]], 2)


def test_another_model_of_the_same_classes_keeps_its_own_meanwhile(monkeypatch):
    one, other = made("qwen3"), made("qwen3")
    expected = generated(other, PROMPTS, 4)
    monkeypatch.setattr(fused, "rotary", None)
    with engaged(one):
        assert generated(other, PROMPTS, 4) == expected


def test_a_gemma_keeps_its_own_norms():
    config = Gemma3TextConfig(**WIDTHS, head_dim=8, layer_types=["full_attention"] * 3)
    model = Gemma3ForCausalLM(config).to(DEVICE).eval()
    with engaged(model):
        assert forwards(model) == {}
