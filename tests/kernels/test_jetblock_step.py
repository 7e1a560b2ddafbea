"""Specification of the JetBlock's step: one launch from the projections to the gated norm."""

import pytest
import torch
from compare import relative_error

from jetlab.ops import jetblock_step


def inputs(B, H, K, V, W, *, seed=0, device, dtype=torch.float32, state_dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    def sliced(*shape):
        """A view whose rows stand apart, with NaN between them."""
        wide = torch.cat(
            [draw(shape[0], 1, *shape[1:]), torch.full((shape[0], 1, *shape[1:]), torch.nan).to(device, dtype)], 1
        )
        return wide[:, 0]

    tensors = [
        sliced(B, H, K),
        sliced(B, H, K),
        sliced(B, H, V),
        sliced(B, H * V, W),
        sliced(B, H),
        sliced(B, H),
        sliced(B, H, V),
    ]
    parameters = [draw(H, dtype=torch.float32), draw(H, dtype=torch.float32), draw(V, dtype=torch.float32)]
    states = {"state": draw(B, H, K, V, dtype=state_dtype), "conv_state": draw(B, H * V, W - 1)}
    return tensors + parameters, states


def compare(tensors, states):
    expected = jetblock_step(
        *(x.double() for x in tensors), **{name: x.double() for name, x in states.items()}, backend="reference"
    )
    return [
        relative_error(x, y) for x, y in zip(jetblock_step(*tensors, **states, backend="triton"), expected, strict=True)
    ]


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 16, 16, 4), id="one-head"),
        pytest.param((3, 2, 24, 40, 4), id="widths-no-powers-of-two"),
        pytest.param((2, 1, 96, 130, 3), id="three-blocks-of-values-three-taps"),
        pytest.param((1, 2, 5, 3, 2), id="narrower-than-a-tile"),
        pytest.param((1, 2, 8, 16, 1), id="one-tap-no-history"),
    ],
)
def test_equals_the_definition(shape, device):
    for error in compare(*inputs(*shape, device=device)):
        assert error < 1e-6


def test_keeps_the_state_in_the_format_it_came_in(device):
    tensors, states = inputs(2, 2, 24, 40, 4, device=device, state_dtype=torch.bfloat16)
    assert jetblock_step(*tensors, **states, backend="triton")[1].dtype == torch.bfloat16
    y, state, _ = compare(tensors, states)
    assert y < 1e-6  # the output is taken before the state is rounded
    assert state < 5e-3


def test_overwrites_the_state_only_when_told_to(device):
    tensors, states = inputs(2, 2, 8, 16, 4, device=device)
    before = states["state"].clone()
    _, new, _ = jetblock_step(*tensors, **states, backend="triton")
    assert torch.equal(states["state"], before)
    _, same, _ = jetblock_step(*tensors, **states, backend="triton", in_place=True)
    assert same is states["state"]
    assert torch.equal(same, new)


def test_a_closed_gate_and_a_wide_open_one_stay_finite(device):
    tensors, states = inputs(1, 2, 8, 16, 4, device=device)
    for a in (-200.0, 200.0):
        tensors[4] = torch.full_like(tensors[4], a)
        for error in compare(tensors, states):
            assert error < 1e-6


def test_refuses_what_it_cannot_compute(device):
    tensors, states = inputs(2, 2, 8, 16, 4, device=device)
    with pytest.raises(ValueError, match=r"state must be \[2, 2, 8, 16\] .*got \[1, 2, 8, 16\]"):
        jetblock_step(*tensors, **states | {"state": states["state"][:1]}, backend="triton")
    with pytest.raises(ValueError, match=r"kernels must be \[2, 32, 4\]"):
        jetblock_step(*tensors[:3], tensors[3][:, :-1], *tensors[4:], **states, backend="triton")
    turned = states["state"].transpose(1, 2).contiguous().transpose(1, 2)
    with pytest.raises(ValueError, match="to be overwritten must be contiguous"):
        jetblock_step(*tensors, **states | {"state": turned}, backend="triton", in_place=True)
    y, _, _ = jetblock_step(*tensors, **states | {"state": turned}, backend="triton")
    assert torch.equal(y, jetblock_step(*tensors, **states, backend="triton")[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="published widths take minutes under the interpreter")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128, 12, 96, 256, 4), (3, 16, 128, 256, 4), (2, 4, 256, 288, 4)])
def test_equals_the_definition_at_published_widths(shape, state_dtype, device):
    for seed in range(4):
        tensors, states = inputs(*shape, seed=seed, device=device, dtype=torch.bfloat16, state_dtype=state_dtype)
        for error in compare(tensors, states):
            assert error < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs programs one after another: no races")
@pytest.mark.parametrize("shape", [(128, 12, 96, 256, 4), (64, 4, 8, 16, 4)])
def test_in_place_repeats_to_the_bit(shape, device):
    tensors, states = inputs(*shape, device=device, dtype=torch.bfloat16)
    first = jetblock_step(*tensors, **states, backend="triton")
    for _ in range(50):
        again = jetblock_step(*tensors, **states | {"state": states["state"].clone()}, backend="triton", in_place=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))
