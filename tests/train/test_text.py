"""Specification of training on text: one step whatever the number of processes, and a kill that changes nothing."""

import json
import subprocess
import sys
import threading
import time
from itertools import pairwise
from pathlib import Path

import psutil
import pytest
import torch
import torch.nn.functional as F
from text_jobs import DIMS, paths_job, text, training, weights_job

from jetlab.config import ConfigError, SupernetStudy, check_params
from jetlab.data.corpus import PackedCorpus
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT
from jetlab.train import launch
from jetlab.train.text import Ahead, answer_losses

ROUNDING = {"rtol": 0, "atol": 2e-4}  # fp32, 30 steps of AdamW: sums in another order


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return tmp_path_factory.mktemp("texts")


def weights_of(job) -> tuple[dict, list]:
    return launch.train(job)


# ---- the loss of a row ----------------------------------------------------------------------------------------------


def heads():
    torch.manual_seed(0)
    return torch.nn.Linear(8, 21, bias=False), torch.nn.Linear(8, 21, bias=False)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_the_loss_is_kl_and_cross_entropy_over_all_tokens_but_the_last_of_each_document(weight, monkeypatch):
    monkeypatch.setattr("jetlab.train.text.HEAD_TOKENS", 4)  # in three parts, the last one short
    mine, theirs = heads()
    student, teacher = torch.randn(2, 11, 8), torch.randn(2, 11, 8)
    ids, ends = torch.arange(22).view(2, 11) % 21, torch.tensor([0, 3, 4, 11, 20, 22])
    found = answer_losses(student, teacher, mine, theirs, ids, ends, weight)
    expected = []
    for row, asked in enumerate(([0, 1, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 4, 5, 6, 7, 9])):
        p, q = (head(h[row]).log_softmax(-1)[asked] for head, h in ((theirs, teacher), (mine, student)))
        kl = (p.exp() * (p - q)).sum(-1).mean()
        entropy = F.cross_entropy(mine(student[row])[asked], ids[row, [i + 1 for i in asked]])
        expected.append((1 - weight) * kl + weight * entropy)
    torch.testing.assert_close(found, sum(expected) / 2, atol=1e-5, rtol=1e-5)  # each row counts alike


def test_a_row_of_single_tokens_asks_nothing_and_has_no_loss():
    head, _ = heads()
    loss = answer_losses(torch.randn(1, 3, 8), torch.randn(1, 3, 8), head, head, torch.arange(3)[None], torch.arange(4))
    assert float(loss.detach()) == 0.0


@pytest.mark.parametrize(
    "kind", ["attention", "gated_deltanet", "jetblock", "rwkv7", "mamba2", "retnet", "gla", "deltanet"]
)
def test_packed_documents_are_read_as_if_each_stood_alone(kind):
    model, _ = surgery.load("assets/teacher/0")
    torch.manual_seed(0)
    surgery.convert(model, [kind] * 7 + ["attention"], BlockDims(**DIMS))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.02 * torch.randn_like(p))
    ids, ends = torch.randint(2, 250, (2, 20)), [0, 9, 10, 20, 33, 40]  # of both rows laid end to end
    with torch.no_grad():
        with surgery.packed(model, torch.tensor(ends)):
            together = model(ids, use_cache=False).logits
        line = ids.view(1, 40)
        alone = torch.cat([model(line[:, a:b], use_cache=False).logits for a, b in pairwise(ends)], dim=1).view_as(
            together
        )
        assert not torch.allclose(model(ids, use_cache=False).logits, alone, atol=1e-2)  # without: they see one another
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)


def test_a_document_may_not_reach_over_the_end_of_a_row():
    model, _ = surgery.load("assets/teacher/0")
    surgery.attach(model)
    with (
        surgery.packed(model, torch.tensor([0, 9, 40])),
        pytest.raises(ValueError, match=r"a document must end where its row does, every 20 tokens, got .*cut it there"),
    ):
        model(torch.randint(2, 250, (2, 20)), use_cache=False)


def test_rows_read_ahead_are_those_of_the_corpus_and_resume_behind_the_last_one_used(data):
    tokenizer = surgery.load("assets/teacher/0")[1]
    plain = PackedCorpus(text(data).corpus(1), tokenizer, seed=3)
    expected = [[row.ids.tolist() for row in plain.rows(step)] for step in range(6)]
    ahead = Ahead(PackedCorpus(text(data).corpus(1), tokenizer, seed=3))
    assert [[row.ids.tolist() for row in ahead.rows(step)] for step in range(3)] == expected[:3]
    state = json.loads(json.dumps(ahead.state_dict()))
    ahead.rows(3)
    ahead.load_state_dict(state)
    assert [[row.ids.tolist() for row in ahead.rows(step)] for step in (3, 4, 5)] == expected[3:]
    with pytest.raises(ValueError, match="expected 6, got 9"):
        ahead.rows(9)
    ahead.close()


# ---- settings -------------------------------------------------------------------------------------------------------


def test_what_does_not_divide_is_refused_with_the_way_out(data):
    with pytest.raises(ConfigError, match=r"rows_per_step must be a multiple of n_streams, got 6 and 4.*n_streams: 2"):
        text(data, rows_per_step=6)
    with pytest.raises(ConfigError, match=r"n_streams must be a multiple of n_processes, got 4 and 3.*n_streams: 3"):
        text(data, n_processes=3)
    with pytest.raises(
        ConfigError, match=r"multiple of n_processes · rows_at_once, got 4, 2 and 4; try rows_at_once: 2"
    ):
        text(data, n_processes=2, rows_at_once=4)
    with pytest.raises(ConfigError, match=r"checkpoint_steps.*multiple of 10"):
        text(data, checkpoint_steps=15)


def profile(**changed):
    from jetlab import run

    return run.read_params(ROOT / "params.yaml") | changed


def study(**changed):
    params = profile()
    supernet = params["supernet"] | {"n_checks": 0, "training": training().model_dump()}
    values = {"common": params["common"], "tasks": params["tasks"], **supernet}
    return SupernetStudy.from_params(**values | changed)


def test_a_study_trains_either_on_tasks_or_on_text(data):
    nothing = profile()["supernet"] | {"training": training().model_dump()}
    with pytest.raises(ConfigError, match="supernet: rows must name a task to train on, got none; give rows, or text"):
        check_params(profile(supernet=nothing))
    with pytest.raises(ConfigError, match="takes no rows, weights or growth of tasks"):
        study(text=text(data).model_dump(), training=training().model_dump() | {"rows": {"math": 1}})
    with pytest.raises(ConfigError, match="text needs n_checks: 0, got 1"):
        study(text=text(data).model_dump(), n_checks=1)


# ---- processes ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    """Weights and curve of two processes that nobody disturbs."""
    return weights_of(paths_job(tmp_path_factory.mktemp("two"), text(data, n_processes=2), training()))


def start(job) -> tuple[threading.Thread, list]:
    """`launch.train` in a thread -> it, and where its result or error will be."""
    found: list = []

    def work():
        try:
            found.append(launch.train(job))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread, found


def workers(job) -> list[psutil.Process]:
    """The processes that train a job, by rank."""
    found = [p for p in psutil.process_iter(["cmdline"]) if f"{job.folder}/job.json" in (p.info["cmdline"] or [])]
    ranks = [p for p in found if "torch.distributed.run" not in p.info["cmdline"]]
    return sorted(ranks, key=lambda p: p.environ()["RANK"])


def wait_for(path: Path, thread: threading.Thread) -> None:
    while not path.exists():
        assert thread.is_alive(), "the run ended before this could happen"
        time.sleep(0.02)


@pytest.mark.slow
def test_one_process_and_two_take_the_same_steps(data, undisturbed, tmp_path):
    weights, history = weights_of(paths_job(tmp_path, text(data, n_processes=1, rows_at_once=4), training()))
    assert [row["tokens"] for row in history] == [row["tokens"] for row in undisturbed[1]] == [1920, 3840, 5760]
    for one, two in zip(history, undisturbed[1], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert history[0]["phase"] == "local" and history[-1]["phase"] == "end to end"
    assert weights.keys() == undisturbed[0].keys()
    for name, x in weights.items():
        torch.testing.assert_close(x, undisturbed[0][name], **ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_changes_nothing(rank, data, undisturbed, tmp_path, capfd):
    job = paths_job(tmp_path, text(data, n_processes=2), training())
    thread, found = start(job)
    wait_for(tmp_path / "end-to-end" / "step-00000010" / "run.json", thread)
    workers(job)[rank].kill()
    thread.join()
    weights, history = found[0]
    assert "a process died (attempt 1)" in capfd.readouterr().err
    assert history == undisturbed[1]
    assert all(torch.equal(weights[name], x) for name, x in undisturbed[0].items())


@pytest.mark.slow
def test_a_run_goes_on_with_another_number_of_processes(data, undisturbed, tmp_path):
    job = paths_job(tmp_path, text(data, n_processes=2), training())
    thread, _ = start(job)
    wait_for(tmp_path / "end-to-end" / "step-00000010" / "run.json", thread)
    agent = psutil.Process(workers(job)[0].ppid())
    for process in (agent, *workers(job)):
        process.kill()
    other = job.model_copy(update={"text": text(data, n_processes=1)})
    (tmp_path / "job.json").write_text(other.model_dump_json())
    torchrun(1, "-m", "jetlab.train.main", str(tmp_path / "job.json"))
    thread.join()  # its own second attempt found the result, or wrote it again
    history = json.loads((tmp_path / "history.json").read_text())
    for one, two in zip(history, undisturbed[1], strict=True):
        assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_take_the_steps_of_one_and_a_kill_changes_nothing(data, tmp_path):
    for name in ("one", "two", "killed"):
        (tmp_path / name).mkdir()
    study = {n: text(data, n_processes=n, precision="bfloat16", recompute=True) for n in (1, 2)}
    _, one = weights_of(paths_job(tmp_path / "one", study[1], training(), device="cuda"))
    _, two = weights_of(paths_job(tmp_path / "two", study[2], training(), device="cuda"))
    job = paths_job(tmp_path / "killed", study[2], training(), device="cuda")
    thread, found = start(job)
    wait_for(tmp_path / "killed" / "end-to-end" / "step-00000010" / "run.json", thread)
    workers(job)[1].kill()
    thread.join()
    losses = [[row["loss"] for row in history] for history in (one, two, found[0][1])]
    print(losses)
    assert losses[1] == pytest.approx(losses[0], rel=2e-2)  # bfloat16, sums in another order, 30 steps
    assert losses[2] == pytest.approx(losses[1], rel=1e-3)


def torchrun(n_processes: int, *arguments: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={n_processes}"]
    done = subprocess.run([*command, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_each_process_holds_its_share_and_gradients_are_those_of_one(data, tmp_path):
    (tmp_path / "data").mkdir()
    check = str(Path(__file__).with_name("sharded_check.py"))
    for n, way in ((1, "keep"), (2, "keep"), (2, "recompute")):
        torchrun(n, check, str(tmp_path), way)
    reports = {
        key: json.loads((tmp_path / f"report-{key}.json").read_text()) for key in ("1-keep", "2-keep", "2-recompute")
    }
    one, two = reports["1-keep"], reports["2-keep"]
    assert (one["world_size"], two["world_size"]) == (1, 2)
    assert two["types"] == ["DTensor"] and two["shards"] == ["True"]
    assert one["held"] == one["whole"] and two["held"] < 0.51 * two["whole"]
    gradients = {key: torch.load(tmp_path / f"gradients-{key}.pt") for key in reports}
    assert len(gradients["1-keep"]) > 50
    for key in ("2-keep", "2-recompute"):
        assert reports[key]["loss"] == pytest.approx(one["loss"], rel=1e-5)
        for name, expected in gradients["1-keep"].items():
            torch.testing.assert_close(gradients[key][name], expected, atol=2e-5, rtol=1e-3)


@pytest.mark.slow
def test_all_weights_train_on_labels_and_teacher_and_the_teacher_stays(data, tmp_path):
    model, tokenizer = surgery.load("assets/teacher/0")
    torch.manual_seed(0)
    dims = BlockDims(**DIMS)
    surgery.convert(model, ["attention", *["jetblock"] * 7], dims)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    surgery.save(model, tmp_path / "model", tokenizer, dims=dims)
    teacher = (ROOT / "assets/teacher/0/model.safetensors").read_bytes()
    weights, history = weights_of(weights_job(tmp_path / "job", text(data, n_processes=2), tmp_path / "model"))
    assert weights.keys() == before.keys()
    assert all(not torch.equal(weights[name], x) for name, x in before.items())
    assert history[-1]["loss"] < 0.8 * history[0]["loss"]
    assert (ROOT / "assets/teacher/0/model.safetensors").read_bytes() == teacher


@pytest.mark.slow
def test_an_error_in_a_process_is_told_and_not_tried_again(data, tmp_path):
    job = paths_job(tmp_path, text(data, n_processes=2), training(learning_rate=1.0, n_local=0, logit_weight=1.0e38))
    with pytest.raises(
        launch.TrainingFailed, match="TrainingDiverged: supernet t0, end to end: the loss must be a finite"
    ):
        launch.train(job)
    assert (tmp_path / "output.txt").read_text().count("TrainingDiverged: supernet") <= 2  # once a process, no restart


@pytest.mark.slow
def test_the_processes_end_with_the_one_that_started_them(data, tmp_path):
    job = paths_job(tmp_path, text(data, n_processes=2), training(n_steps=5000))
    (tmp_path / "given.json").write_text(job.model_dump_json())
    read = f"read_job({str(tmp_path / 'given.json')!r})"
    code = f"from jetlab.train import launch; from jetlab.train.main import read_job; launch.train({read})"
    starter = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    while len(workers(job)) < 2 or not (tmp_path / "local" / "step-00000010").exists():
        assert starter.poll() is None
        time.sleep(0.1)
    starter.kill()
    starter.wait()
    deadline = time.monotonic() + 20
    while workers(job) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not workers(job)
