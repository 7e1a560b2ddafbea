"""Specification of training supernets: who they are, what is written and read again, what is measured on the way."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from jetlab.config import PlacementStudy
from jetlab.models import surgery
from jetlab.paths import ROOT, MissingInput
from jetlab.search import placement
from jetlab.search import supernet as supernets
from jetlab.tasks import SCORED, SUB_AXES

TEACHER = str(ROOT / "assets/teacher/0")


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    file = tmp_path_factory.mktemp("supernet") / "paths_t0.safetensors"
    study = base.model_copy(update={"check_budget": 1})
    return supernets.train(study, "t0", TEACHER, str(file), 0)


def test_each_supernet_has_a_name_and_a_seed_of_its_own(base, tmp_path):
    found = supernets.members(base.model_copy(update={"n_seeds": 2}), ["a", "b"], tmp_path)
    assert [(name, teacher, seed) for name, teacher, _, seed in found] == [
        ("t0", "a", 0), ("t1", "b", 1), ("t0_s1", "a", 100), ("t1_s1", "b", 101),
    ]  # fmt: skip
    assert len({weights for _, _, weights, _ in found}) == 4


def test_what_is_read_again_is_the_teacher_and_the_trained_paths(base, trained):
    model, _ = supernets.load(base, TEACHER, trained.weights)
    saved = load_file(trained.weights)
    untrained = supernets.build(base, TEACHER, 0)[0].state_dict()
    paths = {name for name in model.state_dict() if ".paths.gated_deltanet." in name}
    assert set(saved) == paths
    assert all(torch.equal(x, saved[name]) for name, x in model.state_dict().items() if name in paths)
    assert any(not torch.equal(x, untrained[name]) for name, x in saved.items())
    surgery.activate(model, ("attention",) * 8)
    ids = torch.arange(12)[None]
    assert torch.equal(model(ids).logits, surgery.load(TEACHER)[0].eval()(ids).logits)


def cut(saved):
    del saved[next(name for name in saved if ".layers.7." in name)]


def add(saved):
    saved["model.layers.0.mlp.up_proj.weight"] = torch.zeros(2, 2)


def widen(saved):
    name = next(iter(saved))
    saved[name] = torch.zeros(*saved[name].shape, 2)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [(cut, "is missing instead of"), (add, "instead of nothing"), (widen, "2]")],
    ids=["cut", "add", "widen"],
)
def test_weights_that_are_not_those_of_exactly_these_paths_are_refused(base, trained, tmp_path, spoil, said):
    saved = load_file(trained.weights)
    spoil(saved)
    save_file(saved, tmp_path / "paths.safetensors")
    with pytest.raises(ValueError) as error:
        supernets.load(base, TEACHER, tmp_path / "paths.safetensors")
    assert said in str(error.value) and "run `dvc repro supernet`" in str(error.value)


def test_without_weights_the_stage_to_run_is_named(base, tmp_path):
    with pytest.raises(MissingInput, match="supernet"):
        supernets.load(base, TEACHER, tmp_path / "paths.safetensors")


def test_accuracy_and_the_map_are_measured_so_often_on_the_way(trained):
    measured = [row for row in trained.history if f"{SCORED[0]}_all_linear" in row]
    assert len(measured) == 1 and measured[0]["step"] == 8  # 5 steps: no tenth step before the last
    layers = {key for key in measured[0] if "_layer" in key}
    assert layers == {f"{task}_layer{layer}" for task in SCORED for layer in range(8)}
    assert all(measured[0][f"knowledge_layer{layer}"] < 0 for layer in range(8))  # minus a loss
    assert 0 <= measured[0]["math_all_linear"] <= 1


def test_the_calibration_covers_four_sizes_of_every_task(base, trained, sizes):
    model, tokenizer = supernets.load(base, TEACHER, trained.weights)
    reordered = {task: dict(reversed(given.items())) for task, given in sizes.items()}
    study = base.model_copy(update={"tasks": base.tasks.model_copy(update={"sizes": reordered})})
    rows = supernets.difficulty_curve(study, model, tokenizer)
    by_task = {task: [row["size"] for row in rows if row["task"] == task] for task in (*SCORED, *SUB_AXES)}
    assert by_task["retrieval"] == [2, 4, 5, 7] and by_task["code"] == [2, 2, 4, 5]
    assert all(len(found) == 4 for found in by_task.values())
    assert all(0 <= row["all_linear"] <= 1 and 0 <= row["all_full"] <= 1 for row in rows)
    assert any(row["all_full"] > row["all_linear"] for row in rows)


@pytest.mark.slow
def test_placements_split_over_devices_score_as_on_one(base, trained):
    study = PlacementStudy.from_params(
        common=base.common, tasks=base.tasks, supernet=base, budget=1, max_budget=1, select_budget=1,
        selectors=["beam", "uniform"], beam_width=2, gate_steps=1, gate_learning_rate=0.1,
    )  # fmt: skip
    member = ("t0", TEACHER, trained.weights, 0)
    one, two = (placement._search(member, study, on) for on in (["cpu"], ["cpu", "cpu"]))
    assert one.choices == two.choices
    for split, table in one.tables.items():
        assert table.keys() == two.tables[split].keys()
        for full, scores in table.items():
            for task, score in scores.items():
                assert np.array_equal(score.correct, two.tables[split][full][task].correct)
                np.testing.assert_allclose(score.loss, two.tables[split][full][task].loss, atol=2e-5)
