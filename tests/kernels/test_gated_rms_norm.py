"""Specification of the gated norm's kernel: the layer's formula, and gradients of all three inputs."""

import pytest
import torch
from compare import errors, guarded, outputs_and_gradients

from jetlab.layers.norm import GatedRMSNorm
from jetlab_kernels.gated_rms_norm import gated_rms_norm


def reference(o, z, weight):
    norm = GatedRMSNorm(o.shape[-1], eps=1e-5)
    return (torch.func.functional_call(norm, {"weight": weight}, (o, z)),)


def compare(B, T, H, V, device, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    o, z, up = (torch.randn(B, T, H, V, generator=rng).to(device, dtype) for _ in range(3))
    weight = torch.randn(V, generator=rng).to(device)
    inputs = {"o": guarded(o), "z": guarded(z), "weight": weight}
    ours = outputs_and_gradients(lambda **x: (gated_rms_norm(**x),), inputs, (up,))
    exact = {name: x.double() for name, x in inputs.items()}
    return errors(ours, outputs_and_gradients(reference, exact, (up,)))


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 1, 16), id="one-row"),
        pytest.param((2, 3, 3, 40), id="width-no-power-of-two"),
        pytest.param((1, 150, 1, 5), id="more-rows-than-a-program-takes"),
    ],
)
def test_equals_the_layer_with_all_gradients(shape, device):
    for name, error in compare(*shape, device).items():
        assert error < 1e-6, name


def test_takes_bf16(device):
    for name, error in compare(2, 5, 2, 40, device, torch.bfloat16).items():
        assert error < 6e-3, name  # one rounding to 8 bits; the interpreter truncates


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="published widths take minutes under the interpreter")
@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("shape", [(2, 1000, 12, 256), (1, 700, 4, 288), (1, 33, 1, 576)])
def test_equals_the_layer_at_published_widths(shape, seed, device):
    for dtype, bound in ((torch.bfloat16, 4e-3), (torch.float32, 1e-5)):
        for name, error in compare(*shape, device, dtype, seed).items():
            assert error < bound, (dtype, name)
