"""Specification of the batched Muon: torch's own, and what orthogonalising means."""

import pytest
import torch

from jetlab.train.muon import Muon, orthogonalised

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (8, 24), (8, 24)]


def start(draw):
    return [torch.randn(shape, generator=draw) for shape in SHAPES]


def trained(optimiser, n_steps=4, **options):
    draw = torch.Generator().manual_seed(0)
    weights = [torch.nn.Parameter(weight) for weight in start(draw)]
    chosen = optimiser(weights, lr=0.02, momentum=0.95, **options)
    for _ in range(n_steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=draw)
        chosen.step()
    return weights, chosen


@pytest.mark.parametrize(
    "options", [{"weight_decay": 0.0}, {"weight_decay": 0.1}, {"weight_decay": 0.0, "nesterov": False}], ids=str
)
def test_it_is_the_optimiser_of_torch(options):
    ours, expected = trained(Muon, **options), trained(torch.optim.Muon, **options)
    for a, b, before in zip(ours[0], expected[0], start(torch.Generator().manual_seed(0)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)  # of updates of 0.02 · √3 a step, orthogonalised in bf16
        assert (a - before).abs().max() > 0.01, "far beyond that tolerance"
    for a, b in zip(ours[0], expected[0], strict=True):
        torch.testing.assert_close(
            ours[1].state[a]["momentum_buffer"], expected[1].state[b]["momentum_buffer"], rtol=1e-6, atol=1e-7
        )


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 24, 8), (2, 8, 24)], ids=str)
def test_singular_values_go_to_one(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    found = torch.linalg.svdvals(orthogonalised(x, (3.4445, -4.7750, 2.0315), 5, 1e-7).float())
    assert torch.linalg.svdvals(x).max() > 4
    assert found.min() > 0.3 and found.max() < 1.3  # the quintic of Jordan et al. ends within about 0.7 … 1.2


def test_a_matrix_without_gradient_stays():
    weights = [torch.nn.Parameter(torch.ones(4, 4)), torch.nn.Parameter(torch.ones(4, 4))]
    weights[0].grad = torch.eye(4)
    Muon(weights, lr=0.1, weight_decay=0.0).step()
    assert not torch.equal(weights[0], torch.ones(4, 4)) and torch.equal(weights[1], torch.ones(4, 4))


def test_another_scaling_of_the_rate_is_refused_and_not_ignored():
    with pytest.raises(ValueError, match="adjust_lr_fn must be 'original' here, got 'match_rms_adamw'"):
        Muon([torch.nn.Parameter(torch.ones(4, 4))], lr=0.1, adjust_lr_fn="match_rms_adamw")
