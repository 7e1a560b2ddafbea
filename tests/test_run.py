import ast
import json
import os
import pty
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook

from jetlab import paths, run

PARAMETERS = 'common = {"seed": 0}\nvariant = "a"\nout_dir = "scratch/x"'
PARAMS = "common:\n  seed: 1\n  learning_rate: 1e-4\n  mode: on\n  count: 010\nother: {x: 1}\n"
FIGURE = """
import json, os, sys
from jetlab import plots
from jetlab.progress import progress
from jetlab.track import Results
results = Results(out_dir)
for _ in progress(3, "train"):
    pass
print(object(), results.dir, common, variant, sorted({"a", "b", "c"}), {"a", "b", "c"})
sys.stderr.write("noise")
figure = plots.curve([{"x": 0, "y": 1}, {"x": 1, "y": 0}], "x", "y", x_label="step [index]", y_label="loss [nats]")
results.figure("loss", figure)
(results.dir / "sub").mkdir()
(results.dir / "sub" / "weights").write_text("w")
results.choice(executable=sys.executable, cwd=os.getcwd(), common=common, variant=variant)
results.choice(hashseed=os.environ["PYTHONHASHSEED"], threads=os.environ["OMP_NUM_THREADS"])
results.choice(startup=os.environ.get("PYTHONSTARTUP"))
"""


@pytest.fixture
def write(tmp_path):
    """Writes a notebook of a parameters cell and the given cells, as if saved in somebody's own kernel."""

    def write(*cells: str, parameters: str | None = PARAMETERS, name: str = "nb") -> Path:
        nb = new_notebook(metadata={"kernelspec": {"name": "conda-mine", "display_name": "mine", "language": "python"}})
        first = [] if parameters is None else [new_code_cell(parameters, metadata={"tags": ["parameters"]})]
        nb.cells = [*first, *map(new_code_cell, cells)]
        nbformat.write(nb, tmp_path / f"{name}.ipynb")
        (tmp_path / "params.yaml").write_text(PARAMS)
        return tmp_path / f"{name}.ipynb"

    return write


def execute(notebook: Path, out: Path, **options) -> Path:
    return run.run(notebook, out, params_file=notebook.with_name("params.yaml"), **options)


def test_numbers_are_read_by_yaml_1_2_as_dvc_does(write):
    common = run.read_params(write().with_name("params.yaml"))["common"]
    assert common == {"seed": 1, "learning_rate": 1e-4, "mode": "on", "count": 10}
    assert [run.parse_value(text) for text in ("a=1e-4", "a=none", "a=false", "a=jetblock", "a=[1, 2]")] == [
        ("a", 1e-4),
        ("a", "none"),
        ("a", False),
        ("a", "jetblock"),
        ("a", [1, 2]),
    ]


def test_headline_numbers_carry_the_profile_of_their_parameters(write, tmp_path):
    notebook = write("from jetlab.track import Results\nResults(out_dir).metrics(count=common['count'])")
    execute(notebook, tmp_path / "out", sections=["common"], values={"common.mode": "x"})
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"count": 10}  # a section without a name
    file = notebook.with_name("params.yaml")
    file.write_text(PARAMS.replace("common:\n", "common:\n  profile: node8\n"))
    execute(notebook, tmp_path / "out", sections=["common"])
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"count": 10, "profile": "node8"}


def test_a_dotted_name_changes_one_value_of_a_section_and_leaves_the_rest(write, tmp_path):
    notebook = write(
        "from jetlab.track import Results\nResults(out_dir).metrics(seed=common['seed'], count=common['count'])"
    )
    values = dict([run.parse_value("common.seed=7")])
    execute(notebook, tmp_path / "out", sections=["common"], values=values)
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == {"seed": 7, "count": 10}


@pytest.mark.parametrize("key", ["common.sede", "tasks.seed", "common.seed.deeper"])
def test_a_dotted_name_that_names_nothing_is_refused(key, write, tmp_path):
    with pytest.raises(run.RunError, match=rf"--set {key}=… names nothing that --params passes"):
        execute(write(), tmp_path / "out", sections=["common"], values={key: 1})


@pytest.mark.parametrize("text", ["variant", "=3", "a b=3", "a=[1", "a.=3"])
def test_a_malformed_value_is_refused(text):
    with pytest.raises(run.RunError, match="--set"):
        run.parse_value(text)


@pytest.mark.parametrize(
    ("parameters", "options", "message"),
    [
        pytest.param(
            PARAMETERS, {"sections": ["other"]}, "has no 'other' but common, variant, out_dir", id="undeclared"
        ),
        pytest.param(PARAMETERS, {"values": {"x": 1}}, "has no 'x' but", id="undeclared-value"),
        pytest.param(
            PARAMETERS + "\nblocks = {}", {"sections": ["blocks"]}, "has no section 'blocks'", id="not-in-file"
        ),
        pytest.param(None, {}, "exactly one cell tagged `parameters`, got 0", id="no-parameters-cell"),
        pytest.param("common = {}", {}, "has no 'out_dir'", id="no-out-dir"),
        pytest.param(PARAMETERS, {"sections": ["common"], "values": {"common": 1}}, "either a section or", id="both"),
        pytest.param(PARAMETERS, {"values": {"out_dir": "x"}}, "set by --out", id="out-dir-set"),
        pytest.param("common = (", {}, "is not Python", id="not-python"),
    ],
)
def test_parameters_that_do_not_fit_are_refused_before_anything_runs(write, tmp_path, parameters, options, message):
    notebook = write(parameters=parameters)
    with pytest.raises(run.RunError, match=message):
        execute(notebook, tmp_path / "out" / "x", **options)
    assert not (tmp_path / "out").exists()


def test_missing_or_broken_files_are_named(write, tmp_path):
    notebook = write()
    with pytest.raises(run.RunError, match=r"none\.ipynb does not exist"):
        execute(tmp_path / "none.ipynb", tmp_path / "out")
    for content, message in [("a: [1", "not valid YAML"), ("- 1", "must map section names"), (None, "does not exist")]:
        params = notebook.with_name("params.yaml")
        params.unlink(missing_ok=True)
        if content is not None:
            params.write_text(content)
        with pytest.raises(run.RunError, match=message):
            execute(notebook, tmp_path / "out", sections=["common"])


def test_another_copy_of_the_repository_is_refused(write, tmp_path):
    notebook = write()
    (tmp_path / "dvc.yaml").write_text("stages: {}\n")
    command = [sys.executable, "-m", "jetlab.run", str(notebook), "--out", "x"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 1
    assert "belongs to another copy of the repository" in done.stderr


def test_two_runs_give_the_same_bytes_in_this_interpreter_and_only_at_the_end(write, tmp_path, monkeypatch, capfd):
    notebook = write(FIGURE)
    monkeypatch.setenv("JUPYTER_DATA_DIR", str(tmp_path / "jupyter"))
    monkeypatch.setenv("PYTHONSTARTUP", str(tmp_path / "none.py"))
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"  # another environment's kernel of that name
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["false"], "display_name": "Python 3", "language": "python"}))
    out, contents = tmp_path / "not" / "made" / "yet", []
    for _ in range(2):
        execute(notebook, out, sections=["common"], values={"variant": "none"})
        contents.append({str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()})
        assert [p.name for p in out.parent.iterdir()] == ["yet"]
        for file in out.rglob("*.*"):
            file.unlink()
    assert sorted(contents[0]) == ["choice.json", "figures/loss.svg", "notebook.ipynb", "sub/weights"]
    assert contents[0] == contents[1]
    choice = json.loads(contents[0]["choice.json"])
    assert choice == {
        "executable": sys.executable,
        "cwd": str(paths.ROOT),
        "common": {"seed": 1, "learning_rate": 1e-4, "mode": "on", "count": 10},
        "variant": "none",
        "hashseed": "0",
        "threads": "1",
        "startup": None,
    }
    executed = contents[0]["notebook.ipynb"].decode()
    assert '"stderr"' not in executed and "partial" not in executed and str(paths.ROOT) not in executed
    assert '"image/png"' in executed
    assert "train" not in capfd.readouterr().out
    assert "PYTHONSTARTUP" in os.environ and os.environ.get("JETLAB_PROGRESS") is None  # the caller's own are back


def test_a_failed_cell_leaves_the_results_as_they_were_and_keeps_the_half_run(write, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    cells = ("from jetlab.track import Results\nr = Results(out_dir)\nr.metrics(a=2)", 'raise ValueError("the rule")')
    notebook = write(*cells, name="04_x")
    out = tmp_path / "out"
    out.mkdir()
    (out / "metrics.json").write_text("old")
    arguments = [str(notebook), "--out", str(out), "--set", "variant=b"]
    assert run.main(arguments) == 1
    message = capsys.readouterr().err.splitlines()
    assert message[0].endswith("04_x.ipynb: cell [4] failed")
    assert message[-2:] == ["ValueError: the rule", "The half-run notebook is scratch/failed/04_x-b.ipynb"]
    assert len(message) == 4  # no traceback where the message says it all
    assert [(p.name, p.read_text()) for p in out.iterdir()] == [("metrics.json", "old")]
    assert [p.name for p in tmp_path.iterdir() if "partial" in p.name] == []
    assert "the rule" in (tmp_path / "root" / "scratch" / "failed" / "04_x-b.ipynb").read_text()


def test_the_environment_names_versions_device_and_commit_but_no_machine(monkeypatch):
    import getpass
    import socket

    environment = run.environment()
    assert {"python", "versions", "devices", "backend", "source_commit", "source_changed"} <= set(environment)
    assert environment["backend"] == "chunked" or torch.cuda.is_available()
    text = json.dumps(environment)
    assert socket.gethostname() not in text and str(paths.ROOT) not in text
    assert getpass.getuser() not in environment["devices"]


def test_errors_of_jetlab_are_shown_without_a_traceback():
    classes = [
        node
        for file in (paths.ROOT / "src" / "jetlab").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ClassDef)
        and any("Error" in ast.unparse(b) or "Exc" in ast.unparse(b) for b in node.bases)
    ]
    assert {node.name for node in classes} - {"RunError"} <= run.PLAIN_ERRORS


def test_each_fixed_setting_comes_from_the_parameters_or_the_constants():
    before = dict(os.environ)
    with run._fixed_environment({"common": {"n_threads": 2}}):
        assert os.environ["OMP_NUM_THREADS"] == os.environ["MKL_NUM_THREADS"] == "2"
        assert run.ENVIRONMENT.items() <= os.environ.items()
        if run._has_avx2() and os.uname().machine == "x86_64":
            assert run.X86_ENVIRONMENT.items() <= os.environ.items()
    assert dict(os.environ) == before


def test_folders_of_killed_runs_are_removed_and_those_of_living_ones_kept(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, os.getppid()):
        (tmp_path / f".out.partial-{pid}").mkdir()
    with run._partial(tmp_path / "out") as partial:
        assert partial.is_dir()
    assert [p.name for p in tmp_path.iterdir()] == [f".out.partial-{os.getppid()}"]


def test_bytecode_and_checkpoints_in_a_dependency_do_not_make_a_stage_stale(tmp_path, monkeypatch):
    from dvc.repo import Repo

    monkeypatch.chdir(tmp_path)
    repo = Repo.init(tmp_path, no_scm=True)
    (tmp_path / ".dvcignore").write_text((paths.ROOT / ".dvcignore").read_text())
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "a.py").write_text("1")
    (tmp_path / "dvc.yaml").write_text("stages:\n  s:\n    cmd: echo 1 > out\n    deps: [code]\n    outs: [out]\n")
    repo.reproduce()
    for name in ("__pycache__/a.pyc", ".ipynb_checkpoints/a.ipynb", "x.egg-info/PKG", ".ruff_cache/x", ".a.tmp"):
        file = tmp_path / "code" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("noise")
    assert Repo(tmp_path).status() == {}
    (tmp_path / "code" / "a.py").write_text("2")
    assert list(Repo(tmp_path).status()) == ["s"]


SLEEPER = """
import os, time
from pathlib import Path
from jetlab.progress import progress
Path(FILE).write_text(str(os.getpid()))
for _ in progress(600, "train"):
    time.sleep(0.1)
"""


def started(file: Path) -> int:
    """The process id that the notebook's kernel wrote, once it runs."""
    deadline = time.monotonic() + 60
    while not (file.exists() and file.read_text()):
        assert time.monotonic() < deadline, "the kernel did not start within 60 s"
        time.sleep(0.1)
    return int(file.read_text())


def ends(pid: int, within: float = 5) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True  # ended; nobody has asked for its exit code yet
        except OSError:
            return True
        time.sleep(0.1)
    return False


def command(notebook: Path, out: Path) -> list[str]:
    return [sys.executable, "-m", "jetlab.run", str(notebook), "--out", str(out)]


@pytest.mark.slow
@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_the_kernel_dies_with_its_runner(write, tmp_path, kill):
    pid_file, out = tmp_path / "pid", tmp_path / "out"
    notebook = write(SLEEPER.replace("FILE", repr(str(pid_file))))
    # a shell that starts the tests in the background has them ignore Ctrl-C, which a child would inherit
    listen = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    runner = subprocess.Popen(command(notebook, out), stderr=subprocess.DEVNULL, preexec_fn=listen)
    kernel = started(pid_file)
    runner.send_signal(kill)
    assert runner.wait(20) != 0
    assert ends(kernel)
    assert not out.exists()
    if kill != signal.SIGKILL:  # which leaves the folder to the next run
        assert not list(tmp_path.glob(".out.partial-*"))


@pytest.mark.slow
@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
def test_runner_and_kernel_die_with_dvc(write, tmp_path, shell):
    pid_file, repository = tmp_path / "pid", tmp_path / "dvc"
    notebook = write(SLEEPER.replace("FILE", repr(str(pid_file))))
    repository.mkdir()
    environment = os.environ | {"SHELL": shell}
    subprocess.run([sys.executable, "-m", "dvc", "init", "--no-scm", "-q"], cwd=repository, check=True)
    line = " ".join(command(notebook, tmp_path / "out"))
    (repository / "dvc.yaml").write_text(f"stages:\n  s:\n    cmd: cd / && {line}; echo done > out\n    outs: [out]\n")
    dvc = subprocess.Popen([sys.executable, "-m", "dvc", "repro"], cwd=repository, env=environment)
    kernel = started(pid_file)
    runner = run._parent(kernel)
    dvc.kill()
    dvc.wait()
    assert ends(runner) and ends(kernel)


@pytest.mark.slow
def test_progress_reaches_the_terminal_and_not_the_notebook(write, tmp_path):
    cells = ('from jetlab.progress import progress\nimport time\nfor _ in progress(30, "train"):\n    time.sleep(0.1)',)
    notebook = write(*cells)
    terminal, end = pty.openpty()
    runner = subprocess.Popen(command(notebook, tmp_path / "out"), stderr=end)
    os.close(end)
    shown = b""
    while True:
        try:
            shown += os.read(terminal, 4096)
        except OSError:  # how Linux says that the other end is closed
            break
    assert runner.wait(30) == 0
    assert b"train: " in shown and b"/30" in shown and b"left" in shown
    assert "train: " not in (tmp_path / "out" / "notebook.ipynb").read_text()


@pytest.mark.slow
def test_a_record_holds_what_it_takes_to_repeat_the_run(write, tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "ROOT", tmp_path / "root")
    cell = "from jetlab.track import Results\nr = Results(out_dir)\nr.metrics(a=2)\nr.curve('c', [{'x': 1}])"
    notebook = write(cell, name="09_x")
    arguments = [str(notebook), "--out", str(tmp_path / "out"), "--record", "h200", "--set", "variant=b"]
    assert run.main(arguments) == 0
    folder = tmp_path / "root" / "records" / "h200" / "09_x" / "b"
    names = ["c.csv", "command.txt", "environment.json", "metrics.json", "params.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert json.loads((folder / "params.json").read_text()) == {"variant": "b"}
    assert (folder / "command.txt").read_text().startswith("python -m jetlab.run ")
