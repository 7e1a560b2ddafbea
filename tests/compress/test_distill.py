"""Distillation of pruned models: the original is the fixed point, and students do not see one another."""

import copy

import pytest
import torch

from jetlab.compress.distill import Lessons, distill
from jetlab.compress.prune import apply
from jetlab.compress.search import random_importance
from jetlab.compress.target import Target
from jetlab.data.packing import Mixture
from jetlab.models import nemotron

SETTINGS = {"n_steps": 12, "learning_rate": 3e-3, "warmup": 2}


@pytest.fixture
def mixture(tasks, tokenizer):
    return Mixture(tasks, {"retrieval": 2, "knowledge": 1}, tokenizer, 48, seed=3)


@pytest.fixture
def original(small, tokenizer):
    return small("M-*M-", vocab_size=len(tokenizer))


@pytest.fixture
def pruned(original):
    target = Target((0, 1, 2, 4), 20, 14, 4)
    return apply(original, target, random_importance(nemotron.shape_of(original.config), 0))


def weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_a_copy_of_the_original_has_nothing_to_learn(original, mixture):
    ((record,),) = distill(
        Lessons(original, mixture), [copy.deepcopy(original)], n_steps=1, learning_rate=1e-3, warmup=1
    )
    assert abs(record["loss"]) < 1e-5  # fp32


def test_a_pruned_model_comes_closer_to_the_original(original, pruned, mixture):
    lessons = Lessons(original, mixture)
    first = distill(lessons, [copy.deepcopy(pruned)], **SETTINGS | {"n_steps": 1})[0][-1]["loss"]
    before = weights(original)
    history = distill(lessons, [pruned], **SETTINGS | {"n_steps": 60})[0]
    assert history[-1]["loss"] < 0.7 * first and not pruned.training
    assert torch.equal(weights(original), before)
    assert all(p.grad is None for p in original.parameters())


def test_students_do_not_see_one_another(original, pruned, mixture):
    alone, together, other = copy.deepcopy(pruned), copy.deepcopy(pruned), copy.deepcopy(original)
    (history,) = distill(Lessons(original, mixture), [alone], **SETTINGS)
    both = distill(Lessons(original, mixture), [other, together], **SETTINGS)
    assert torch.equal(weights(alone), weights(together)) and both[1] == history


def test_the_original_reads_each_step_once(original, pruned, mixture):
    calls = []
    original.model.register_forward_hook(lambda *_: calls.append(1))
    distill(Lessons(original, mixture), [pruned, copy.deepcopy(pruned)], **SETTINGS)
    assert len(calls) == SETTINGS["n_steps"]


def test_the_weight_of_a_task_counts(original, pruned, mixture):
    losses = [
        distill(Lessons(original, mixture), [copy.deepcopy(pruned)], weights=weights, **SETTINGS | {"n_steps": 1})[0]
        for weights in ({"retrieval": 0.0, "knowledge": 0.0}, {"retrieval": 0.0}, {"knowledge": 0.0}, None)
    ]
    none, knowledge, retrieval, both = (history[0]["loss"] for history in losses)
    assert none == 0 and both == pytest.approx(knowledge + retrieval, rel=1e-5)
