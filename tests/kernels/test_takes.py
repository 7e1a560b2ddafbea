"""What "auto" leaves to the kernels, seen without a GPU on tensors that have a device and no memory."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import jetlab_kernels
from jetlab.ops import backends, resolve_backend


@pytest.fixture
def on(monkeypatch):
    monkeypatch.setattr(jetlab_kernels, "AUTO", True)


def tensor(dtype=torch.bfloat16, device="cuda"):
    with FakeTensorMode():
        return torch.zeros(2, dtype=dtype, device=device)


def test_everything_on_a_gpu_that_they_hold(on):
    assert resolve_backend("auto", tensor(), None, tensor(torch.float32), head_dim=256, taps=4) == "triton"


@pytest.mark.parametrize(
    ("tensors", "widths"),
    [
        pytest.param([torch.zeros(2)], {}, id="on-the-cpu"),
        pytest.param([tensor(), tensor(device="cpu")], {}, id="partly-on-the-cpu"),
        pytest.param([tensor(torch.float64)], {}, id="fp64"),
        pytest.param([tensor()], {"head_dim": 257}, id="keys-too-wide"),
        pytest.param([tensor(torch.float32)], {"head_dim": 129}, id="keys-too-wide-in-fp32"),
        pytest.param([tensor()], {"taps": 9}, id="too-many-taps"),
    ],
)
def test_nothing_else(on, tensors, widths):
    assert resolve_backend("auto", *tensors, **widths) == "chunked"


def test_what_auto_took_is_told_once(on, caplog):
    backends._tell.cache_clear()
    with caplog.at_level("INFO", logger=backends.__name__):
        for _ in range(2):
            resolve_backend("auto", tensor())
    assert [record.getMessage() for record in caplog.records] == ["backend='auto' takes triton on cuda"]
