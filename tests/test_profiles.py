"""The profiles that nobody can run here: what they cost and need, and their notebooks on a tiny model and local text."""

import copy
import json
import subprocess
import sys

import pytest
from ruamel.yaml import YAML

from jetlab import preflight, run
from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims
from jetlab.paths import ROOT
from train.text_jobs import write_texts

TEXT_PROFILES = ("node8", "paper", "paper_4b")
each_profile = pytest.mark.parametrize("name", TEXT_PROFILES)


def read(name):
    return run.read_params(ROOT / "profiles" / f"{name}.yaml")


def tiny(name, folder, **text):
    """The profile with the bundled teacher, files of this machine and few steps in place of its own."""
    params, laptop = read(name), run.read_params(ROOT / "params.yaml")
    sources = [{"name": "lines", "weight": 1.0, "column": "text", "files": write_texts(folder)}]
    params["common"] |= {"device": "cpu", "n_threads": 1}
    params["tasks"] = laptop["tasks"] | {"n_contexts": {"search": 2, "select": 2, "test": 2}, "n_questions": 2}
    params["teacher"] |= {"source": "bundled", "hub_id": None}
    params["text"] |= {"n_processes": 2, "seq_len": 48, "rows_per_step": 4, "rows_at_once": 2, "n_streams": 2}
    params["text"] |= {"sources": sources, "stage2_sources": sources, "checkpoint_steps": 10} | text
    for section in ("supernet", "blocks", "jetblock"):
        params[section]["dims"] = {"n_heads": 2, "head_dim": 8, "head_dim_v": 16}
    for training in (params["supernet"]["training"], params["distill"]["stage1"]):
        training |= {"n_local": 2, "n_steps": 3, "warmup": 1}
    params["distill"]["stage2_steps"] = 2
    params["variants"]["sizes"] = ["h2_k8_v16"]
    params["hardware"]["state_size"] = 256
    params["evaluate"]["benchmarks"] = []
    return params


def write(params, path):
    with path.open("w") as file:
        YAML(typ="safe", pure=True).dump(params, file)
    return path


# ---- costs ----------------------------------------------------------------------------------------------------------


def test_the_operations_of_a_run_are_those_of_its_matrices():
    params = read("node8")
    model = preflight.decoder("Qwen/Qwen2.5-1.5B")
    assert (
        model.n_params == model.n_matmul == 1_543_714_304
    )  # tied: the embedding is the head, looked up and multiplied
    supernet = preflight.runs(params)[0]
    path = MIXERS["gla"].n_params(BlockDims(1536, 12, 96, 256))
    text, training = params["text"], params["supernet"]["training"]
    tokens = text["rows_per_step"] * text["seq_len"]
    student = model.n_matmul + 28 * (path - model.n_attention)
    a_token = 2 * model.n_matmul + 4 * student + 2 * 28 * path
    local = 2 * model.n_matmul + 6 * 28 * path
    assert supernet.flops == pytest.approx(tokens * (training["n_steps"] * a_token + training["n_local"] * local))
    assert supernet.n_tokens == tokens * (training["n_steps"] + training["n_local"])


def test_computing_activations_again_costs_a_forward_pass():
    params = read("node8")
    again = copy.deepcopy(params)
    again["text"]["recompute"] = True
    plain, more = (preflight.runs(p)[-1] for p in (params, again))
    assert (more.flops - plain.flops) / plain.n_tokens == pytest.approx(2.0 * plain.n_trained)
    assert preflight.gpu_bytes(again) < 0.4 * preflight.gpu_bytes(params)


def test_memory_is_near_what_was_measured_on_one_gpu():
    params = read("node8")
    params["text"]["n_processes"] = 1
    rows = {row["work"]: float(row["peak_gb"]) for row in record() if row["processes"] == "1"}
    assert preflight.gpu_bytes(params) / 1e9 == pytest.approx(rows["weights"], rel=0.1)


def record():
    import csv

    with (ROOT / preflight.RECORD).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_node8_is_about_twenty_billion_tokens_and_fits_eight_h100s():
    params = read("node8")
    total = preflight.costs(params)[-1]
    assert total["runs"] == 19 and 19 < total["tokens_b"] < 21
    assert 250 < total["gpu_hours"] < 350
    assert preflight.gpu_bytes(params) < 0.95 * 85.5e9  # of 81,559 MiB


@each_profile
def test_the_blocks_of_a_profile_can_be_built(name):
    import torch

    params = read(name)
    d_model = preflight.decoder(params["teacher"]["hub_id"]).d_model
    for kind in {*params["variants"]["blocks"], params["supernet"]["block"]}:
        depth = {"layer_idx": 0, "n_layers": 28} if kind == "rwkv7" else {}
        with torch.device("meta"):
            block = MIXERS[kind](BlockDims(d_model, **params["blocks"]["dims"]), **depth)
        assert sum(p.numel() for p in block.parameters()) > 0


@each_profile
def test_the_paper_spends_what_its_profile_says(name):
    params, rows = read(name), {row["stage"]: row for row in preflight.costs(read(name))}
    if name == "node8":
        return
    assert rows["supernet"]["tokens_b"] == pytest.approx(50, rel=1e-3)
    assert rows["distill, stage 1"]["tokens_b"] == pytest.approx(50, rel=1e-3)
    assert rows["distill, stage 2"]["tokens_b"] == pytest.approx(350, rel=1e-3)
    assert rows["distill, stage 2"]["paper_gpu_hours"] == 7536
    assert params["placement"]["budget"] == 2


# ---- preflight ------------------------------------------------------------------------------------------------------


def test_what_does_not_hold_stops_the_run_before_it_starts(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("socket.socket", blocked)
    params = tiny("node8", tmp_path)
    monkeypatch.setattr(preflight, "disk_bytes", lambda _: 10**18)
    params["text"]["sources"][0]["files"] = ["nowhere/*.parquet"]
    with pytest.raises(ValueError, match=r"profile 'node8' cannot start: files of lines: no file matches .*; disk: "):
        preflight.once(params)
    printed = capsys.readouterr().err
    assert "NO  disk: 1000000000 GB needed at most" in printed and "GPU hours" in printed


def blocked(*_args, **_kwargs):
    raise OSError("no network in this test")


def test_a_hub_that_cannot_be_reached_is_said_once(monkeypatch):
    monkeypatch.setattr("socket.socket", blocked)
    params = read("node8")
    params["evaluate"]["benchmarks"] = []
    found = [str(finding) for finding in preflight.check(params) if finding.what == "hub"]
    assert len(found) == 1 and "so 5 ids were not looked at; check the network" in found[0]


@pytest.mark.parametrize(
    ("error", "said"),
    [("GatedRepoError", "its terms are not agreed to"), ("RepositoryNotFoundError", "no such id, or it is private")],
)
def test_gates_and_wrong_ids_are_told_apart(error, said, monkeypatch):
    import httpx
    from huggingface_hub import HfApi, errors

    def auth_check(_self, name, **_options):
        if name == "LLM360/MegaMath":
            raise getattr(errors, error)("no", response=httpx.Response(403, request=httpx.Request("GET", "https://x")))

    monkeypatch.setattr(HfApi, "auth_check", auth_check)
    params = read("node8")
    params["evaluate"]["benchmarks"] = []
    found = {finding.what: finding for finding in preflight.check(params)}
    assert found["dataset LLM360/MegaMath"].ok is False and said in found["dataset LLM360/MegaMath"].said
    assert found["model Qwen/Qwen2.5-1.5B"].ok is True


def test_a_folder_does_for_a_hub_id(tmp_path):
    params = tiny("node8", tmp_path)
    params["teacher"] |= {"source": "hub", "hub_id": "assets/teacher/0"}
    assert preflight.hub_ids(params) == []
    assert preflight.runs(params)[0].n_trained == 8 * MIXERS["gla"].n_params(BlockDims(64, 2, 8, 16))


def test_a_profile_that_passed_is_not_checked_again(tmp_path, monkeypatch, capsys):
    params = tiny("node8", tmp_path)
    preflight.once(params)
    assert "ok  files of lines: 3 found" in capsys.readouterr().err
    monkeypatch.setattr(preflight, "check", lambda _: pytest.fail("it was checked before"))
    preflight.once(params)


# ---- the notebooks --------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("notebook", "section"), [("02_supernet", "supernet"), ("07_distill", "distill")], ids=["supernet", "distill"]
)
def test_the_paper_profile_s_notebook_trains_on_two_processes(notebook, section, tmp_path):
    params = write(tiny("paper", tmp_path), tmp_path / "params.yaml")
    out = tmp_path / "out"
    command = [sys.executable, "-m", "jetlab.run", f"notebooks/{notebook}.ipynb", "--out", str(out)]
    sections = ["--params", "common", "tasks", "text", section, "--params-file", str(params)]
    done = subprocess.run([*command, *sections], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "GPU hours" in done.stderr  # preflight came first
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["profile"] == "paper"
    if section == "supernet":
        assert metrics["n_moved_tensors"] == 0 and metrics["n_tokens"] == 5 * 4 * 48
        assert (out / "paths" / "t0.safetensors").stat().st_size > 0
    else:
        assert (out / "model" / "model.safetensors").exists()
