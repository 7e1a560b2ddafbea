"""Specification of fixed-shape steps: the same training as the plain loop, and on a GPU the same again when captured."""

import pytest
import torch

from jetlab.config import Common, ScratchTraining, Study, Tasks, Training
from jetlab.data.packing import Mixture
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.tasks import build_tasks
from jetlab.train.captured import FixedShapes
from jetlab.train.loop import adamw, fit
from jetlab.train.losses import (
    answer_loss,
    distillation_loss,
    weighted_answer_loss,
    weighted_distillation_loss,
)
from jetlab.train.paths import fixed_law, placement_kinds, train_paths
from jetlab.train.scratch import train_from_scratch

SIZES = {
    "knowledge": {"n_options": 4},
    "math": {"n_names": 8},
    "retrieval": {"n_pairs": 8, "key_words": 1},
    "code": {"n_variables": 6, "writes_per_variable": 2},
    "recency": {"n_pairs": 4, "n_distractors": 6},
    "patterns": {"n_records": 4},
    "chain": {"n_names": 4, "n_changes": 1},
}
ROWS = {"knowledge": 2, "math": 1, "retrieval": 2, "facts": 1}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="captures a CUDA graph, which needs a GPU")


@pytest.fixture(scope="module")
def tokenizer():
    return surgery.load("assets/teacher/0")[1]


def mixture(tokenizer) -> Mixture:
    return Mixture(build_tasks(SIZES), ROWS, tokenizer, 96, 0)


def test_dense_weights_give_the_losses_over_tasks(tokenizer):
    batch = mixture(tokenizer).batch(3)
    weights = {"facts": 0.5, "math": 2.0}
    position, target, which = batch.targets()
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(batch.ids.numel(), 40, generator=generator, dtype=torch.float64) for _ in range(2))
    target = target % 40
    dense = batch.weights(weights)
    assert dense.count_nonzero() == len(position) and dense.shape == (batch.ids.numel(),)
    torch.testing.assert_close(
        weighted_distillation_loss(student, teacher, dense),
        distillation_loss(student[position], teacher[position], which, weights),
    )
    everywhere = torch.zeros(batch.ids.numel(), dtype=torch.long)
    everywhere[position] = target
    torch.testing.assert_close(
        weighted_answer_loss(student, everywhere, dense), answer_loss(student[position], target, which, weights)
    )


def test_a_step_in_two_halves_is_the_plain_step():
    def run(halves: bool):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)

        def inputs(step):
            return (torch.randn(8, 3, generator=torch.Generator().manual_seed(step)),)

        def loss(x):
            return (model(x) - x[:, :2]).square().mean()

        def plain(step):
            return loss(*inputs(step)), {"n": step}

        steps = FixedShapes(inputs, loss, lambda step: {"n": step}) if halves else plain
        history = fit(model.named_parameters(), [adamw(model.parameters(), 1e-2)], steps, n_steps=20, label="x")
        return history, model.weight.detach()

    (history, weight), (expected_history, expected) = run(True), run(False)
    assert history == expected_history
    assert torch.equal(weight, expected)


@needs_gpu
@pytest.mark.parametrize("kind", ["retnet", "mamba2", "gla", "deltanet", "gated_deltanet", "jetblock", "rwkv7"])
def test_captured_training_follows_the_plain_one(tokenizer, kind, monkeypatch):
    training = Training(
        n_local=10, n_steps=20, learning_rate=3e-3, warmup=2, feature_weight=2.0, logit_weight=1.0, growth=0.4,
        rows=ROWS, weights={"facts": 0.5},
    )  # fmt: skip

    def run(captured: bool):
        model, _ = surgery.load("assets/teacher/0", device="cuda")
        n_layers = model.config.num_hidden_layers
        kinds = placement_kinds(n_layers, (3,), kind)
        torch.manual_seed(0)
        surgery.wrap(model, kind, BlockDims(64, 4, 8, 16), layers=[i for i in range(n_layers) if i != 3])
        if not captured:
            monkeypatch.setattr("jetlab.train.loop.FixedShapes", type("Never", (), {}))
            monkeypatch.setattr("jetlab.train.paths.FixedShapes", _Plain)
        history = train_paths(model, mixture(tokenizer), fixed_law(kinds), training, label="x")
        monkeypatch.undo()
        return [row["loss"] for row in history]

    captured, plain = run(True), run(False)
    torch.testing.assert_close(torch.tensor(captured), torch.tensor(plain), rtol=2e-3, atol=1e-5)


def _Plain(inputs_at, loss_of, log_at=lambda step: {}):
    def loss_at(step):
        return loss_of(*(x.cuda() for x in inputs_at(step))), log_at(step)

    return loss_at


@needs_gpu
def test_captured_training_from_scratch_follows_the_plain_one(monkeypatch):
    """Muon and AdamW in one graph, with learning rates that change from step to step."""
    tasks = Tasks(seq_len=96, sizes=SIZES, n_contexts={"search": 1, "select": 1, "test": 1}, n_questions=1)
    common = Common(seed=0, n_threads=1, path="paper", device="cuda")
    training = ScratchTraining(
        n_steps=30, learning_rate=2e-3, muon_learning_rate=4e-3, warmup=5, growth=0.4, rows=ROWS, weights={}
    )

    def run(captured: bool):
        if not captured:
            monkeypatch.setattr("jetlab.train.loop.FixedShapes", type("Never", (), {}))
            monkeypatch.setattr("jetlab.train.scratch.FixedShapes", _Plain)
        args = (
            Study(common=common, tasks=tasks),
            training,
            "assets/teacher/0",
            (3,),
            "jetblock",
            BlockDims(64, 4, 8, 16),
        )
        found = train_from_scratch(*args, label="x")
        monkeypatch.undo()
        return found.history[-1]["loss"]

    assert run(True) == pytest.approx(run(False), rel=2e-2)
