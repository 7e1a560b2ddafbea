"""Specification of running model-written code: it is judged by its end, and no accident of it outlives the judging."""

import time
from pathlib import Path

import pytest

from jetlab.evaluate.execution import Limits, judge, pass_at_k, run_program

SHORT = Limits(seconds=2.0, cpu_seconds=5, memory_mib=512, file_mib=1)


def test_a_program_that_comes_to_its_end_passes():
    assert run_program("assert sorted([3, 1, 2]) == [1, 2, 3]").result == "pass"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        pytest.param("assert 1 + 1 == 3", "AssertionError", id="wrong"),
        pytest.param("def f(:", "SyntaxError", id="no-program"),
        pytest.param("raise SystemExit(0)", "before its tests were over", id="exits-before-its-tests"),
        pytest.param("import os; os._exit(0)", "", id="leaves-before-its-tests"),
        pytest.param("input()", "EOFError", id="asks-for-input"),
    ],
)
def test_any_other_end_fails_and_says_why(program, message):
    outcome = run_program(program)
    assert outcome.result == "fail"
    assert message in outcome.message


@pytest.mark.parametrize(
    ("program", "limits"),
    [
        pytest.param("while True: pass", SHORT, id="wall-clock"),
        pytest.param("while True: pass", Limits(seconds=20.0, cpu_seconds=1), id="processor-time"),
        pytest.param("import time; time.sleep(60)", SHORT, id="asleep"),
    ],
)
def test_an_endless_program_times_out(program, limits):
    begin = time.monotonic()
    assert run_program(program, limits).result == "timeout"
    assert time.monotonic() - begin < 10


def test_a_program_gets_no_more_memory_than_allowed():
    outcome = run_program("x = bytearray(2 << 30)", SHORT)
    assert outcome.result == "fail" and "MemoryError" in outcome.message
    assert run_program("x = bytearray(64 << 20)", SHORT).result == "pass"


def test_a_child_does_not_outlive_its_program(tmp_path):
    """Where root runs the tests the child can be born; then it must die before it writes."""
    sign = tmp_path / "sign"
    program = (
        "import os, time\n"
        "if os.fork() == 0:\n"
        "    time.sleep(1)\n"
        f"    open({str(sign)!r}, 'w').write('alive')\n"
        "    os._exit(0)\n"
    )
    allowed = Limits(seconds=5.0, n_processes=10_000)
    assert run_program(program, allowed).result == "pass"
    time.sleep(1.5)
    assert not sign.exists()


def test_a_child_cannot_hold_up_the_judging():
    begin = time.monotonic()
    program = "import os, time\nif os.fork() == 0:\n    time.sleep(60)\n"
    assert run_program(program, Limits(seconds=5.0, n_processes=10_000)).result == "pass"
    assert time.monotonic() - begin < 4


def test_a_flood_of_output_costs_nothing_and_is_not_judged():
    assert run_program("for _ in range(2000): print('x' * 100_000)").result == "pass"
    outcome = run_program("import sys\nfor _ in range(100): sys.stderr.write('x' * 100_000)", SHORT)
    assert outcome.result == "fail" and len(outcome.message) <= 500  # beyond 1 MiB standard error may not grow


def test_a_written_file_is_bounded_and_gone_afterwards(tmp_path):
    note = tmp_path / "folder"
    program = f"import os\nopen('out', 'w').write('x')\nopen({str(note)!r}, 'w').write(os.getcwd())"
    assert run_program(program, SHORT).result == "pass"
    folder = Path(note.read_text())
    assert folder != Path.cwd() and not folder.exists()
    assert "File too large" in run_program("open('out', 'wb').write(bytes(3 << 20))", SHORT).message


def test_the_environment_is_empty_and_modules_of_the_folder_are_not_found(monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "x")
    assert (
        run_program("import os\nassert 'SECRET_TOKEN' not in os.environ and 'HOME' not in os.environ").result == "pass"
    )
    assert "ModuleNotFoundError" in run_program("import program").message


@pytest.mark.parametrize(
    "program",
    [
        "import socket; socket.socket()",
        "import socket; socket.create_connection(('127.0.0.1', 9))",
        "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
    ],
)
def test_sockets_raise(program):
    assert "no network here" in run_program(program).message


def test_numpy_works_under_the_limits():
    """The added tests of EvalPlus compare with numpy."""
    assert run_program("import numpy as np\nassert np.allclose(np.ones(3) @ np.ones(3), 3)").result == "pass"


@pytest.mark.parametrize(
    ("n", "n_passed", "k", "expected"),
    [(1, 1, 1, 1.0), (1, 0, 1, 0.0), (10, 3, 1, 0.3), (5, 1, 2, 0.4), (10, 6, 5, 1.0)],
)
def test_pass_at_k_is_the_chance_that_one_of_k_drawn_programs_passes(n, n_passed, k, expected):
    assert pass_at_k(n, n_passed, k) == pytest.approx(expected)


def test_more_draws_than_programs_are_refused():
    with pytest.raises(ValueError, match="got k = 5 and 2"):
        pass_at_k(2, 1, 5)


def test_the_judge_joins_response_and_tests():
    process_results = judge(lambda doc: doc["tests"], [1])
    doc = {"tests": "assert double(4) == 8"}
    assert process_results(doc, ["def double(x):\n    return 2 * x"]) == {"pass@1": 1.0}
    assert process_results(doc, ["def double(x):\n    return x"]) == {"pass@1": 0.0}
    assert process_results(doc, [["double = lambda x: 2 * x", "double = None"]]) == {"pass@1": 0.5}
