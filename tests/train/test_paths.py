"""Specification of training new paths in a frozen model: they learn, the law decides which, the rest stays to the bit."""

import pytest
import torch

from jetlab.config import Training
from jetlab.data.packing import Mixture
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.train import loop
from jetlab.train.paths import LAWS, fixed_law, path_law, placement_kinds, train_paths


def build():
    model, tokenizer = surgery.load(ROOT / "assets/teacher/0")
    torch.manual_seed(0)
    return surgery.wrap(model, "gated_deltanet", BlockDims(64, 2, 8, 8)), tokenizer


def train(tasks, *, n_local=11, n_steps=6, law=None, resume_key=None, measure=None, **weights):
    model, tokenizer = build()
    weights = {"feature_weight": 1.0, "logit_weight": 1.0} | weights
    training = Training(
        n_local=n_local, n_steps=n_steps, learning_rate=5e-3, warmup=2, growth=0.4, **weights,
        rows={"retrieval": 1, "math": 1}, weights={"math": 0.5},
    )  # fmt: skip
    mixture = Mixture(tasks, training.rows, tokenizer, 40, seed=0)
    law = law or path_law("up_to_k", 8, "gated_deltanet", 2, seed=0)
    return model, train_paths(model, mixture, law, training, label="paths", resume_key=resume_key, measure=measure)


@pytest.fixture(scope="module")
def run(tasks):
    return train(tasks)


def test_both_phases_are_in_the_curve_and_steps_count_through(run):
    _, history = run
    assert [(row["phase"], row["step"]) for row in history] == [("local", 10), ("local", 11), ("end to end", 17)]
    assert history[-1]["tokens"] == 17 * 2 * 40


def test_local_alignment_brings_the_paths_closer_to_attention(tasks):
    _, history = train(tasks, n_local=40, n_steps=1)
    local = [row["loss"] for row in history if row["phase"] == "local"]
    assert local == sorted(local, reverse=True) and local[-1] < 0.8 * local[0]


def test_the_teacher_stays_as_it_was_to_the_bit(run):
    before, _ = build()
    after = run[0].state_dict()
    for name, x in before.state_dict().items():
        assert (".paths.gated_deltanet." in name) != (x.numpy().tobytes() == after[name].numpy().tobytes()), name


def test_the_same_seeds_train_the_same_bits(run, tasks):
    torch.rand(3)
    model, history = train(tasks)
    assert history == run[1]
    assert all(torch.equal(x, run[0].state_dict()[name]) for name, x in model.state_dict().items())


@pytest.mark.parametrize("stop_at", [4, 14])
def test_a_run_that_was_killed_in_either_phase_ends_with_the_same_bits(stop_at, run, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "resolve", lambda path: tmp_path / path)
    whole = Mixture.batch
    n_batches = []

    def batch(self, *args):
        n_batches.append(1)
        if len(n_batches) > stop_at:
            raise KeyboardInterrupt
        return whole(self, *args)

    with monkeypatch.context() as killed:
        killed.setattr(Mixture, "batch", batch)
        with pytest.raises(KeyboardInterrupt):
            train(tasks, resume_key="key")
    model, history = train(tasks, resume_key="key")
    assert history == run[1]
    assert all(torch.equal(x, run[0].state_dict()[name]) for name, x in model.state_dict().items())
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_fixed_architecture_trains_its_own_paths_only(tasks):
    kinds = placement_kinds(8, (2, 5), "gated_deltanet")
    before, _ = build()
    model, _ = train(tasks, n_local=0, n_steps=2, law=fixed_law(kinds))
    before = before.state_dict()
    moved = {int(name.split(".")[2]) for name, x in model.state_dict().items() if not torch.equal(x, before[name])}
    assert moved == {0, 1, 3, 4, 6, 7}


def full_layers(name, n_steps=600):
    law = path_law(name, 8, "jetblock", 2, seed=0)
    drawn = [law(step) for step in range(n_steps)]
    assert drawn == [path_law(name, 8, "jetblock", 2, seed=0)(step) for step in range(n_steps)]
    assert {kind for kinds in drawn for kind in kinds} == {"attention", "jetblock"}
    return [tuple(i for i, kind in enumerate(kinds) if kind == "attention") for kinds in drawn]


@pytest.mark.parametrize("name", LAWS)
def test_every_law_keeps_every_layer_equally_often(name):
    full = full_layers(name)
    counts = [sum(layer in f for f in full) for layer in range(8)]
    expected = sum(map(len, full)) / 8
    assert all(abs(n - expected) < 5 * expected**0.5 for n in counts)


@pytest.mark.parametrize(
    ("name", "shares"),
    [
        pytest.param("fixed_k", {2: 1.0}, id="always-k"),
        pytest.param("up_to_k", {0: 1 / 3, 1: 1 / 3, 2: 1 / 3}, id="any-number-equally-often"),
        pytest.param("sandwich", {0: 4 / 9, 1: 1 / 9, 2: 4 / 9}, id="the-ends-by-turns-with-what-lies-between"),
        pytest.param("coin", {0: 0.75**8, 1: 8 * 0.25 * 0.75**7, 2: 28 * 0.25**2 * 0.75**6}, id="binomial"),
    ],
)
def test_a_law_draws_so_many_full_layers(name, shares):
    numbers = [len(f) for f in full_layers(name)]
    for n, share in shares.items():
        assert abs(numbers.count(n) / 600 - share) <= 4 * (share * (1 - share) / 600) ** 0.5
    assert max(numbers) == 2 or name == "coin"


def test_an_unknown_law_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="coin, fixed_k, up_to_k, sandwich, got 'dice'"):
        path_law("dice", 8, "jetblock", 2, seed=0)


@pytest.mark.parametrize("k", [8, -1])
def test_a_law_leaves_a_layer_to_train(k):
    with pytest.raises(ValueError, match=rf"max_full must leave a layer linear, 0 … 7 of 8 here, got {k}"):
        path_law("up_to_k", 8, "jetblock", k, seed=0)
    law = path_law("coin", 2, "jetblock", 1, seed=0)
    drawn = [law(step).count("attention") for step in range(600)]
    assert set(drawn) == {0, 1}
    assert abs(drawn.count(1) / 600 - 2 / 3) < 4 * (2 / 9 / 600) ** 0.5  # of four equal outcomes one is tossed again


def test_a_loss_term_of_weight_zero_is_left_out(tasks):
    """And the two terms add up to the loss with both."""
    losses = []
    for weights in ({"feature_weight": 1.0, "logit_weight": 0.0}, {"feature_weight": 0.0, "logit_weight": 1.0}, {}):
        _, history = train(tasks, n_local=0, n_steps=1, **weights)
        losses.append(history[-1]["loss"])
    assert min(losses) > 0 and losses[0] + losses[1] == pytest.approx(losses[2], rel=1e-5)


def test_what_is_measured_on_the_way_stands_in_the_curve_and_moves_no_weight(run, tasks):
    model, history = train(tasks, measure=lambda step: {"seen": step})
    assert history[-1]["seen"] == 6 and "seen" not in history[0]
    assert all(torch.equal(x, run[0].state_dict()[name]) for name, x in model.state_dict().items())


def test_placements_name_layers_from_zero():
    assert placement_kinds(3, (1,), "jetblock") == ("jetblock", "attention", "jetblock")
    with pytest.raises(ValueError, match="0 … 2, got 3"):
        placement_kinds(3, (1, 3), "jetblock")
