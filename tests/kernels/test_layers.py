"""Specification of the five blocks on backend "triton": the same mixers, at every way of being called."""

import pytest
import torch
from compare import relative_error

from jetlab.layers import MIXERS
from jetlab.layers.dims import BlockDims

DIMS = BlockDims(d_model=24, n_heads=2, head_dim=8, head_dim_v=16)
BLOCKS = [
    pytest.param("retnet", {}, id="retnet"),
    pytest.param("mamba2", {}, id="mamba2"),
    pytest.param("deltanet", {}, id="deltanet"),
    pytest.param("gated_deltanet", {}, id="gated_deltanet"),
    pytest.param("jetblock", {"random_start": True}, id="jetblock"),
    pytest.param(
        "jetblock", {"conv_q": "dynamic", "conv_k": "static", "random_start": True}, id="jetblock-more-convolutions"
    ),
    pytest.param("jetblock", {"conv_v": "static"}, id="jetblock-static"),
]
every_block = pytest.mark.parametrize(("kind", "options"), BLOCKS)


@pytest.fixture
def pair(kind, options, device):
    """The same block on both backends."""
    blocks = [
        MIXERS[kind](DIMS, backend=backend, **options, generator=torch.Generator().manual_seed(1))
        for backend in ("triton", "chunked")
    ]
    for block in blocks:
        for weight in block.parameters():  # no projection starts at zero
            torch.nn.init.normal_(
                weight, std=0.3, generator=torch.Generator().manual_seed(weight.numel())
            ) if weight.ndim > 1 else None
    return [block.to(device) for block in blocks]


def tokens(T, device, B=2):
    return torch.randn(B, T, DIMS.d_model, generator=torch.Generator().manual_seed(T)).to(device)


@every_block
def test_gives_outputs_states_and_gradients_of_the_chunked_form(pair, device):
    results = []
    for block in pair:
        x = tokens(70, device).requires_grad_()
        y, state = block(x)
        gradients = torch.autograd.grad(
            y.square().sum() + state.recurrent.sum(), [x, *block.parameters()], allow_unused=True
        )
        results.append([y, state.recurrent, *gradients])
    for actual, expected in zip(*results, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None and expected.any():
            assert relative_error(actual, expected) < 5e-5  # gradients through norms and gates add up the order of sums


@every_block
def test_decodes_from_a_prefilled_state(pair, device):
    x = tokens(20, device)
    ours, theirs = pair
    with torch.no_grad():
        expected, _ = theirs(x)
        y, state = ours(x[:, :17])
        parts = [y]
        for t in range(17, 20):
            y, state = ours(x[:, t : t + 1], state)
            parts.append(y)
    assert relative_error(torch.cat(parts, 1), expected) < 1e-5


@every_block
def test_padding_and_packing_change_nothing(pair, device):
    ours, theirs = pair
    x = tokens(12, device, B=1)
    mask = torch.ones(1, 12, device=device)
    mask[:, :3] = 0
    with torch.no_grad():
        assert relative_error(ours(x, mask=mask)[0][:, 3:], theirs(x, mask=mask)[0][:, 3:]) < 1e-5
        cuts = torch.tensor([0, 5, 6, 12], device=device)
        for actual, expected in zip(ours(x, cu_seqlens=cuts), theirs(x, cu_seqlens=cuts), strict=True):
            pairs = (
                [(actual, expected)] if isinstance(actual, torch.Tensor) else [(actual.recurrent, expected.recurrent)]
            )
            assert all(relative_error(a, b) < 1e-5 for a, b in pairs)


@pytest.mark.parametrize(("kind", "options"), [("gla", {}), ("rwkv7", {})])
def test_a_decay_per_channel_has_no_kernel_and_says_so(kind, options, device):
    block = MIXERS[kind](DIMS, backend="triton", **options).to(device)
    with pytest.raises(ValueError, match="use backend='chunked'"):
        block(tokens(3, device))


def test_a_step_of_the_published_block_is_one_launch_of_the_step_kernel(monkeypatch, device):
    from jetlab_kernels import jetblock_step

    calls = []
    kernel = jetblock_step.jetblock_step
    monkeypatch.setattr(jetblock_step, "jetblock_step", lambda *x, **options: calls.append(1) or kernel(*x, **options))
    block = MIXERS["jetblock"](DIMS, backend="triton").to(device)
    x = tokens(5, device)
    with torch.no_grad():
        _, state = block(x[:, :4])
        block(x[:, 4:], state)
    assert len(calls) == 1
