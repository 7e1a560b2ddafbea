import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from jetlab import paths
from jetlab.seeding import derive, generator, rng, seed_everything
from jetlab.track import MAX_METRICS, Results, machine_records, recorded


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines()


def test_metrics_are_sorted_one_a_line_with_four_significant_digits(tmp_path):
    results = Results(tmp_path / "made" / "on" / "use")
    results.metrics(recall=0.123456, n_params=451584)
    results.metrics(loss=torch.tensor(2.0), chance=np.float32(0.25), tiny=1.23456e-7)
    assert lines(results.dir / "metrics.json") == [
        "{",
        '  "chance": 0.25,',
        '  "loss": 2.0,',
        '  "n_params": 451584,',
        '  "recall": 0.1235,',
        '  "tiny": 1.235e-07',
        "}",
    ]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), torch.tensor(float("nan"))])
def test_a_metric_that_is_not_finite_is_refused_by_name(tmp_path, value):
    results = Results(tmp_path)
    with pytest.raises(ValueError, match=r"valid_loss must be finite, got -?(nan|inf)"):
        results.metrics(recall=0.5, valid_loss=value)
    assert not list(tmp_path.iterdir())


def test_text_and_a_sixteenth_metric_are_refused_with_a_way_out(tmp_path):
    results = Results(tmp_path)
    with pytest.raises(ValueError, match=r"block must be a number, got 'jetblock'.*choice"):
        results.metrics(block="jetblock")
    results.metrics(**{f"m{i}": i for i in range(MAX_METRICS)})
    with pytest.raises(ValueError, match=r"at most 15 headline numbers, got 16; .*estimate"):
        results.metrics(one_more=1)
    assert len(json.loads((tmp_path / "metrics.json").read_text())) == MAX_METRICS


def test_estimates_keep_errors_and_counts_and_refuse_a_second_value(tmp_path):
    results = Results(tmp_path)
    results.estimate("retrieval.found", 0.9234567, se=0.0123456, n=512)
    results.estimate("state_bytes", 4096)
    assert lines(tmp_path / "estimates.csv") == [
        "key,value,se,n",
        "retrieval.found,0.92346,0.01235,512",
        "state_bytes,4096,,",
    ]
    with pytest.raises(ValueError, match=r"'state_bytes' again"):
        results.estimate("state_bytes", 1)
    with pytest.raises(ValueError, match="cannot be negative"):
        results.estimate("other", 1, se=-0.1)


def test_curves_have_columns_in_order_of_first_use_and_blanks_for_none(tmp_path):
    results = Results(tmp_path)
    results.curve("loss", [{"step": 1, "loss": 2.123456}, {"step": 2, "loss": None, "kind": "a,b"}])
    assert lines(tmp_path / "loss.csv") == ["step,loss,kind", "1,2.1235,", '2,,"a,b"']
    with pytest.raises(ValueError, match=r"loss\.loss in row 1 must be finite"):
        results.curve("loss", [{"loss": 1.0}, {"loss": float("nan")}])
    with pytest.raises(ValueError, match="at least one row"):
        results.curve("loss", [])


def test_a_choice_holds_structure_and_is_sorted(tmp_path):
    results = Results(tmp_path)
    results.choice(layers=(4, 6), block="jetblock")
    results.choice(margin={"value": np.float64(0.0123456), "beaten": True})
    expected = {"block": "jetblock", "layers": [4, 6], "margin": {"value": 0.012346, "beaten": True}}
    assert json.loads((tmp_path / "choice.json").read_text()) == expected
    with pytest.raises(ValueError, match=r"margin\.se must be finite"):
        results.choice(margin={"se": float("nan")})


def test_a_full_disk_gives_one_message_and_leaves_the_old_file(tmp_path, monkeypatch):
    results = Results(tmp_path)
    results.metrics(loss=1.0)
    before = (tmp_path / "metrics.json").read_bytes()
    write_bytes = Path.write_bytes

    def full(self, text, **_):
        write_bytes(self, text.encode()[:3])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match=r"metrics\.json could not be written \(No space left on device\); free") as error:
        results.metrics(loss=2.0)
    assert error.value.errno == errno.ENOSPC
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.json"]
    assert (tmp_path / "metrics.json").read_bytes() == before


def test_a_result_cannot_leave_its_folder(tmp_path):
    with pytest.raises(ValueError, match="must lie inside"):
        Results(tmp_path).path("../elsewhere.safetensors")


def test_paths_are_meant_from_the_root_whatever_the_working_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert paths.resolve("notebooks") == paths.ROOT / "notebooks"
    assert (paths.ROOT / "pyproject.toml").is_file()
    assert paths.resolve(tmp_path) == tmp_path


def test_a_missing_input_names_its_stage_and_the_command():
    with pytest.raises(FileNotFoundError) as error:
        paths.require("results/nowhere/metrics.json", "supernet")
    assert str(error.value) == (
        "results/nowhere/metrics.json is missing: it is written by stage supernet; run `dvc repro supernet`"
    )
    assert paths.require("pyproject.toml", "none").is_file()


def test_replacing_keeps_the_old_file_when_the_writer_fails(tmp_path):
    (tmp_path / "weights").write_text("old")
    with pytest.raises(RuntimeError), paths.replacing(tmp_path / "weights") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("weights", "old")]


def test_seeds_are_stable_and_depend_on_each_part():
    assert derive(0, "placement") == derive(np.int64(0), "placement")
    assert len({derive(0), derive(1), derive(0, "a"), derive(0, "a", 1), derive(0, "a1"), derive("0")}) == 6
    assert rng(0, "x").random() == rng(0, "x").random()
    assert torch.equal(torch.rand(3, generator=generator(7, "a")), torch.rand(3, generator=generator(7, "a")))
    assert derive(0, "placement") == 2_332_344_335_812_865_669  # fixed for ever: results hang on it
    with pytest.raises(TypeError, match="parts of a seed"):
        derive(object())
    with pytest.raises(TypeError, match="at least one part"):
        generator()


def test_seed_everything_seeds_all_three_libraries():
    import random

    def draw():
        seed_everything(3)
        return random.random(), np.random.random(), torch.rand(1).item()  # noqa: NPY002

    assert draw() == draw()
    with pytest.raises(ValueError, match=r"got -1; try 4294967295"):
        seed_everything(-1)


def test_a_record_is_shown_where_it_is_complete_and_else_the_own_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jetlab.track.resolve", lambda path: tmp_path / path)
    folder = tmp_path / "records/gpu/03"
    folder.mkdir(parents=True)
    assert recorded("gpu/03", "own").dir == tmp_path / "own"
    assert "short run made here" in capsys.readouterr().out
    (folder / "command.txt").write_text("python -m jetlab.run\n")
    assert recorded("gpu/03", "own").dir == folder
    assert "committed record" in capsys.readouterr().out


def test_machine_records_are_the_finished_runs_of_all_machines(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", tmp_path)
    assert machine_records("kernels") == []
    assert capsys.readouterr().out.count("\n") == 1
    for machine in ("h200", "h100", "unfinished"):
        folder = tmp_path / "records" / machine / "kernels"
        folder.mkdir(parents=True)
        (folder / "kernels.csv").write_text(f"op,ms\n{machine},1\n")
        if machine != "unfinished":
            (folder / "environment.json").write_text(json.dumps({"device": machine.upper()}))
    (tmp_path / "records/h100/tuning").mkdir()
    (tmp_path / "records/h100/tuning/environment.json").write_text("{}")
    found = machine_records("kernels")
    assert [record.environment()["device"] for record in found] == ["H100", "H200"]
    assert [record.table("kernels").op.tolist() for record in found] == [["h100"], ["h200"]]
    assert "h100" in capsys.readouterr().out


def test_a_table_whose_columns_are_given_may_be_empty(tmp_path):
    results = Results(tmp_path)
    results.curve("pairs", [], columns=("a", "b"))
    assert (tmp_path / "pairs.csv").read_text() == "a,b\n"
    results.curve("pairs", [{"b": 1, "c": 2}], columns=("a", "b"))
    assert (tmp_path / "pairs.csv").read_text() == "a,b,c\n,1,2\n"
