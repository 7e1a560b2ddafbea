"""A kernel beside its reference: random inputs inside guard rows, and errors relative to the reference's norm."""

import torch


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """‖actual - expected‖ / ‖expected‖ in fp64; infinite if a number is missing."""
    actual, expected = actual.double(), expected.double()
    error = (actual - expected).norm() / expected.norm().clamp_min(1e-30)
    return error.item() if error.isfinite() else float("inf")


def guarded(x: torch.Tensor) -> torch.Tensor:
    """x [B,T,…,X] as a view into a wider tensor with NaN around its rows: strides as of a joint projection's slice."""
    around = x.new_full((*x.shape[:2], 3, x[0, 0].numel()), torch.nan)
    around[:, :, 1] = x.flatten(2)
    return around[:, :, 1].view(x.shape)


def outputs_and_gradients(function, inputs: dict, upstream: tuple[torch.Tensor, ...]) -> dict[str, torch.Tensor]:
    """What `function(**inputs)` returns, and for each floating-point input the gradient of <outputs, upstream>."""
    leaves = {
        name: x.detach().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x
        for name, x in inputs.items()
    }
    outputs = function(**leaves)
    wanted = [name for name, x in leaves.items() if isinstance(x, torch.Tensor) and x.requires_grad]
    loss = sum((y * up.to(y.dtype)).sum() for y, up in zip(outputs, upstream, strict=True))
    gradients = torch.autograd.grad(loss, [leaves[name] for name in wanted])
    named = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": gradient for name, gradient in zip(wanted, gradients, strict=True)}


def errors(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> dict[str, float]:
    assert actual.keys() == expected.keys()
    return {name: relative_error(actual[name], expected[name]) for name in expected}
