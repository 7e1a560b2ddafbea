"""Specification of the Mamba2 step: three launches from the projections to the gated norm, the state moved once."""

import pytest
import torch
from compare import relative_error

from jetlab.ops import mamba2_step


def inputs(B, H, V, K, G, W, *, seed=0, device, dtype=torch.float32, state_dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)
    C = H * V + 2 * G * K

    def draw(*shape, dtype=dtype):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    # Views of one projection, as a layer has them, with NaN between.
    z, _, xbc, dt = torch.cat([draw(B, H * V), draw(B, 16) * torch.nan, draw(B, C), draw(B, H)], 1).split(
        [H * V, 16, C, H], dim=1
    )
    vectors = [draw(H, dtype=torch.float32), draw(H, dtype=torch.float32), draw(H), draw(H * V)]
    states = {"state": draw(B, H, V, K, dtype=state_dtype), "conv_state": draw(B, C, W - 1), "n_groups": G}
    return [xbc, z, dt, draw(C, W), draw(C), *vectors], states


def exact(tensors, states):
    double = lambda x: x.double() if isinstance(x, torch.Tensor) else x  # noqa: E731
    doubled = {name: double(x) for name, x in states.items()}
    return mamba2_step(*map(double, tensors), **doubled, backend="reference")


def compare(tensors, states):
    actual = mamba2_step(*tensors, **states, backend="triton")
    return [relative_error(x, y) for x, y in zip(actual, exact(tensors, states), strict=True)]


SHAPES = [
    pytest.param((1, 1, 16, 16, 1, 4), id="one-head"),
    pytest.param((3, 4, 20, 24, 2, 4), id="widths-no-powers-of-two"),
    pytest.param((2, 3, 80, 128, 3, 3), id="five-blocks-of-rows-three-taps"),
    pytest.param((1, 6, 5, 3, 2, 2), id="narrower-than-a-tile"),
    pytest.param((2, 2, 8, 16, 1, 1), id="one-tap-no-history"),
]


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape, device):
    for error in compare(*inputs(*shape, device=device)):
        assert error < 2e-6


def test_a_norm_may_have_other_groups_than_the_keys(device):
    tensors, states = inputs(2, 4, 8, 16, 2, 4, device=device)
    for error in compare(tensors, states | {"norm_groups": 1}):
        assert error < 2e-6
    by_group, whole = (exact(tensors, states | {"norm_groups": n})[0] for n in (2, 1))
    assert relative_error(whole, by_group) > 1e-2


def test_a_convolution_without_a_bias(device):
    tensors, states = inputs(2, 2, 8, 16, 1, 4, device=device)
    with_bias = exact(tensors, states)[0]
    tensors[4] = None
    assert relative_error(exact(tensors, states)[0], with_bias) > 1e-2
    for error in compare(tensors, states):
        assert error < 2e-6


def test_keeps_the_state_in_the_format_it_came_in(device):
    tensors, states = inputs(2, 2, 24, 40, 1, 4, device=device, state_dtype=torch.bfloat16)
    assert mamba2_step(*tensors, **states, backend="triton")[1].dtype == torch.bfloat16
    y, state, _ = compare(tensors, states)
    assert y < 2e-6  # the output is taken before the state is rounded
    assert 1e-4 < state < 5e-3


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_overwrites_the_states_only_when_told_to(backend, device):
    tensors, states = inputs(2, 2, 8, 16, 1, 4, device=device)
    before = [states[name].clone() for name in ("state", "conv_state")]
    y, *new = mamba2_step(*tensors, **states, backend=backend)
    assert torch.equal(states["state"], before[0]) and torch.equal(states["conv_state"], before[1])
    again, *same = mamba2_step(*tensors, **states, backend=backend, in_place=True)
    assert same[0] is states["state"] and same[1] is states["conv_state"]
    assert all(torch.equal(x, z) for x, z in zip((again, *same), (y, *new), strict=True))


def test_a_short_time_step_and_a_long_one_stay_finite(device):
    tensors, states = inputs(1, 2, 8, 16, 1, 4, device=device)
    for dt in (-200.0, 200.0):
        tensors[2] = torch.full_like(tensors[2], dt)
        for error in compare(tensors, states):
            assert error < 2e-6


def test_no_time_step_leaves_the_state_alone(device):
    tensors, states = inputs(2, 2, 8, 16, 1, 4, device=device)
    tensors[2] = torch.full_like(tensors[2], -1000.0)
    assert torch.equal(mamba2_step(*tensors, **states, backend="triton")[1], states["state"])


def test_refuses_what_it_cannot_compute(device):
    tensors, states = inputs(2, 2, 8, 16, 1, 4, device=device)
    with pytest.raises(ValueError, match=r"state must be \[2, 2, 8, 16\] .*got \[1, 2, 8, 16\]"):
        mamba2_step(*tensors, **states | {"state": states["state"][:1]}, backend="triton")
    with pytest.raises(ValueError, match=r"conv_state must be \[2, 48, 3\] .* 4 taps, got \[2, 48, 4\]"):
        mamba2_step(*tensors, **states | {"conv_state": torch.zeros(2, 48, 4, device=device)}, backend="triton")
    with pytest.raises(ValueError, match="n_groups must divide the heads, got 3 and 2"):
        mamba2_step(*tensors, **states | {"n_groups": 3}, backend="triton")
    with pytest.raises(ValueError, match="norm_groups must divide the channels of z, got 3 and 16"):
        mamba2_step(*tensors, **states | {"norm_groups": 3}, backend="triton")
    with pytest.raises(ValueError, match=r"take bfloat16, float16 or float32, got torch\.float64"):
        mamba2_step(*tensors, **states | {"state": states["state"].double()}, backend="triton")
    turned = states["state"].mT.contiguous().mT
    with pytest.raises(ValueError, match="a state to be overwritten must be contiguous"):
        mamba2_step(*tensors, **states | {"state": turned}, backend="triton", in_place=True)
    y, _, _ = mamba2_step(*tensors, **states | {"state": turned}, backend="triton")
    assert torch.equal(y, mamba2_step(*tensors, **states, backend="triton")[0])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="published widths take minutes under the interpreter")
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 128, 80, 128, 8, 4), (3, 128, 64, 128, 8, 4), (2, 64, 64, 256, 1, 4)])
def test_equals_the_definition_at_published_widths(shape, state_dtype, device):
    for seed in range(2):
        tensors, states = inputs(*shape, seed=seed, device=device, dtype=torch.bfloat16, state_dtype=state_dtype)
        for error in compare(tensors, states):
            assert error < 5e-3


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs programs one after another: no races")
@pytest.mark.parametrize("shape", [(64, 128, 80, 128, 8, 4), (64, 4, 8, 16, 2, 4)])
def test_in_place_repeats_to_the_bit(shape, device):
    tensors, states = inputs(*shape, device=device, dtype=torch.bfloat16)
    first = mamba2_step(*tensors, **states, backend="triton")
    for _ in range(50):
        fresh = states | {name: states[name].clone() for name in ("state", "conv_state")}
        again = mamba2_step(*tensors, **fresh, backend="triton", in_place=True)
        assert all(torch.equal(x, y) for x, y in zip(again, first, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="9 GB of states")
def test_places_beyond_two_to_the_31st_are_reached(device):
    tensors, states = inputs(1, 128, 80, 128, 8, 4, device=device, dtype=torch.bfloat16)
    expected, B = mamba2_step(*tensors, **states, backend="triton"), 1700
    tensors = [x.expand(B, -1) for x in tensors[:3]] + tensors[3:]
    wide = {name: states[name].expand(B, *states[name].shape[1:]).contiguous() for name in ("state", "conv_state")}
    found = mamba2_step(*tensors, **states | wide, backend="triton", in_place=True)
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x[-1], y[0])
