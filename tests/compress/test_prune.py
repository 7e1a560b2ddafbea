"""Pruning copies what stays: against silenced originals, layer skipping and a round trip through a folder."""

import dataclasses
import math

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from jetlab.compress.budget import Budget, needed
from jetlab.compress.importance import Importance, logit_error, measure, only, remove_layers
from jetlab.compress.prune import apply, prune
from jetlab.compress.search import BudgetTooSmall, Space, candidates, random_importance
from jetlab.compress.target import Target, whole
from jetlab.models import nemotron

ALL = (0, 1, 2, 3, 4)
IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6, 5, 35, 8], [2, 7, 1, 8, 2, 8, 1, 8, 28, 4, 5]])


def logits(model):
    with torch.no_grad():
        return model(IDS).logits


def norms(model):
    return [*(block.norm for block in model.model.layers), model.model.norm_f]


def scores(n: int, *dropped: int) -> torch.Tensor:
    """Importance by which `dropped` go first."""
    values = torch.arange(1.0, n + 1)
    values[list(dropped)] = 0
    return values


def importance_without(neurons=(), channels=(), heads=()) -> Importance:
    mlps = {layer: scores(20, *neurons) for layer in (1, 4)}
    return Importance(mlps, scores(24, *channels), {layer: scores(6, *heads) for layer in (0, 3)})


def test_pruning_nothing_gives_the_same_bits_in_memory_of_its_own(small):
    model = small()
    copy = apply(model, whole(nemotron.shape_of(model.config)), None)
    assert torch.equal(logits(copy), logits(model))
    theirs = {p.data_ptr() for p in model.parameters()}
    assert not any(p.data_ptr() in theirs for p in copy.parameters())


def test_neurons_that_are_silent_are_not_missed(small):
    model, gone = small(), (0, 7, 19)
    with torch.no_grad():
        for layer in (1, 4):
            model.model.layers[layer].mixer.up_proj.weight[list(gone)] = 0
    pruned = apply(model, Target(ALL, 24, 17, 6), importance_without(neurons=gone))
    assert_close(logits(pruned), logits(model), atol=1e-5, rtol=1e-5)  # fp32: sums of other lengths


def test_heads_that_are_silent_are_missed_by_the_norm_of_their_group_alone(small):
    model, gone = small(norm_eps=1e-12), (1, 5)  # one of heads 0 … 2 and one of 3 … 5
    channels = [4 * head + i for head in gone for i in range(4)]
    with torch.no_grad():
        for layer in (0, 3):
            mixer = model.model.layers[layer].mixer
            mixer.in_proj.weight[[24 + channel for channel in channels]] = 0  # x, behind z
            mixer.conv1d.bias[channels] = 0
    pruned = apply(model, Target(ALL, 24, 20, 4), importance_without(heads=gone))
    with torch.no_grad():
        for layer in (0, 3):
            pruned.model.layers[layer].mixer.norm.weight *= math.sqrt(
                6 / 4
            )  # the mean square is over 2 heads instead of 3
    assert_close(logits(pruned), logits(model), atol=1e-4, rtol=1e-4)


def test_channels_that_are_silent_are_missed_by_the_norms_alone(small):
    model, gone = small(norm_eps=1e-12), [2, 3, 11, 23]
    with torch.no_grad():
        model.model.embeddings.weight[:, gone] = 0
        for block in model.model.layers:  # nothing is ever written to these channels
            name = {"mlp": "down_proj", "full_attention": "o_proj"}.get(block.block_type, "out_proj")
            block.mixer.get_submodule(name).weight[gone] = 0
    pruned = apply(model, Target(ALL, 20, 20, 6), importance_without(channels=gone))
    with torch.no_grad():
        for norm in norms(pruned):
            norm.weight *= math.sqrt(24 / 20)
    assert_close(logits(pruned), logits(model), atol=1e-4, rtol=1e-4)


def test_an_mlp_is_the_hand_sliced_one(small):
    model = small()
    pruned = apply(model, Target((0, 4), 22, 13, 6), random_importance(nemotron.shape_of(model.config), 0))
    seen = random_importance(nemotron.shape_of(model.config), 0)
    channels, neurons = (x.topk(n).indices.sort().values for x, n in ((seen.channels, 22), (seen.neurons[4], 13)))
    full, x = model.model.layers[4].mixer, torch.randn(5, 22, generator=torch.Generator().manual_seed(0))
    hidden = torch.relu(x @ full.up_proj.weight[neurons][:, channels].T).square()
    assert_close(pruned.model.layers[1].mixer(x), hidden @ full.down_proj.weight[channels][:, neurons].T)


def test_every_group_keeps_as_many_heads(small):
    model = small()
    by_score = Importance({}, scores(24), {layer: torch.tensor([9.0, 8, 7, 1, 2, 3]) for layer in (0, 3)})
    pruned = apply(model, Target(ALL, 24, 20, 4), by_score)  # the best four would be heads 0, 1, 2 and 5
    assert torch.equal(pruned.model.layers[3].mixer.A_log, model.model.layers[3].mixer.A_log[[0, 1, 4, 5]])


def test_removed_layers_are_skipped(small):
    model = small()
    with only(model, (0, 2, 4)):
        expected = logits(model)
    pruned = apply(model, Target((0, 2, 4), 24, 20, 6), None)
    assert torch.equal(logits(pruned), expected)
    assert pruned.config.hybrid_override_pattern == "M*-"
    generated = pruned.generate(IDS[:1], max_new_tokens=3, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert generated.shape == (1, IDS.shape[1] + 3)  # with a cache: the layers that stay are numbered anew


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pruned_model_comes_back_from_its_folder(small, rows, tmp_path, dtype):
    model = small().to(dtype)
    pruned = apply(model, Target((0, 1, 2, 4), 20, 12, 4), measure(model, rows))
    assert {p.dtype for p in pruned.parameters()} == {dtype}
    pruned.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert type(again) is type(model) and torch.equal(logits(again), logits(pruned))
    shape = nemotron.shape_of(again.config)
    assert (shape.d_model, shape.d_ff, shape.linear.n_heads) == (20, 12, 4)
    assert shape.layer_kinds == ("mamba2", "mlp", "attention", "mlp")


def test_every_weight_of_a_pruned_model_gets_a_gradient(small, rows):
    model = small()
    pruned = apply(model, Target(ALL, 20, 12, 4), measure(model, rows)).train()
    pruned(IDS, labels=IDS).loss.backward()
    assert all(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in pruned.parameters())
    assert not any(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("target", "message"),
    [
        (Target((), 24, 20, 6), "layers that stay must be at least one of 0 … 4"),
        (Target((0, 5), 24, 20, 6), r"got \(0, 5\)"),
        (Target((1, 0), 24, 20, 6), "each once and ascending"),
        (Target(ALL, 25, 20, 6), "d_model must be 1 … 24, got 25; try 24"),
        (Target(ALL, 24, 0, 6), "d_ff must be 1 … 20, got 0; try 1"),
        (Target(ALL, 24, 20, 8), "n_mamba_heads must be 1 … 6, got 8; try 6"),
        (Target(ALL, 24, 20, 3), "multiple of the 2 groups .* got 3; try 2"),
        (Target(ALL, 24, 19, 6), "needs the importance of what may go"),
    ],
)
def test_a_target_out_of_reach_is_refused(small, target, message):
    with pytest.raises(ValueError, match=message):
        apply(small(), target, None)


SPACE = Space(n_removed=(0, 1, 2), d_model=(16, 20, 24), d_ff=(8, 12, 16, 20), n_mamba_heads=(4, 6))


def budget_of(model, share: float) -> Budget:
    anything = Budget(1, context=64)
    return dataclasses.replace(anything, n_bytes=int(share * needed(nemotron.shape_of(model.config), anything).total))


@pytest.mark.parametrize("with_rows", [True, False], ids=["with-rows", "without-rows"])
def test_prune_gives_a_model_that_fits_and_reloads(small, rows, tmp_path, with_rows):
    model = small("M-*M-*-")
    budget = budget_of(model, 0.7)
    pruned = prune(model, budget, calibration=rows if with_rows else None, space=SPACE)
    assert needed(nemotron.shape_of(pruned.config), budget).total <= budget.n_bytes
    pruned.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(pruned))


def test_prune_takes_the_maximal_target_of_least_logit_error(small, rows):
    model = small("M-*M-*-")
    shape, budget = nemotron.shape_of(model.config), budget_of(model, 0.7)
    order = [removal.layer for removal in remove_layers(model, rows, 2)]
    found = candidates(shape, order, SPACE, budget)
    errors = [
        logit_error(model, apply(model, c.target, measure(model, rows, layers=c.target.layers)), rows) for c in found
    ]
    assert len(found) > 2
    assert logit_error(model, prune(model, budget, calibration=rows, space=SPACE), rows) == pytest.approx(min(errors))


def test_a_model_that_fits_comes_back_as_it_is(small):
    model = small()
    assert torch.equal(logits(prune(model, budget_of(model, 1.0))), logits(model))


def test_a_budget_out_of_reach_names_what_is_within(small, rows):
    model = small("M-*M-*-")
    with pytest.raises(BudgetTooSmall, match="5 layers, d_model 16, d_ff 8, 4 Mamba heads; raise the budget"):
        prune(model, budget_of(model, 0.1), calibration=rows, space=SPACE)


def test_another_model_is_refused():
    other = Qwen3ForCausalLM(
        Qwen3Config(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
    )
    with pytest.raises(ValueError, match="got a model of type qwen3"):
        prune(other, Budget(10**9, context=64))
