"""Specification of starting a training on text: what makes two jobs the same, what a restart can mend, what is cleared."""

import pytest
import torch
from text_jobs import text

from jetlab import run
from jetlab.models import surgery
from jetlab.train import launch
from jetlab.train.loop import TrainingDiverged
from jetlab.train.main import _may_pass


def key(folder, stage=1, **changed):
    return launch.job_folder("supernet t0", launch.what_is_read(text(folder, **changed), stage))


def test_how_a_job_is_run_does_not_make_it_another_job(tmp_path):
    same = {"n_processes": 2, "rows_at_once": 2, "recompute": True, "checkpoint_steps": 20, "on_damage": "skip"}
    assert all(key(tmp_path, **{name: value}) == key(tmp_path) for name, value in same.items())
    assert key(tmp_path, stage2_label_weight=0.25) == key(tmp_path)  # which stage 1 does not read
    assert key(tmp_path, 2, stage2_label_weight=0.25) != key(tmp_path, 2)
    other = {"seq_len": 64, "rows_per_step": 8, "n_streams": 2, "precision": "bfloat16"}
    assert all(key(tmp_path, **{name: value}) != key(tmp_path) for name, value in other.items())


@pytest.mark.parametrize(
    ("error", "again"),
    [
        (RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer"), True),
        (torch.distributed.DistBackendError("NCCL error"), True),
        (ConnectionError("the hub did not answer"), True),
        (RuntimeError("shapes cannot be multiplied"), False),
        (TrainingDiverged("the loss"), False),
        (torch.OutOfMemoryError("out of memory"), False),
        (ValueError("no file matches"), False),
    ],
    ids=lambda x: f"{type(x).__name__}" if isinstance(x, Exception) else str(x),
)
def test_only_what_may_pass_is_tried_again(error, again):
    assert _may_pass(error) is again


def test_tensors_that_do_not_fit_are_refused():
    model, _ = surgery.load("assets/teacher/0")
    norm = model.model.norm.weight.detach() + 1
    launch.put(model, {"model.norm.weight": norm})
    assert torch.equal(model.model.norm.weight, norm)
    with pytest.raises(ValueError, match=r"2 tensors that do not fit the model, the first is model\.layers\.9\.x"):
        launch.put(model, {"model.layers.9.x": norm, "model.norm.weight": norm[:3]})


def test_jobs_go_when_the_stage_has_written_its_results(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "local").mkdir(parents=True)
    (tmp_path / "jobs").write_text(f"{tmp_path / 'a'}\n")
    run._clear_jobs(tmp_path / "jobs")
    assert not (tmp_path / "a").exists() and (tmp_path / "b").exists()
    run._clear_jobs(tmp_path / "nothing")
