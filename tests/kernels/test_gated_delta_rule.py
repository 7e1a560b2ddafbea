"""Specification of the gated delta rule's kernels: equal to the definition in fp64, whatever shapes and strides."""

import pytest
import torch
from compare import errors, guarded, outputs_and_gradients
from torch.nn import functional as F

from jetlab.ops import gated_delta_rule, gated_linear_attention
from jetlab_kernels import MAX_HEAD_DIM, launch

FP32 = 5e-6  # the order of sums, and exponentials of summed decays
BF16 = 1.5e-2  # factors of products are rounded to 8 bits


def inputs(
    B, T, H, K, V, *, delta=True, gated=True, state=True, norm=True, documents=None, seed=0, device, dtype=torch.float32
):
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=rng).to(device)

    k = draw(B, T, H, K)
    tensors = {"q": draw(B, T, H, K), "k": k if norm or not delta else F.normalize(k, dim=-1), "v": draw(B, T, H, V)}
    tensors = {name: guarded(x.to(dtype)) for name, x in tensors.items()}
    tensors["g"] = -F.softplus(draw(B, T, H) - 1) if gated else None
    if delta:
        tensors["beta"] = torch.sigmoid(draw(B, T, H))
    rows = B if documents is None else len(documents) - 1
    tensors["state"] = draw(rows, H, K, V) if state else None
    options = {"qk_l2norm": norm, "cu_seqlens": None if documents is None else torch.tensor(documents, device=device)}
    upstream = draw(B, T, H, V), draw(rows, H, K, V)
    return tensors, options, upstream


def compare(tensors, options, upstream, backend="triton", op=None):
    op = op or (gated_delta_rule if "beta" in tensors else gated_linear_attention)

    def run(dtype, **how):
        # None stands for an absent input; a cast keeps the strides, so guards stay around the kernel's view.
        cast = {name: x if x is None or dtype is None else x.to(dtype) for name, x in tensors.items()}
        return outputs_and_gradients(lambda **x: op(**x, **options, **how), cast, upstream)

    return errors(run(None, backend=backend), run(torch.float64, backend="chunked"))


CASES = [
    pytest.param((1, 1, 1, 16, 16), {}, id="single-token"),
    pytest.param((1, 63, 2, 24, 40), {}, id="one-short-of-a-chunk-and-widths-no-powers-of-two"),
    pytest.param((2, 65, 1, 24, 40), {"state": False}, id="one-over-a-chunk-from-nothing"),
    pytest.param((1, 130, 1, 16, 72), {"gated": False}, id="no-decay-and-two-blocks-of-values"),
    pytest.param((1, 130, 1, 96, 16), {"norm": False}, id="key-width-96-normalised-outside"),
    pytest.param((2, 70, 1, 5, 3), {}, id="narrower-than-a-tile"),
    pytest.param((1, 131, 2, 8, 16), {"documents": [0, 1, 3, 66, 131]}, id="packed-documents"),
    pytest.param((1, 70, 1, 8, 16), {"documents": [0, 64, 70], "state": False}, id="packed-documents-from-nothing"),
    pytest.param((1, 65, 2, 24, 40), {"delta": False}, id="without-the-correction"),
    pytest.param((1, 70, 1, 16, 16), {"delta": False, "gated": False, "norm": False}, id="linear-attention"),
    pytest.param(
        (1, 131, 1, 8, 16), {"delta": False, "documents": [0, 1, 66, 131]}, id="packed-without-the-correction"
    ),
]


@pytest.mark.parametrize(("shape", "options"), CASES)
def test_equals_the_definition_with_all_gradients(shape, options, device):
    for name, error in compare(*inputs(*shape, **options, device=device)).items():
        assert error < FP32, name


@pytest.mark.parametrize("delta", [True, False])
def test_takes_bf16_and_keeps_the_state_in_fp32(delta, device):
    tensors, options, upstream = inputs(1, 70, 1, 24, 40, delta=delta, device=device, dtype=torch.bfloat16)
    for name, error in compare(tensors, options, upstream).items():
        assert error < BF16, name
    op = gated_delta_rule if delta else gated_linear_attention
    o, state = op(**tensors, **options, backend="triton")
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("T", [1, 2])
def test_any_order_of_dimensions_in_memory_will_do(T, device):
    """Rows in front of tokens, heads in front of both: a dimension of one token may have any stride."""
    tensors, options, _ = inputs(3, T, 2, 8, 16, device=device)
    expected, expected_state = gated_delta_rule(**tensors, **options, backend="reference")
    for order in ((1, 0, 2, 3), (0, 2, 1, 3), (2, 1, 0, 3)):
        back = tuple(order.index(i) for i in range(4))
        turned = {name: tensors[name].permute(order).contiguous().permute(back) for name in ("q", "k", "v")}
        o, state = gated_delta_rule(**tensors | turned, **options, backend="triton")
        torch.testing.assert_close(o, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(state, expected_state, atol=1e-5, rtol=1e-5)


def test_a_decay_that_is_no_number_shows(device):
    tensors, options, _ = inputs(1, 3, 1, 8, 16, device=device)
    tensors["g"][:, 1] = torch.nan
    o, _ = gated_delta_rule(**tensors, **options, backend="triton")
    assert o[:, 1:].isnan().all()


@pytest.mark.parametrize("low", [-80.0, -torch.inf])
def test_survives_resets(low, device):
    tensors, options, upstream = inputs(1, 130, 1, 8, 16, device=device)
    tensors["g"][:, [3, 40, 41, 64, 100]] = low
    if low == -torch.inf:  # the definition's gradient of g is 0 · inf there; every other is compared
        tensors["g"] = tensors["g"].clamp_min(-1e4)
    for name, error in compare(tensors, options, upstream).items():
        assert error < 5e-5, name  # sums of decays behind a reset lose two digits of fp32


def test_stays_exact_with_one_key_repeated_at_full_strength(device):
    tensors, options, upstream = inputs(1, 130, 1, 8, 16, gated=False, device=device)
    tensors["k"] = guarded(torch.ones(1, 130, 1, 8, device=device))
    tensors["beta"] = torch.ones(1, 130, 1, device=device)
    for name, error in compare(tensors, options, upstream).items():
        assert error < 1e-4, name  # 64 equal rows: cancellation, not divergence


def test_a_split_with_carried_state_equals_one_call(device):
    tensors, options, _ = inputs(2, 130, 1, 8, 16, device=device)
    state = tensors.pop("state")
    expected, expected_state = gated_delta_rule(**tensors, **options, state=state, backend="triton")
    parts = []
    for start, end in ((0, 100), (100, 101), (101, 130)):
        part, state = gated_delta_rule(
            **{name: x[:, start:end] for name, x in tensors.items()}, **options, state=state, backend="triton"
        )
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts, 1), expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(state, expected_state, atol=1e-5, rtol=1e-5)


def test_the_future_does_not_change_the_past(device):
    tensors, options, _ = inputs(1, 100, 1, 8, 16, device=device)
    before, _ = gated_delta_rule(**tensors, **options, backend="triton")
    for name in ("q", "k", "v", "g", "beta"):
        tensors[name][:, 70:] = -tensors[name][:, 70:].abs()
    after, _ = gated_delta_rule(**tensors, **options, backend="triton")
    assert torch.equal(after[:, :70], before[:, :70])
    assert not torch.equal(after[:, 70:], before[:, 70:])


def test_refuses_what_it_cannot_compute(device, monkeypatch):
    tensors, options, _ = inputs(1, 2, 1, 300, 16, device=device)
    with pytest.raises(ValueError, match=r"K ≤ 128 in torch.float32, got 300"):
        gated_delta_rule(**tensors, **options, backend="triton")
    tensors, options, _ = inputs(1, 2, 1, 8, 16, device=device, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"bfloat16, float16 or float32, got torch.float64"):
        gated_delta_rule(**tensors, **options, backend="triton")
    tensors, options, _ = inputs(1, 2, 1, 8, 16, delta=False, device=device)
    per_channel = tensors["g"][..., None].expand(1, 2, 1, 8)
    with pytest.raises(ValueError, match="one number per head"):
        gated_linear_attention(**tensors | {"g": per_channel}, **options, backend="triton")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    with pytest.raises(ValueError, match="run on a CUDA device, got tensors on cpu"):
        gated_linear_attention(**{name: x.cpu() for name, x in tensors.items()}, qk_l2norm=True, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="published widths take minutes under the interpreter")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(
    ("shape", "options"),
    [
        pytest.param((2, 1000, 12, 96, 256), {}, id="jetblock-2b"),
        pytest.param((1, 513, 16, 128, 256), {}, id="jetblock-4b"),
        pytest.param((1, 300, 4, 256, 288), {}, id="widest-of-the-study"),
        pytest.param((1, 300, 1, 256, 576), {"norm": False}, id="widest-taken"),
        pytest.param((2, 700, 8, 192, 192), {"gated": False}, id="deltanet"),
        pytest.param((2, 700, 48, 96, 64), {"delta": False, "norm": False}, id="mamba2"),
        pytest.param((2, 700, 16, 96, 192), {"delta": False, "norm": False}, id="retnet"),
        pytest.param((1, 2000, 4, 96, 256), {"documents": [0, 1, 64, 500, 1999, 2000]}, id="packed"),
    ],
)
def test_equals_the_definition_at_published_widths(shape, options, seed, device):
    for dtype, bound in ((torch.bfloat16, BF16), (torch.float16, 3e-3), (torch.float32, 1e-4)):
        if shape[3] <= MAX_HEAD_DIM[dtype]:
            for name, error in compare(*inputs(*shape, **options, seed=seed, device=device, dtype=dtype)).items():
                assert error < bound, (dtype, name)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="so many programs take minutes under the interpreter")
def test_takes_more_documents_than_a_grid_has_rows(device):
    documents = list(range(6001))
    for name, error in compare(*inputs(1, 6000, 12, 8, 16, documents=documents, device=device)).items():
        assert error < FP32, name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="the interpreter runs programs one after another: no races")
def test_repeats_to_the_bit(device):
    tensors, options, upstream = inputs(2, 1000, 12, 96, 256, device=device, dtype=torch.bfloat16)

    def run():
        return outputs_and_gradients(lambda **x: gated_delta_rule(**x, **options, backend="triton"), tensors, upstream)

    first = run()
    for _ in range(50):
        assert all(torch.equal(x, first[name]) for name, x in run().items())
