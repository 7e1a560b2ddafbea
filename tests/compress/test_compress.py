"""The recipe as a whole, on a random model of a few layers: what is chosen, counted and compared."""

import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from jetlab.compress.budget import Budget, needed
from jetlab.compress.search import BudgetTooSmall, Space, candidates
from jetlab.compress.study import compress, mean_accuracy
from jetlab.config import Common, Tasks
from jetlab.models import nemotron, zoo


@pytest.fixture(scope="module")
def folder(small, tokenizer, tmp_path_factory):
    path = tmp_path_factory.mktemp("original")
    small("M-*M-*-", vocab_size=len(tokenizer)).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def study(sizes):
    def build(**changes):
        section = {
            "n_calibration": 1,
            "aggregate": "l2",
            "depths": [2],
            "n_removed": [1, 2],
            "d_model": [16, 20, 24],
            "d_ff": [8, 12, 16, 20],
            "n_mamba_heads": [4, 6],
            "rows": {"retrieval": 1, "knowledge": 1},
            "weights": {},
            "learning_rate": 1e-3,
            "warmup": 1,
            "rank_steps": 2,
            "final_steps": 3,
            "n_candidates": 2,
            "n_random": 2,
            "n_controls": 2,
            "n_workers": 1,
        }
        tasks = {"seq_len": 48, "sizes": sizes, "n_contexts": {"search": 2, "select": 2, "test": 3}, "n_questions": 2}
        return SimpleNamespace(
            common=Common(seed=0, n_threads=1, path="found", device="cpu"),
            tasks=Tasks.from_params(**tasks),
            compression=SimpleNamespace(**section | changes),
        )

    return build


@pytest.fixture(scope="module")
def budget(folder):
    """Seven tenths of what the whole model takes."""
    whole = needed(nemotron.shape_of(AutoConfig.from_pretrained(folder)), Budget(n_bytes=1, context=64))
    return Budget(n_bytes=int(0.7 * whole.total), context=64)


@pytest.fixture(scope="module")
def run(study, folder, budget):
    return compress(study(), folder, budget)


def test_candidates_are_the_closest_of_those_that_fit(run, budget):
    order = [removal.layer for removal in run.removed]
    fitting = candidates(run.shape, order, Space((1, 2), (16, 20, 24), (8, 12, 16, 20), (4, 6)), budget)
    ranked = [trial.target for trial in run.candidates]
    assert len(ranked) == 2 < len(fitting)
    assert set(ranked) <= {candidate.target for candidate in fitting}
    errors = [trial.logit_error for trial in run.candidates]
    assert errors == sorted(errors)
    best = max(run.candidates, key=lambda trial: mean_accuracy(trial.scores))
    assert run.winner.target == best.target


def test_a_depth_is_tried_at_full_width(run):
    (depth,) = run.depths
    assert depth.name == "depth 5"
    assert (depth.target.d_model, depth.target.d_ff, depth.target.n_mamba_heads) == (24, 20, 6)
    assert {removal.layer for removal in run.removed[:2]}.isdisjoint(depth.target.layers)


def test_the_winner_fits_and_random_pruning_takes_as_many_bytes(run):
    assert run.winner.needed.total <= run.budget.n_bytes
    for rival in [trial for trial in run.others if trial.name.startswith(("random", "attention"))]:
        assert (rival.needed, rival.n_params) == (run.winner.needed, run.winner.n_params)
        assert [r["step"] for r in rival.history] == [r["step"] for r in run.winner.history] == [3]
    assert len({rival.target.layers for rival in run.others} | {run.winner.target.layers}) > 1


def test_controls_change_one_thing_at_a_time(run):
    by_name = {trial.name: trial for trial in run.others}
    attention = {layer for layer, kind in enumerate(run.shape.layer_kinds) if kind == "attention"}
    kept = by_name["attention kept 0"].target.layers
    assert attention & set(kept) == attention & set(run.winner.target.layers)
    narrowed, drawn = by_name["narrowed"], by_name["narrowed random 0"]
    assert narrowed.target == drawn.target
    assert narrowed.target in [trial.target for trial in run.candidates]
    assert drawn.logit_error != narrowed.logit_error  # other neurons, channels or heads


def test_the_winner_is_handed_over_and_saved_as_counted(run, tmp_path):
    run.save(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sum(p.numel() for p in again.parameters()) == run.winner.n_params
    assert needed(nemotron.shape_of(again.config), run.budget) == run.winner.needed
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, run.model(ids).logits)


def test_the_tables_have_a_row_for_each_thing(run):
    assert [row["kind"] for row in run.layer_rows()] == list(zoo.layer_kinds("M-*M-*-"))
    assert sorted(row["removed_as"] for row in run.layer_rows() if row["removed_as"]) == [1, 2]
    names = ["winner", "narrowed", "random", "random", *["attention kept", "narrowed random"] * 2]
    assert [row["step"] for row in run.trial_rows()] == ["depth"] + ["candidate"] * 2 + names
    models = ["original", "pruned", "final", *(trial.name for trial in run.others)]
    assert [(row["model"], row["task"]) for row in run.score_rows()] == [
        (model, task) for model in models for task in ("retrieval", "knowledge")
    ]
    assert {row["model"] for row in run.loss_rows()} == {row["name"] for row in run.trial_rows()}


def test_differences_are_averaged_over_draws(run):
    rows = {(row["rival"], row["task"]): row for row in run.difference_rows()}
    assert set(rows) == {
        (rival, task)
        for rival in ("random", "attention kept", "narrowed random")
        for task in ("knowledge", "retrieval", "mean")
    }
    trials = {trial.name: trial for trial in run.others} | {"winner": run.winner}

    def accuracy(name, task):
        return trials[name].scores[task].value

    for rival, ours in (("random", "winner"), ("attention kept", "winner"), ("narrowed random", "narrowed")):
        leads = [accuracy(ours, "knowledge") - accuracy(f"{rival} {i}", "knowledge") for i in range(2)]
        row = rows[rival, "knowledge"]
        assert row["value"] == pytest.approx(sum(leads) / 2)
        assert row["se"] == pytest.approx(abs(leads[0] - leads[1]) / 2)  # of two
        assert row["n"] == 2
        both = (row["value"] + rows[rival, "retrieval"]["value"]) / 2
        assert rows[rival, "mean"]["value"] == pytest.approx(both)


def test_each_model_draws_its_own_rivals(study, folder, budget, run, tmp_path):
    copied = tmp_path / "another"
    shutil.copytree(folder, copied)
    other = compress(study(n_controls=0), copied, budget)
    layers = [[t.target.layers for t in found.others if t.name.startswith("random")] for found in (run, other)]
    assert layers[0] != layers[1]


@pytest.mark.slow  # two processes to start
def test_processes_change_nothing(study, folder, budget, run):
    other = compress(study(n_workers=2), folder, budget)
    assert other.trial_rows() == run.trial_rows() and other.loss_rows() == run.loss_rows()
    assert other.score_rows() == run.score_rows()


def test_that_nothing_fits_is_found_before_training(study, folder, budget, monkeypatch):
    monkeypatch.setattr("jetlab.compress.study.distill", None)
    with pytest.raises(BudgetTooSmall, match="6 layers, d_model 24, d_ff 20, 6 Mamba heads"):
        compress(study(n_removed=[1], depths=[], d_model=[24], d_ff=[20], n_mamba_heads=[6]), folder, budget)


def test_that_no_layers_could_fit_is_found_before_measuring(study, folder, budget, monkeypatch):
    monkeypatch.setattr("jetlab.compress.study.single_removals", None)
    with pytest.raises(BudgetTooSmall, match=r"whichever 1 layers go, at least .* are needed: 6 layers"):
        compress(study(n_removed=[1]), folder, replace(budget, n_bytes=10_000))


def test_some_task_must_be_scored(study, folder, budget):
    with pytest.raises(ValueError, match="chosen by knowledge, math, retrieval, code, got rows of facts"):
        compress(study(rows={"facts": 1}), folder, budget)
