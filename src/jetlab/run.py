"""Run one notebook as one stage of the study.

    python -m jetlab.run NOTEBOOK --out DIR --params SECTION... --set k=v section.k=v [--record NAME]

Reads the named sections of params.yaml (YAML 1.2, as DVC does), fixes the environment, runs the notebook with papermill
and moves what it wrote, with the executed notebook in canonical form, into DIR. If a cell fails, DIR stays as it was,
the half-run notebook goes to scratch/failed/, and the exit code is 1.
"""

import argparse
import ast
import contextlib
import copy
import json
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from jetlab.paths import ROOT, replacing, resolve, shown

# Set before the kernel starts, because each of these is read once, when Python or a library is loaded.
ENVIRONMENT = {
    "PYTHONHASHSEED": "0",  # the order of sets of strings
    "TOKENIZERS_PARALLELISM": "false",  # no thread pool that warns, or hangs, after a fork
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # cuBLAS then sums in a fixed order
}
# The libraries choose their code by the CPU they meet, and another order of sums gives other last digits. Every x86
# machine since 2015 has AVX2. MKL's COMPATIBLE, documented to agree over all makers, made the study's float32 products
# 2.0 to 2.8 times slower (AMD EPYC, one thread: 1024x64x256 in 923 instead of 345 µs); AVX2 costs nothing measurable.
X86_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",  # PyTorch's own loops: not AVX-512 where there is
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # oneDNN: matrix products in bf16, convolutions
    "MKL_CBWR": "AVX2,STRICT",  # MKL: one branch, whatever the alignment of the data and the number of threads
}
THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")  # from common.n_threads, 1 where it is not given
# Errors whose message is written for the user, so that the traceback is left out: jetlab's own, and bad input.
PLAIN_ERRORS = {"ValueError", "ValidationError", "FileNotFoundError", "OSError"} | {
    "BudgetTooSmall",
    "ConfigError",
    "DamagedFile",
    "MissingInput",
    "TrainingDiverged",
    "TrainingFailed",
    "UnknownMixerError",
}
KERNEL = "from jetlab.run import die_with_parent; die_with_parent(); from ipykernel import kernelapp; " + (
    "kernelapp.launch_new_instance()"
)


# No file of typed input, and none of ipykernel's notes (local connections are not encrypted; it was interrupted).
KERNEL_OPTIONS = ("--HistoryManager.enabled=False", "--log-level=CRITICAL")


class RunError(Exception):
    """The run cannot start, or a cell failed; the message says the rule, the value and the way out."""


def die_with_parent(*, and_its_parent: bool = False) -> None:
    """End this process as soon as its parent has ended: for kernels and worker processes.

    A killed pipeline (`kill -9`) cannot clean up, and an orphan would go on computing beside the next run. A thread
    looks 5 times a second. Below `dvc repro`, which runs a command through a shell, the shell's parent is watched too;
    `and_its_parent`: so is the parent's, for workers of a launcher that does not watch for itself.
    """
    links = [(os.getpid(), os.getppid())]
    if and_its_parent or ("DVC_STAGE" in os.environ and _is_shell(links[0][1])):
        links.append((links[0][1], _parent(links[0][1])))

    def watch() -> None:
        while all(_parent(child) == parent for child, parent in links):
            time.sleep(0.2)
        os._exit(1)  # at once: the main thread may be deep in a library

    threading.Thread(target=watch, daemon=True, name="die_with_parent").start()


def run(
    notebook: str | Path,
    out_dir: str | Path,
    *,
    sections: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
    params_file: str | Path = "params.yaml",
    record: str | None = None,
    command: Sequence[str] = (),
) -> Path:
    """Run `notebook` with the named sections and `values` as its parameters; returns the folder of its results.

    Raises RunError for a section, value or notebook that does not fit, and when a cell fails.
    """
    from jetlab import notebooks

    notebook, out_dir = resolve(notebook), resolve(out_dir)
    if not notebook.is_file():
        raise RunError(f"{shown(notebook)} does not exist; give the notebook's path from the root of the repository")
    nb = notebooks.canonical(notebooks.read(notebook))  # kernel and outputs of whoever saved it play no part
    parameters = _parameters(notebook, nb, sections, values or {}, resolve(params_file))
    if sections and (params := read_params(resolve(params_file))).get("text"):
        from jetlab import preflight

        try:
            preflight.once(params)
        except ValueError as error:
            raise RunError(str(error)) from None
    single = {key: str(value) for key, value in (values or {}).items() if "." not in key}
    entry = [value for value in single.values() if "/" not in value]  # of a matrix; folders name none
    label = re.sub(r"[^\w.=-]+", "_", "-".join([notebook.stem, *entry]))
    with _fixed_environment(parameters), _partial(out_dir) as partial, tempfile.TemporaryDirectory() as scratch:
        replace = {str(partial): str(out_dir), shown(partial): shown(out_dir), f"{ROOT}{os.sep}": ""}
        half_run = Path(scratch) / "notebook.ipynb"
        with _progress_line(label, Path(scratch) / "progress"):
            try:
                os.environ["JETLAB_JOBS"] = str(Path(scratch) / "jobs")
                executed = _execute(nb, half_run, parameters | {"out_dir": shown(partial)}, Path(scratch))
            except RunError as error:
                kept = resolve("scratch/failed") / f"{label}.ipynb"
                if half_run.exists():
                    with replacing(kept) as temporary:
                        shutil.copyfile(half_run, temporary)
                raise RunError(f"{shown(notebook)}: {error}\nThe half-run notebook is {shown(kept)}") from None
        executed_text = notebooks.text(notebooks.canonical(executed, outputs=True, replace=replace))
        if (size := len(executed_text.encode())) > notebooks.MAX_BYTES:
            print(
                f"{label}: the executed notebook has {size // 1000} KB; show fewer or smaller figures", file=sys.stderr
            )
        with replacing(partial / "notebook.ipynb") as temporary:
            temporary.write_text(executed_text, encoding="utf-8")
        _name_profile(partial / "metrics.json", parameters)
        if (partial / "notebooks").is_dir():  # executed notebooks that the report publishes: its own goes with them
            shutil.copyfile(partial / "notebook.ipynb", partial / "notebooks" / notebook.name)
        if record is not None:
            folder = resolve("records") / record / notebook.stem
            _record(partial, folder.joinpath(*entry), parameters, command)
        _move_files(partial, out_dir)
        _clear_jobs(Path(scratch) / "jobs")
    return out_dir


def read_params(path: Path) -> dict[str, Any]:
    """The sections of a params.yaml by YAML 1.2, as DVC reads it: 1e-4 is a number, `on` a word, 010 ten.

    Raises RunError, with line and column, if it is missing or not a mapping of sections.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    try:
        params = YAML(typ="safe", pure=True).load(path)  # pure: the C parser speaks YAML 1.1
    except FileNotFoundError:
        raise RunError(f"{shown(path)} does not exist; restore it with `git checkout {shown(path)}`") from None
    except YAMLError as error:
        raise RunError(f"{shown(path)} is not valid YAML: {error}") from None
    if not isinstance(params, dict):
        raise RunError(f"{shown(path)} must map section names to sections, got {type(params).__name__}")
    return params


def parse_value(text: str) -> tuple[str, Any]:
    """`k=v` of --set, v read as YAML 1.2: `x=false` is False, `x=none` the word; k may be `section.key`.

    Raises RunError if it is not k=v.
    """
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    key, equals, value = text.partition("=")
    if not equals or not all(part.isidentifier() for part in key.split(".")):
        raise RunError(f"--set takes name=value, got {text!r}; write e.g. --set variant=jetblock common.device=cuda")
    try:
        return key, YAML(typ="safe", pure=True).load(value)
    except YAMLError:
        raise RunError(f"--set {text!r} is not a YAML value; quote it, e.g. --set '{key}=\"…\"'") from None


def parse_command(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments of `python -m jetlab.run` as notebook, out, params, set, params_file, record."""
    parser = argparse.ArgumentParser(prog="python -m jetlab.run", description="Run one notebook as one stage.")
    parser.add_argument("notebook", help="path from the root of the repository")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--params", nargs="+", action="extend", default=[], metavar="SECTION", help="of params.yaml")
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="k=v",
        help="single values (YAML), or section.k=v for one of a section",
    )
    parser.add_argument("--params-file", default="params.yaml", metavar="FILE", help="default: params.yaml")
    parser.add_argument("--record", metavar="NAME", help="also keep the small results in records/NAME/, with device")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    args = parse_command(arguments)
    if "DVC_STAGE" in os.environ:
        die_with_parent()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, so that everything is cleaned up
    started = time.monotonic()
    try:
        if Path("dvc.yaml").exists() and Path.cwd().resolve() != ROOT:
            raise RunError(
                "the jetlab that Python imports belongs to another copy of the repository than this folder; "
                "run `pip install -e .` here, or set PYTHONPATH=src"
            )
        out = run(
            args.notebook,
            args.out,
            sections=args.params,
            values=dict(map(parse_value, args.set)),
            params_file=args.params_file,
            record=args.record,
            command=["python", "-m", "jetlab.run", *arguments],
        )
    except (RunError, ValueError, OSError) as error:
        print(f"jetlab.run: {error}", file=sys.stderr)
        return 1
    print(f"{shown(out)}: written in {_clock(time.monotonic() - started)}", file=sys.stderr)
    return 0


def _parameters(
    notebook: Path, nb, sections: Sequence[str], values: Mapping[str, Any], params_file: Path
) -> dict[str, Any]:
    """The parameters to inject, checked against the names that the notebook's `parameters` cell assigns."""
    from jetlab import notebooks

    cells = notebooks.parameter_cells(nb)
    if len(cells) != 1:
        raise RunError(
            f"{shown(notebook)} must have exactly one cell tagged `parameters`, got {len(cells)}; "
            "set the tag in JupyterLab's property inspector"
        )
    defined = assigned_names(cells[0].source)
    single = {key: value for key, value in values.items() if "." not in key}
    for name, kind in [*((s, "section") for s in sections), *((k, "value") for k in single), ("out_dir", "value")]:
        if name not in defined:
            raise RunError(
                f"{shown(notebook)} must assign each {kind} that it gets in its `parameters` cell, which has no "
                f"{name!r} but {', '.join(defined) or 'nothing'}; add a default there or leave it out of the command"
            )
    if twice := set(sections) & set(single):
        raise RunError(f"a name is either a section or a value, got both for {sorted(twice)}; drop one of them")
    if "out_dir" in values:
        raise RunError("out_dir is set by --out; leave it out of --set")
    params = read_params(params_file) if sections else {}
    for section in sections:
        if section not in params:
            raise RunError(
                f"{shown(params_file)} has no section {section!r}, only {', '.join(params)}; add it or fix --params"
            )
    given = {section: copy.deepcopy(params[section]) for section in sections}
    for key, value in values.items():
        if "." in key:
            _override(given, key, value)
    return given | single


def _override(given: dict[str, Any], key: str, value: Any) -> None:
    """Put `value` in the place that `section.key…` names, which must be there. Raises RunError with what is there."""
    *path, last = key.split(".")
    place: Any = given
    for part in path:
        place = place.get(part) if isinstance(place, dict) else None
    if not isinstance(place, dict) or last not in place:
        known = ", ".join(place if isinstance(place, dict) else given)
        raise RunError(f"--set {key}=… names nothing that --params passes; there is {known or 'no section'}")
    place[last] = value


def assigned_names(source: str) -> list[str]:
    """The names that a `parameters` cell assigns at its top level, in order. Raises RunError if it is not Python."""
    try:
        body = ast.parse(source).body
    except SyntaxError as error:
        raise RunError(f"the `parameters` cell is not Python: {error}") from None
    targets = [t for node in body if isinstance(node, ast.Assign) for t in node.targets]
    targets += [node.target for node in body if isinstance(node, ast.AnnAssign)]
    return [target.id for target in targets if isinstance(target, ast.Name)]


@contextlib.contextmanager
def _fixed_environment(parameters: Mapping[str, Any]) -> Iterator[None]:
    """os.environ with the fixed settings while the kernel runs, then as before."""
    before = dict(os.environ)
    common = parameters.get("common")
    n_threads = str(common.get("n_threads", 1)) if isinstance(common, Mapping) else "1"
    os.environ.update(ENVIRONMENT | dict.fromkeys(THREADS, n_threads))
    os.environ.pop("PYTHONSTARTUP", None)  # a user's own start-up file is no part of the study
    if platform.machine().lower() in ("x86_64", "amd64"):
        if _has_avx2():
            os.environ.update(X86_ENVIRONMENT)
        else:
            print(
                "This CPU has no AVX2: numbers may differ from the committed ones in their last digits", file=sys.stderr
            )
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _has_avx2() -> bool:
    try:
        return " avx2 " in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True  # not Linux: every x86 computer that runs a current PyTorch has it


@contextlib.contextmanager
def _partial(out_dir: Path) -> Iterator[Path]:
    """A temporary folder beside `out_dir` for the run to write into: a run that ends early leaves no half results."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{out_dir.name}.partial-"
    for old in out_dir.parent.glob(f"{prefix}*"):
        if not _alive(old.name.removeprefix(prefix)):  # its runner was killed
            shutil.rmtree(old, ignore_errors=True)
    partial = out_dir.parent / f"{prefix}{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _move_files(source: Path, target: Path) -> None:
    """Rename every file below `source` into its place below `target`, the executed notebook last."""
    files = sorted((p for p in source.rglob("*") if p.is_file()), key=lambda p: (p.name == "notebook.ipynb", p))
    for file in files:
        place = target / file.relative_to(source)
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(file, place)


def _execute(nb, path: Path, parameters: Mapping[str, Any], scratch: Path):
    """Run `nb` by papermill, in a kernel of this very interpreter, at the root; saves to `path` after each cell."""
    import nbformat
    import papermill
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
    from nbclient.exceptions import CellTimeoutError, DeadKernelError

    class OwnInterpreter(KernelSpecManager):
        """python3 is this interpreter: a kernel of that name in the user's home folder would otherwise win."""

        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(
                argv=[sys.executable, "-c", KERNEL, "-f", "{connection_file}", *KERNEL_OPTIONS],
                display_name="Python 3",
                language="python",
                env={"IPYTHONDIR": str(scratch / "ipython")},  # without the start-up files of the user's profile
            )

    class OwnKernelManager(AsyncKernelManager):
        def __init__(self, **traits) -> None:
            super().__init__(kernel_spec_manager=OwnInterpreter(), **traits)

    source = path.with_name("source.ipynb")
    nbformat.write(nb, source)
    try:
        return papermill.execute_notebook(
            source,
            path,
            parameters=dict(parameters),
            kernel_name="python3",
            cwd=ROOT,
            progress_bar=False,
            kernel_manager_class=OwnKernelManager,
        )
    except papermill.PapermillExecutionError as error:
        raise RunError(_explain(error)) from None
    except (DeadKernelError, CellTimeoutError, RuntimeError) as error:
        raise RunError(
            f"the kernel died, most often because memory ran out ({error}); free some and run again"
        ) from None


def _explain(error) -> str:
    """Which cell failed, how it begins, and why; the error stands last."""
    head = "\n".join(f"    {line}" for line in error.source.strip().splitlines()[:5])
    number = next(iter(re.findall(r"\d+", str(error.exec_count))), "?")
    why = f"{error.ename}: {error.evalue}"
    if error.ename not in PLAIN_ERRORS:
        plain = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback)).rstrip().splitlines()
        why = "\n".join(plain[-20:]) if plain else why
    return f"cell [{number}] failed\n{head}\n{why}"


@contextlib.contextmanager
def _progress_line(label: str, file: Path) -> Iterator[None]:
    """Show the latest line of the kernel's progress on this process's stderr while the block runs.

    On a terminal one line is drawn again and again; elsewhere, or with JETLAB_LINES=1 set (several runs on one
    terminal), a line of its own appears every 10 s.
    """
    redraw = sys.stderr.isatty() and "JETLAB_LINES" not in os.environ
    started, done = time.monotonic(), threading.Event()

    def draw() -> None:
        last = ""
        while not done.wait(0.5 if redraw else 10):
            with contextlib.suppress(OSError, UnicodeDecodeError):  # not there yet, or being written
                last = file.read_text(encoding="utf-8") or last
            text = f"{label} {_clock(time.monotonic() - started)} {last}"
            if redraw:
                width = shutil.get_terminal_size().columns - 1
                print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
            else:
                print(text, file=sys.stderr, flush=True)

    os.environ["JETLAB_PROGRESS"] = str(file)
    thread = threading.Thread(target=draw, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        if redraw:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


def _clear_jobs(listed: Path) -> None:
    """Remove the folders of the trainings that a stage started (`jetlab.train.launch`), now that its results are in place."""
    for folder in listed.read_text(encoding="utf-8").splitlines() if listed.exists() else ():
        shutil.rmtree(folder, ignore_errors=True)


def _name_profile(metrics: Path, parameters: Mapping[str, Any]) -> None:
    """Add `profile`, the name in section common, to a stage's headline numbers, so that a report can tell profiles apart."""
    common = parameters.get("common")
    if metrics.exists() and isinstance(common, Mapping) and "profile" in common:
        named = json.loads(metrics.read_text(encoding="utf-8")) | {"profile": common["profile"]}
        with replacing(metrics) as temporary:
            temporary.write_text(json.dumps(named, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _record(partial: Path, folder: Path, parameters: Mapping[str, Any], command: Sequence[str]) -> None:
    """Keep the small results of a run together with what it takes to repeat it, in `folder`."""
    new = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    try:
        for file in sorted(partial.iterdir()):
            if file.suffix in (".csv", ".json"):
                shutil.copyfile(file, new / file.name)
        for name, data in (("params", dict(parameters)), ("environment", environment())):
            (new / f"{name}.json").write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        (new / "command.txt").write_text(shlex.join(command) + "\n", encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)


def environment() -> dict[str, Any]:
    """Versions, device and source commit of this run; nothing that names the machine."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from jetlab.ops import resolve_backend

    versions = {}
    for package in ("torch", "triton", "transformers", "numpy", "lm-eval"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "devices": devices or [_cpu_name()],
        "cuda": torch.version.cuda if devices else None,
        "backend": resolve_backend("auto", torch.empty(0, device="cuda" if devices else "cpu")),  # of the recurrences
        "source_commit": _git("rev-parse", "HEAD") or None,
        "source_changed": bool(_git("status", "--porcelain", "--", "src", "kernels", "notebooks", "params.yaml")),
    }


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        if found := re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE):
            return found.group(1)
    return platform.processor() or platform.machine()


def _git(*arguments: str) -> str:
    try:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""  # not a git checkout


def _parent(pid: int) -> int:
    """The parent of process `pid`; 0 if it has ended."""
    if pid == os.getpid():
        return os.getppid()
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except (OSError, ValueError):
        return 0


def _is_shell(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip() in ("sh", "bash", "dash", "zsh", "ksh", "fish")
    except OSError:
        return False  # not Linux: the parent alone is watched


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


if __name__ == "__main__":
    sys.exit(main())
