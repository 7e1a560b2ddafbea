"""Specification of the inverse of unit lower triangular matrices."""

import pytest
import torch
from compare import relative_error

from jetlab_kernels.unit_lower import SIDE, invert


def exact(lower):
    identity = torch.eye(SIDE, dtype=torch.float64, device=lower.device).expand(lower.shape)
    return torch.linalg.solve_triangular(lower.double() + identity, identity, upper=False, unitriangular=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_equals_substitution_in_fp64(seed, device):
    lower = (0.3 * torch.randn(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))).tril(-1).to(device)
    assert relative_error(invert(lower, torch.float32), exact(lower)) < 2e-6


def test_stays_exact_where_powers_of_the_matrix_explode(device):
    """One key repeated at full strength: the inverse is 1 on the diagonal and -1 below, powers of L reach 1e17."""
    lower = torch.ones(1, SIDE, SIDE, device=device).tril(-1)
    expected = torch.eye(SIDE, device=device) - torch.eye(SIDE, device=device).roll(1, 0).tril(-1)
    torch.testing.assert_close(invert(lower, torch.float32)[0], expected, atol=1e-5, rtol=0)


def test_is_zero_above_the_diagonal(device):
    inverse = invert(torch.rand(1, SIDE, SIDE, device=device).tril(-1), torch.bfloat16)
    assert not inverse.triu(1).any()
