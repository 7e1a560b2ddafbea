"""What "auto" leaves to the kernels, seen without a GPU on tensors that have a device and no memory."""

import types

import pytest
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode

from jetlab.ops import backends, resolve_backend
from jetlab_kernels import launch


@pytest.fixture
def hopper(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def brought(monkeypatch, **versions):
    """A Triton with other assemblers, and no choice made yet."""
    monkeypatch.delenv("TRITON_PTXAS_PATH", raising=False)
    tools = {name: types.SimpleNamespace(path=name, version=version) for name, version in versions.items()}
    monkeypatch.setattr(triton.knobs, "nvidia", types.SimpleNamespace(**tools))
    return triton.knobs.nvidia


def tensor(dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return torch.zeros(2, dtype=dtype, device=device)


def test_everything_on_a_gpu_that_they_hold(hopper):
    assert resolve_backend("auto", tensor(), None, tensor(torch.float32), head_dim=256, taps=4) == "triton"


@pytest.mark.parametrize(
    ("tensors", "widths"),
    [
        pytest.param([], {}, id="no-tensor"),
        pytest.param([torch.zeros(2)], {}, id="on-the-cpu"),
        pytest.param([tensor(), tensor(device="cpu")], {}, id="partly-on-the-cpu"),
        pytest.param([tensor(torch.float64)], {}, id="fp64"),
        pytest.param([tensor()], {"head_dim": 257}, id="keys-too-wide"),
        pytest.param([tensor(torch.float32)], {"head_dim": 129}, id="keys-too-wide-in-fp32"),
        pytest.param([tensor()], {"taps": 9}, id="too-many-taps"),
    ],
)
def test_nothing_else(hopper, tensors, widths):
    assert resolve_backend("auto", *tensors, **widths) == "chunked"


def test_what_auto_took_is_told_once(hopper, caplog):
    backends._tell.cache_clear()
    with caplog.at_level("INFO", logger=backends.__name__):
        for _ in range(2):
            resolve_backend("auto", tensor())
    assert [record.getMessage() for record in caplog.records] == ["backend='auto' takes triton on cuda"]


def test_nothing_on_a_gpu_where_they_were_not_checked(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert resolve_backend("auto", tensor()) == "chunked"


def test_nothing_if_what_assembles_them_gets_them_wrong(hopper, monkeypatch):
    brought(monkeypatch, ptxas="12.8")
    assert resolve_backend("auto", tensor()) == "chunked"
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"need ptxas ≥ 12\.9, got 12\.8.*TRITON_PTXAS_PATH"):
        launch.check_device(tensor())


@pytest.mark.parametrize(
    ("hoppers", "blackwells", "chosen"),
    [("12.8", "13.1", "ptxas_blackwell"), ("12.8", "12.8", None), ("13.0", "13.1", None)],
)
def test_an_assembler_that_is_too_old_is_passed_over(hoppers, blackwells, chosen, monkeypatch):
    nvidia = brought(monkeypatch, ptxas=hoppers, ptxas_blackwell=blackwells)
    before = nvidia.ptxas
    launch.choose_assembler()
    assert nvidia.ptxas == (chosen or before)


def test_a_triton_without_assemblers_is_no_error(hopper, monkeypatch):
    brought(monkeypatch)
    launch.choose_assembler()
    assert not launch.assembles_right()
    assert resolve_backend("auto", tensor()) == "chunked"


def test_this_process_assembles_right():
    assert launch.assembles_right()


def test_nothing_while_a_compiler_traces(hopper, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    assert resolve_backend("auto", tensor()) == "chunked"


def test_the_users_assembler_stays(monkeypatch):
    nvidia = brought(monkeypatch, ptxas="12.8", ptxas_blackwell="13.1")
    monkeypatch.setenv("TRITON_PTXAS_PATH", "mine")
    launch.choose_assembler()
    assert nvidia.ptxas.version == "12.8"
