"""Specification of rotary positions in one launch: q and k of any strides, with the norm of their heads or without."""

import pytest
import torch
from compare import guarded, relative_error
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm, apply_rotary_pos_emb

from jetlab.ops import rotary

NORMS = pytest.mark.parametrize("normed", [False, True], ids=["plain", "normed"])
SHAPES = pytest.mark.parametrize(
    ("B", "T", "H", "HKV", "D"),
    [
        pytest.param(1, 1, 1, 1, 2, id="one-pair"),
        pytest.param(3, 1, 4, 2, 16, id="one-token-of-three-rows"),
        pytest.param(2, 5, 3, 1, 24, id="half-no-power-of-two"),
        pytest.param(1, 3, 2, 2, 6, id="as-many-key-heads"),
    ],
)


def inputs(B, T, H, HKV, D, normed, *, device, dtype=torch.float32):
    """q and k as a transposed projection has them, NaN around them; angles of two unequal halves."""
    rng = torch.Generator().manual_seed(0)
    q, k = (guarded(torch.randn(B, T, n, D, generator=rng).to(device, dtype)).transpose(1, 2) for n in (H, HKV))
    angle = 3 * torch.randn(B, T, D, generator=rng)
    weights = [torch.randn(D, generator=rng).to(device, dtype) if normed else None for _ in range(2)]
    return [q, k, angle.cos().to(device, dtype), angle.sin().to(device, dtype), *weights]


def turned(q, k, cos, sin, q_weight, k_weight, **options):
    return rotary(q, k, cos, sin, q_weight=q_weight, k_weight=k_weight, **options)


def exact(tensors, **options):
    return turned(*(None if x is None else x.double() for x in tensors), backend="reference", **options)


@NORMS
@SHAPES
def test_equals_the_definition(B, T, H, HKV, D, normed, device):
    tensors = inputs(B, T, H, HKV, D, normed, device=device)
    found = turned(*tensors, backend="triton", eps=1e-2)
    for x, y, given in zip(found, exact(tensors, eps=1e-2), tensors[:2], strict=True):
        assert x.shape == given.shape
        assert relative_error(x, y) < 1e-6  # fp32


@NORMS
@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_is_what_transformers_computes(normed, backend, device):
    q, k, cos, sin, *weights = inputs(2, 3, 4, 2, 8, normed, device=device)
    expected = [q, k]
    for i, weight in enumerate(weights if normed else []):
        norm = Qwen3RMSNorm(8, eps=1e-6).to(device)
        norm.weight.data = weight
        expected[i] = norm(expected[i])
    expected = apply_rotary_pos_emb(*expected, cos, sin)
    for x, y in zip(turned(q, k, cos, sin, *weights, backend=backend), expected, strict=True):
        torch.testing.assert_close(x, y.detach(), rtol=1e-5, atol=1e-6)  # fp32: the order of sums


@NORMS
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounds_once(normed, dtype, device):
    tensors = inputs(2, 3, 4, 2, 16, normed, device=device, dtype=dtype)
    for x, y in zip(turned(*tensors, backend="triton"), exact(tensors), strict=True):
        assert x.dtype == dtype
        cut = dtype == torch.bfloat16 and device.type == "cpu"  # the interpreter cuts bf16 off where a GPU rounds
        torch.testing.assert_close(x.double(), y, rtol=torch.finfo(dtype).eps * (1.01 if cut else 0.51), atol=1e-5)


def test_tensors_with_gaps_within_a_head_and_shared_angles(device):
    q, k, cos, sin, *weights = inputs(2, 3, 4, 2, 8, True, device=device)
    tensors = [
        q.repeat_interleave(2, -1)[..., ::2],
        k.mT.contiguous().mT,
        cos[:1].expand(2, -1, -1),
        sin[:1].expand(2, -1, -1),
    ]
    for x, y in zip(turned(*tensors, *weights, backend="triton"), exact([*tensors, *weights]), strict=True):
        assert relative_error(x, y) < 1e-6


def test_no_angle_changes_nothing_and_scores_depend_on_distance_alone(device):
    q, k, *_ = inputs(1, 1, 2, 2, 8, False, device=device)
    ones, frequency = torch.ones(1, 1, 8, device=device), torch.tensor([1.0, 0.3, 0.1, 0.01], device=device).repeat(2)

    def score(at_q, at_k):
        def turn(x, at):
            angle = at * frequency * ones
            return rotary(x, x, angle.cos(), angle.sin(), backend="triton")[0]

        return (turn(q, at_q) * turn(k, at_k)).sum(-1)

    for x, y in zip(rotary(q, k, ones, 0 * ones, backend="triton"), (q, k), strict=True):
        assert torch.equal(x, y)
    torch.testing.assert_close(score(17, 12), score(5, 0), rtol=1e-4, atol=1e-5)  # fp32 angles
    assert not torch.allclose(score(17, 12), score(17, 11), rtol=1e-2)


@pytest.mark.parametrize("backend", ["reference", "chunked", "triton"])
def test_refuses_what_it_cannot_compute(backend, device):
    q, k, cos, sin, *weights = inputs(2, 3, 4, 2, 8, True, device=device)
    with pytest.raises(ValueError, match=r"even number of channels, got 7; rotate an even part"):
        rotary(q[..., :7], k[..., :7], cos[..., :7], sin[..., :7], backend=backend)
    for name, wrong in (("k", k[:1]), ("cos", cos[:, :1]), ("sin", sin[:, None]), ("k_weight", weights[1][:4])):
        given = {"k": k, "cos": cos, "sin": sin, "q_weight": weights[0], "k_weight": weights[1]} | {name: wrong}
        with pytest.raises(
            ValueError, match=rf"{name} must be .* beside q \[2, 4, 3, 8\], got .*; pass heads before tokens"
        ):
            rotary(q, **given, backend=backend)


def test_the_kernel_refuses_fp64(device):
    tensors = [None if x is None else x.double() for x in inputs(1, 1, 1, 1, 4, False, device=device)]
    with pytest.raises(ValueError, match=r"take bfloat16, float16 or float32, got torch\.float64"):
        turned(*tensors, backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="published widths take minutes under the interpreter")
@pytest.mark.parametrize("B,T", [(1, 1), (64, 1), (2, 2048)])
@NORMS
def test_equals_the_definition_at_published_widths(B, T, normed, device):
    tensors = inputs(B, T, 32, 8, 128, normed, device=device, dtype=torch.bfloat16)
    for x, y in zip(turned(*tensors), exact(tensors), strict=True):
        assert relative_error(x, y) < 2.5e-3  # one rounding to bf16
