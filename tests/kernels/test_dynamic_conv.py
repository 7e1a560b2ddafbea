"""Specification of the dynamic convolution's kernels, which make each token's kernel where they weigh with it."""

import pytest
import torch
from compare import errors, guarded, outputs_and_gradients

from jetlab.ops import generated_conv

FP32 = 3e-6  # the order of sums
BF16 = 1e-2  # factors of products, and the gradient before the activation, are rounded to 8 bits


def inputs(B, T, C, R, W, *, state=True, documents=None, seed=0, device, dtype=torch.float32):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng).to(device, dtype)

    rows = B if documents is None else len(documents) - 1
    tensors = {
        "x": guarded(draw(B, T, C)),
        "hidden": guarded(draw(B, T, R)),
        "weight": draw(C * W, R) * R**-0.5,
        "bias": draw(C * W),
        "state": draw(rows, C, W - 1) if state else None,
    }
    cu_seqlens = None if documents is None else torch.tensor(documents, device=device)
    return tensors, {"activation": "silu", "cu_seqlens": cu_seqlens}, (draw(B, T, C), draw(rows, C, W - 1))


def compare(tensors, options, upstream):
    def run(dtype, backend):
        cast = {name: x if x is None or dtype is None else x.to(dtype) for name, x in tensors.items()}
        return outputs_and_gradients(lambda **x: generated_conv(**x, **options, backend=backend), cast, upstream)

    return errors(run(None, "triton"), run(torch.float64, "reference"))


CASES = [
    pytest.param((1, 1, 16, 16, 4), {}, id="single-token"),
    pytest.param((2, 3, 24, 5, 4), {}, id="shorter-than-the-history"),
    pytest.param((1, 130, 20, 24, 4), {"state": False}, id="two-tiles-of-tokens-from-zeros"),
    pytest.param((2, 127, 72, 70, 4), {}, id="ragged-everywhere"),
    pytest.param((1, 20, 16, 8, 1), {}, id="one-tap"),
    pytest.param((1, 40, 16, 8, 2), {}, id="two-taps"),
    pytest.param((1, 40, 16, 8, 3), {}, id="three-taps"),
    pytest.param((1, 40, 16, 8, 8), {}, id="eight-taps"),
    pytest.param((1, 140, 16, 8, 4), {"documents": [0, 1, 3, 40, 140]}, id="packed-documents"),
    pytest.param((1, 140, 16, 8, 4), {"documents": [0, 139, 140], "state": False}, id="packed-documents-from-zeros"),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_equals_the_definition_with_all_gradients(shape, options, device):
    for name, error in compare(*inputs(*shape, **options, device=device)).items():
        assert error < FP32, name


def test_without_an_activation(device):
    tensors, options, upstream = inputs(1, 20, 16, 8, 4, device=device)
    for name, error in compare(tensors, options | {"activation": None}, upstream).items():
        assert error < FP32, name


def test_takes_bf16(device):
    tensors, options, upstream = inputs(2, 70, 40, 24, 4, device=device, dtype=torch.bfloat16)
    for name, error in compare(tensors, options, upstream).items():
        assert error < BF16, name


def test_padding_changes_nothing(device):
    """A row padded left and right against the row alone; the inputs at padding are NaN, which nobody may read."""
    tensors, _, _ = inputs(1, 9, 16, 8, 4, device=device)
    n, (left, right) = 9, (4, 2)
    padded = {
        name: torch.nn.functional.pad(tensors[name], (0, 0, left, right), value=torch.nan if name == "x" else 0.0)
        for name in ("x", "hidden")
    }
    mask = torch.zeros(1, left + n + right, device=device)
    mask[:, left : left + n] = 1
    expected, expected_state = generated_conv(**tensors, activation="silu", backend="triton")
    actual, state = generated_conv(**tensors | padded, activation="silu", mask=mask, backend="triton")
    torch.testing.assert_close(actual[:, left : left + n], expected, atol=1e-6, rtol=1e-6)
    assert torch.equal(state, expected_state)


def test_padding_gets_and_gives_no_gradient(device):
    """Rows padded left, right and on both sides, with inputs from before them; nothing comes in at padding."""
    tensors, options, (dy, dstate) = inputs(4, 9, 16, 8, 4, device=device)
    options["mask"] = torch.ones(4, 9, device=device)
    for row, (left, right) in enumerate([(0, 8), (4, 0), (0, 3), (2, 5)]):
        options["mask"][row, :left] = options["mask"][row, 9 - right :] = 0
    dy = dy * options["mask"][..., None]
    for name, error in compare(tensors, options, (dy, dstate)).items():
        if name != "output 0":  # is not defined at padding
            assert error < FP32, name


def test_padding_in_front_of_a_row_knows_nothing_of_the_row_above(device):
    tensors, options, _ = inputs(2, 9, 16, 8, 4, device=device)
    options["mask"] = torch.ones(2, 9, device=device)
    options["mask"][1, :4] = 0
    x, state = tensors["x"].requires_grad_(), tensors["state"].requires_grad_()
    y, _ = generated_conv(**tensors | {"x": x, "state": state}, **options, backend="triton")
    dx, dstate = torch.autograd.grad(y[1, :4].sum(), (x, state))
    assert not dx.any() and not dstate.any()


@pytest.mark.parametrize("T", [1, 2])
def test_any_order_of_dimensions_in_memory_will_do(T, device):
    tensors, options, _ = inputs(3, T, 16, 8, 4, device=device)
    expected, _ = generated_conv(**tensors, **options, backend="reference")
    turned = {name: tensors[name].transpose(0, 1).contiguous().transpose(0, 1) for name in ("x", "hidden")}
    actual, _ = generated_conv(**tensors | turned, **options, backend="triton")
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


def test_a_split_with_carried_state_equals_one_call(device):
    tensors, _, _ = inputs(2, 12, 16, 8, 4, device=device)
    state = tensors.pop("state")
    expected, expected_state = generated_conv(**tensors, state=state, activation="silu", backend="triton")
    parts = []
    for start, end in ((0, 1), (1, 3), (3, 12)):
        cut = {name: tensors[name][:, start:end] for name in ("x", "hidden")}
        part, state = generated_conv(**tensors | cut, state=state, activation="silu", backend="triton")
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), expected)
    assert torch.equal(state, expected_state)


def test_refuses_what_it_cannot_compute(device):
    tensors, options, _ = inputs(1, 2, 8, 4, 9, device=device)
    with pytest.raises(ValueError, match="at most 8 taps, got 9"):
        generated_conv(**tensors, **options, backend="triton")
    tensors, options, _ = inputs(1, 2, 8, 4, 4, device=device)
    with pytest.raises(ValueError, match=r"hidden must be \[B, T, R\] with B, T = \[1, 2\]"):
        generated_conv(**tensors | {"hidden": tensors["hidden"][:, :1]}, **options)
    with pytest.raises(ValueError, match=r"weight must be \[C · W, R\]"):
        generated_conv(**tensors | {"weight": tensors["weight"][:-1]}, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="published widths take minutes under the interpreter")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((2, 1000, 3072, 384, 4), {"state": False}, id="jetblock-2b"),
        pytest.param((1, 513, 4096, 512, 4), {}, id="jetblock-4b"),
        pytest.param((2, 700, 1024, 128, 8), {}, id="eight-taps"),
        pytest.param((1, 2000, 3072, 384, 4), {"documents": [0, 1, 64, 500, 1999, 2000]}, id="packed"),
    ],
)
def test_equals_the_definition_at_published_widths(shape, options, seed, device):
    for dtype, bound in ((torch.bfloat16, BF16), (torch.float32, 1e-4)):
        for name, error in compare(*inputs(*shape, **options, seed=seed, device=device, dtype=dtype)).items():
            assert error < bound, (dtype, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs programs one after another: no races")
def test_repeats_to_the_bit(device):
    tensors, options, upstream = inputs(2, 1000, 3072, 384, 4, device=device, dtype=torch.bfloat16)

    def run():
        return outputs_and_gradients(lambda **x: generated_conv(**x, **options, backend="triton"), tensors, upstream)

    first = run()
    for _ in range(50):
        assert all(torch.equal(x, first[name]) for name, x in run().items())
