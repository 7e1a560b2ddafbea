"""Specification of products under a decay per channel, against the definition term by term."""

import pytest
import torch

from jetlab.ops.decay import decayed_products


def inputs(b, C, n, m, K, dtype=torch.float64):
    rng = torch.Generator().manual_seed(0)
    x, y = (torch.randn(b, C, count, K, generator=rng, dtype=torch.float64) for count in (n, m))
    g = -torch.rand(b, C, K, generator=rng, dtype=torch.float64)
    return [tensor.to(dtype) for tensor in (x, y, g)]


def definition(x, y, g):
    """Σ_d x_td y_sd exp(Σ_{s<r≤t} g_rd), every exponent summed for itself."""
    b, C, n, _ = x.shape
    P = x.new_zeros(b, n, y.shape[2], C, C)
    for t in range(C):
        for s in range(t + 1):
            fade = g[:, s + 1 : t + 1].sum(1).exp()
            P[..., t, s] = torch.einsum("bnd,bmd,bd->bnm", x[:, t], y[:, s], fade)
    return P


@pytest.mark.parametrize("C", [1, 2, 16])
@pytest.mark.parametrize(("n", "m"), [(1, 1), (2, 2), (3, 1)])
def test_products_equal_the_definition(C, n, m):
    tensors = inputs(2, C, n, m, 5)
    torch.testing.assert_close(decayed_products(*tensors), definition(*tensors), rtol=0, atol=1e-12)


def test_gradients_pass_gradcheck():
    assert torch.autograd.gradcheck(decayed_products, [x.requires_grad_() for x in inputs(1, 8, 2, 2, 3)])


@pytest.mark.parametrize("decay", [-80.0, -1e4, -torch.inf])
def test_no_decay_is_too_strong_for_fp32(decay):
    x, y, g = inputs(2, 32, 1, 1, 4)
    g[:, ::3] = decay
    actual = decayed_products(x.float(), y.float(), g.float())
    expected = definition(x, y, g)
    assert (actual - expected).abs().max() <= 1e-6 * expected.abs().max()
