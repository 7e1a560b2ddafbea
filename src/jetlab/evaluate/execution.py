"""Running programs that a model wrote: each in a process of its own, with limits.

**This is no security boundary.** It stops accidents: endless loops, memory that grows, floods of output, children that
stay behind. A program that means harm can read every file that you can read, and as root it can raise its limits again.
What an untrusted model writes belongs into a container or a virtual machine without network and without your files.

What holds: a fresh `python -I` in a temporary folder that is removed afterwards, no standard input, no environment but
one thread for numerical libraries, limits on processor time, memory, file size and, unless root runs it, new processes;
after the wall-clock limit, or when the program ends, its whole process group is killed. Python's `socket` raises.
What does not: a child in a session of its own leaves the group (only root can start one); `ctypes` reaches sockets.
"""

import contextlib
import math
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

# The exit status of a program that came to its end. Not 0: a program that calls exit() before its tests must not pass.
_PASSED = 93
_MESSAGE = 500  # characters of the error's end that are kept

# First what cannot be undone (hard limits), then the program, under the name that its tests may ask for.
_GUARD = """
import _socket, os, resource, socket, sys
path, passed, cpu_s, memory, file_size, n_processes = sys.argv[1], *map(int, sys.argv[2:])
limits = {"RLIMIT_AS": memory, "RLIMIT_FSIZE": file_size, "RLIMIT_NPROC": n_processes, "RLIMIT_CORE": 0}
resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 1))  # SIGXCPU at the first, SIGKILL at the second
for name, value in limits.items():
    try:
        resource.setrlimit(getattr(resource, name), (value, value))
    except (AttributeError, ValueError, OSError):  # macOS refuses RLIMIT_AS
        pass
def refuse(*_args, **_options):
    raise OSError("no network here")
for module in (_socket, socket):
    module.socket = type("socket", (module.socket,), {"__init__": refuse})  # a class: ssl derives its own from it
    for name in ("create_connection", "create_server", "socketpair", "fromfd", "getaddrinfo"):
        if hasattr(module, name):
            setattr(module, name, refuse)
sys.argv = [path]
try:
    exec(compile(open(path, encoding="utf-8").read(), "program.py", "exec"), {"__name__": "__main__"})
except SystemExit:
    sys.exit("the program ended itself before its tests were over")
os._exit(passed)
"""


@dataclass(frozen=True)
class Limits:
    """What one program may use."""

    seconds: float = 10.0  # wall clock
    cpu_seconds: int = 10
    memory_mib: int = 2048  # address space; numpy alone asks for a few hundred MiB
    file_mib: int = 16  # of each file that it writes
    n_processes: int = 0  # that it may start, threads included; not enforced for root


@dataclass(frozen=True)
class Outcome:
    """`result`, and for a failure the end of what the program wrote to standard error."""

    result: Literal["pass", "fail", "timeout"]
    message: str = ""


def run_program(program: str, limits: Limits | None = None) -> Outcome:
    """Run a Python program under limits (the module says which hold): "pass" if it reaches its end without an error.

    "timeout" covers both clocks. A program that ends itself, by exit() or otherwise, fails.
    """
    limits = limits or Limits()
    with tempfile.TemporaryDirectory(prefix="jetlab_program_", ignore_cleanup_errors=True) as folder:
        path, errors = Path(folder, "program.py"), Path(folder, "stderr.txt")
        path.write_text(program, encoding="utf-8", errors="replace")
        allowed = (limits.cpu_seconds, limits.memory_mib << 20, limits.file_mib << 20, limits.n_processes)
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", _GUARD, str(path), *map(str, (_PASSED, *allowed))],
                cwd=folder,
                env={"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,  # what a program prints is not judged
                stderr=stderr,
                start_new_session=True,  # a process group of its own, with all children
            )
            try:
                status = process.wait(timeout=limits.seconds)
            except subprocess.TimeoutExpired:
                status = None
            finally:
                _kill_group(process)
        if status is None or status == -signal.SIGXCPU:
            return Outcome("timeout")
        if status == _PASSED:
            return Outcome("pass")
        return Outcome(
            "fail", errors.read_text(encoding="utf-8", errors="replace")[-_MESSAGE:] if errors.is_file() else ""
        )


def _kill_group(process: subprocess.Popen) -> None:
    """End the process and every child that is still in its group."""
    with contextlib.suppress(ProcessLookupError):  # nobody is left
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def pass_at_k(n: int, n_passed: int, k: int) -> float:
    """Chance that at least one of k programs drawn from n passes: 1 − C(n − n_passed, k) / C(n, k) (arXiv:2107.03374, Eq 1).

    Raises ValueError if k is more than n.
    """
    if k > n:
        raise ValueError(
            f"pass@k needs at least k programs of a document, got k = {k} and {n}; raise the task's repeats"
        )
    return 1 - math.comb(n - n_passed, k) / math.comb(n, k)


def judge(
    target_of: Callable[[dict], str], ks: Sequence[int], limits: Limits | None = None
) -> Callable[[dict, list], dict[str, float]]:
    """lm-eval's `process_results` for programs: (document, filtered responses) -> {"pass@k": …} for every k in `ks`.

    A program is a response, a line break, and the tests `target_of(document)`. A document's responses are a string, or a
    list of strings where the task repeats its question.
    """

    def process_results(doc: dict, results: list) -> dict[str, float]:
        written = [results[0]] if isinstance(results[0], str) else list(results[0])
        outcomes = [run_program(f"{text}\n{target_of(doc)}\n", limits) for text in written]
        n_passed = sum(outcome.result == "pass" for outcome in outcomes)
        return {f"pass@{k}": pass_at_k(len(outcomes), n_passed, k) for k in ks}

    return process_results
