"""Specification of an MLP's gate in one launch."""

import pytest
import torch
from compare import relative_error
from torch.nn import functional as F

from jetlab.ops import swiglu

SIZES = pytest.mark.parametrize("shape", [(1, 1, 1), (2, 1, 48), (3, 5, 700)], ids=str)


def inputs(shape, *, device, dtype=torch.float32):
    rng = torch.Generator().manual_seed(0)
    return [(4 * torch.randn(*shape, generator=rng)).to(device, dtype) for _ in range(2)]


@SIZES
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3), (torch.float16, 5e-4)])
def test_equals_the_definition(shape, dtype, bound, device):
    """Up to one rounding, which the interpreter cuts off in bf16."""
    gate, up = inputs(shape, device=device, dtype=dtype)
    found = swiglu(gate, up, backend="triton")
    assert found.dtype == dtype and found.shape == shape
    assert relative_error(found, swiglu(gate.double(), up.double(), backend="reference")) < bound


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_is_silu_times_up_of_any_strides(backend, device):
    gate, up = (x.mT for x in inputs((2, 7, 5), device=device))
    torch.testing.assert_close(swiglu(gate, up, backend=backend), F.silu(gate) * up)


@pytest.mark.filterwarnings("ignore:overflow")  # of the interpreter: exp(1e4) is infinite, as it should be
def test_large_gates_stay_finite(device):
    gate, up = torch.tensor([[-1e4, 1e4, 0.0]], device=device), torch.tensor([[2.0, 2.0, 2.0]], device=device)
    assert swiglu(gate, up, backend="triton").tolist() == [[0.0, 2e4, 0.0]]


def test_refuses_what_it_cannot_compute(device):
    gate, up = inputs((2, 3, 4), device=device)
    with pytest.raises(ValueError, match=r"one shape, got \[2, 3, 4\] and \[1, 3, 4\]; pass both projections"):
        swiglu(gate, up[:1], backend="triton")
    with pytest.raises(ValueError, match=r"take bfloat16, float16 or float32, got torch\.float64"):
        swiglu(gate.double(), up.double(), backend="triton")
