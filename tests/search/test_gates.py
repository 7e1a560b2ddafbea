"""Specification of jointly trained gates: they find the layers that matter, and nothing else moves."""

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from jetlab.data.packing import Mixture
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.search.gates import GateRun, gates_within, train_gates

N_LAYERS = 5
LINEAR = "gated_deltanet"


def build(tokenizer, important):
    """A random model in which attention adds to the stream in the layers `important` only, and linear paths nowhere.

    So a gate of any other layer changes no output, and each gate of an important layer that opens brings the teacher back.
    """
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=24, intermediate_size=32, num_hidden_layers=N_LAYERS,
        num_attention_heads=2, num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    surgery.wrap(model, LINEAR, BlockDims(24, 2, 8, 8))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.2 * torch.randn_like(p))
        for layer, slot in enumerate(surgery.slots(model)):
            slot.paths[LINEAR].o_proj.weight.zero_()
            if layer not in important:
                slot.paths["attention"].inner.o_proj.weight.zero_()
    return model


@pytest.fixture
def mixture(tasks, tokenizer):
    return Mixture(tasks, {"retrieval": 2, "math": 1}, tokenizer, 40, seed=0)


def train(model, mixture, budget, **changed):
    return train_gates(
        model, mixture, **{"budget": budget, "linear": LINEAR, "n_steps": 30, "learning_rate": 0.2} | changed
    )


@pytest.mark.parametrize("important", [(0,), (3,), (1, 4), (0, 2, 3)], ids=str)
def test_gates_open_where_attention_matters_and_close_elsewhere(important, tokenizer, mixture):
    run = train(build(tokenizer, important), mixture, len(important))
    assert run.placement == important
    for layer, gate in enumerate(run.gates):
        assert gate > 0.9 if layer in important else gate < 0.1, run.gates
    assert run.history[-1]["loss"] < 0.3 * run.history[0]["loss"]


def test_layers_that_do_not_matter_keep_equal_gates(tokenizer, mixture):
    gates = train(build(tokenizer, (2,)), mixture, 1).gates
    others = [gate for layer, gate in enumerate(gates) if layer != 2]
    assert max(others) - min(others) < 1e-6


def test_the_objective_is_the_task_that_the_mixture_holds(tasks, tokenizer):

    def gates(rows, weights=None):
        mixture = Mixture(tasks, rows, tokenizer, 40, seed=0)
        return train(build(tokenizer, (1, 3)), mixture, 1, weights=weights, n_steps=3).gates

    both = {"math": 1, "retrieval": 1}
    assert gates(both, {"retrieval": 0.0}) == pytest.approx(gates({"math": 1}), abs=1e-5)  # fp32: another batch size
    assert gates(both) != pytest.approx(gates({"math": 1}), abs=1e-3)
    assert gates(both, dict.fromkeys(both, 0.0)) == pytest.approx([1 / N_LAYERS] * N_LAYERS)


def test_the_budget_holds_at_every_step_and_the_gates_start_equal(tokenizer, mixture):
    run = train(build(tokenizer, (1, 4)), mixture, 2, n_steps=1)
    assert [run.history[0][f"gate_{layer}"] for layer in range(N_LAYERS)] == [0.4] * N_LAYERS
    run = train(build(tokenizer, (1, 4)), mixture, 2)
    assert [row["step"] for row in run.history] == [10, 20, 30]
    for row in run.history:
        assert sum(row[f"gate_{layer}"] for layer in range(N_LAYERS)) == pytest.approx(2, abs=1e-5)
    assert run.n_tokens == run.history[-1]["tokens"] == 30 * 3 * 40


def test_the_weights_do_not_move_and_the_model_is_left_as_it_was(tokenizer, mixture):
    model = build(tokenizer, (1, 4)).train()
    surgery.freeze(model)
    kinds = ("attention", LINEAR, LINEAR, "attention", LINEAR)
    surgery.activate(model, kinds)
    ids = mixture.batch(0).ids
    before = {name: x.clone() for name, x in model.state_dict().items()}
    required = {name: p.requires_grad for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
    run = train(model, mixture, 2)
    assert max(run.gates) > 0.9
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert {name: p.requires_grad for name, p in model.named_parameters()} == required
    assert all(p.grad is None for p in model.parameters())
    assert surgery.kinds_of(model) == kinds and model.training
    assert not any("mix" in vars(slot) for slot in surgery.slots(model))
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected, atol=0, rtol=0)


def test_a_run_that_breaks_off_leaves_the_model_as_it_was_too(tokenizer, mixture, monkeypatch):
    model = build(tokenizer, (1,))
    surgery.activate(model, (LINEAR,) * N_LAYERS)

    def broken(step):
        raise KeyboardInterrupt

    monkeypatch.setattr(mixture, "batch", broken)
    with pytest.raises(KeyboardInterrupt):
        train(model, mixture, 1)
    assert surgery.kinds_of(model) == (LINEAR,) * N_LAYERS
    assert all(p.requires_grad for p in model.parameters())


def test_the_same_mixture_trains_the_same_gates(tokenizer, mixture):
    torch.rand(3)
    assert train(build(tokenizer, (1, 4)), mixture, 1) == train(build(tokenizer, (1, 4)), mixture, 1)


def test_a_sliding_path_can_be_chosen_against_too(tokenizer, mixture):
    """A window as long as a row is attention itself, one of a single token is not."""
    torch.manual_seed(0)
    model = build(tokenizer, range(N_LAYERS))
    for layer, slot in enumerate(surgery.slots(model)):
        pretrained = slot.paths["attention"]
        sliding = surgery.MIXERS["sliding_attention"]
        slot.paths["sliding_attention"] = sliding(pretrained.inner, pretrained.rotary, window=1 if layer == 3 else 40)
    assert train(model, mixture, 1, linear="sliding_attention").placement == (3,)


def test_the_choice_is_the_largest_gates_and_ties_go_to_the_smaller_layers():
    assert GateRun((0.1, 0.7, 0.3, 0.9), 2, [], 0).placement == (1, 3)
    assert GateRun((0.5, 0.2, 0.5, 0.5), 2, [], 0).placement == (0, 2)


@pytest.mark.parametrize("budget", [1, 2, 3])
@pytest.mark.parametrize("temperature", [1.0, 0.3, 0.01])
def test_gates_sum_to_the_budget_and_keep_the_order(budget, temperature):
    logits = torch.tensor([0.3, -2.0, 1.0, 0.0])
    gates = gates_within(logits, budget, temperature)
    assert float(gates.sum()) == pytest.approx(budget, abs=1e-6)
    assert bool((gates[logits.argsort()].diff() >= 0).all())
    torch.testing.assert_close(gates_within(logits + 5, budget, temperature), gates, atol=1e-5, rtol=0)


def test_two_gates_of_budget_one_are_in_closed_form():
    # g_0 + g_1 = 1 means b = (α_0 + α_1) / 2
    gates = gates_within(torch.tensor([1.0, 0.0]), 1, 0.5)
    assert gates.tolist() == pytest.approx([1 / (1 + math.exp(-1)), 1 / (1 + math.exp(1))])


def test_gates_have_the_gradient_of_a_sum_that_is_kept():
    logits = torch.tensor([0.3, -0.7, 1.0, 0.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: gates_within(x, 2, 0.6), logits)


def test_gates_far_apart_saturate_without_a_gradient_that_is_no_number():
    logits = torch.tensor([500.0, -500.0, 0.0], requires_grad=True)
    gates = gates_within(logits, 1, 0.01)
    gates[0].backward()
    assert gates.tolist() == pytest.approx([1, 0, 0]) and bool(logits.grad.isfinite().all())


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        pytest.param({"budget": 0}, "budget must be 1 … 4 full layers so that there is a choice, got 0", id="none"),
        pytest.param({"budget": N_LAYERS}, "budget must be 1 … 4 full layers", id="all"),
        pytest.param({"final_temperature": 0.0}, r"must be in \(0, 1\], got 0", id="no-temperature"),
        pytest.param({"final_temperature": 2.0}, r"must be in \(0, 1\], got 2", id="rising-temperature"),
        pytest.param({"n_steps": 0}, "n_steps must be at least 1, got 0", id="no-steps"),
        pytest.param({"linear": "gla"}, "layer 0 has paths attention, gated_deltanet, not 'gla'", id="no-such-path"),
    ],
)
def test_what_leaves_no_choice_is_refused(changed, message, tokenizer, mixture):
    model = build(tokenizer, (1,))
    with pytest.raises(ValueError, match=message):
        train(model, mixture, **{"budget": 1} | changed)
