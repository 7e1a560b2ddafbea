"""Muon for a stack of equal layers: torch's update, with all matrices of one shape orthogonalised in the same products."""

from collections import defaultdict

import torch
from torch import Tensor


class Muon(torch.optim.Muon):
    """`torch.optim.Muon` in a fiftieth of the kernels: at d_model 128 and 16 layers its launches take longer than the model.

    B ← μ B + (1 − μ) G, then W ← W − lr √max(1, rows / columns) NS(μ B + (1 − μ) G), with NS five Newton-Schulz steps
    towards the nearest orthogonal matrix (Jordan et al. 2024). The state is that of `torch.optim.Muon`.
    Raises ValueError for another rule of scaling the rate (`adjust_lr_fn`), of which only the original is built here.
    """

    def __init__(self, params, **options):
        if options.get("adjust_lr_fn") not in (None, "original"):
            raise ValueError(
                f"adjust_lr_fn must be 'original' here, got {options['adjust_lr_fn']!r}; take torch's Muon"
            )
        super().__init__(params, **options)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            by_shape = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    by_shape[parameter.shape].append(parameter)
            for shape, parameters in by_shape.items():
                self._step_shape(group, shape, parameters)
        return loss

    def _step_shape(self, group: dict, shape: torch.Size, parameters: list[Tensor]) -> None:
        grads = [parameter.grad for parameter in parameters]
        buffers = [self.state[p].setdefault("momentum_buffer", torch.zeros_like(p)) for p in parameters]
        torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        towards = torch._foreach_lerp(grads, buffers, group["momentum"]) if group["nesterov"] else buffers
        update = orthogonalised(torch.stack(towards), group["ns_coefficients"], group["ns_steps"], group["eps"])
        rate = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5  # a tensor where a captured step reads it
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - group["lr"] * group["weight_decay"])
        torch._foreach_sub_(parameters, list((rate * update.to(parameters[0].dtype)).unbind()))


def orthogonalised(x: Tensor, coefficients: tuple[float, float, float], n_steps: int, eps: float) -> Tensor:
    """Newton-Schulz steps X ← a X + (b A + c A²) X with A = X Xᵀ from X / ‖X‖, in bf16; x [N, rows, columns]."""
    a, b, c = coefficients
    tall = x.shape[-2] > x.shape[-1]
    x = (x.mT if tall else x).bfloat16()
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=eps)
    for _ in range(n_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x
