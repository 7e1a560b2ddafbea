"""A training step as one CUDA graph: the launches of a small model take longer than its work, and a replay has one.

Eight layers of width 64 make 5,300 launches a step: on an H100 49 to 67 ms one by one, 7 to 8 ms replayed at 13 rows of
128 tokens, and 13 to 15 at 104.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

N_WARMUP = 3  # steps before the capture, in which libraries allocate what a graph may not


@dataclass(frozen=True)
class FixedShapes:
    """A step in two halves, for `loop.fit`: on a GPU the second is captured and replayed.

    `inputs_at(step)` makes tensors on the CPU, of the same shapes at every step. `loss_of(*inputs)` is their loss on the
    device: it must not read a value on the host, and does the same work at every step. `log_at(step)` are numbers to log.
    """

    inputs_at: Callable[[int], tuple[Tensor, ...]]
    loss_of: Callable[..., Tensor]
    log_at: Callable[[int], dict[str, float]] = lambda step: {}


class Captured:
    """One step of `loss_of` with its gradients, clipping and the optimisers, captured at the shapes of `inputs`.

    Weights and optimiser states are after the capture what they were before it. The optimisers must be `capturable`,
    with learning rates held in tensors on the device, which may change between calls.
    """

    def __init__(
        self,
        loss_of: Callable[..., Tensor],
        inputs: Sequence[Tensor],
        parameters: Iterable[nn.Parameter],
        optimisers: Sequence[torch.optim.Optimizer],
        clip: float,
    ):
        self._parameters, self._optimisers, self._clip = list(parameters), optimisers, clip
        device = self._parameters[0].device
        self._inputs = [x.to(device) for x in inputs]
        self._loss_of = loss_of
        weights = [p.detach().clone() for p in self._parameters]
        states = {id(x): x.clone() for x in self._states()}
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(N_WARMUP):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._loss = self._step()
        with torch.no_grad():
            for parameter, weight in zip(self._parameters, weights, strict=True):
                parameter.copy_(weight)
            for state in self._states():
                state.copy_(states[id(state)]) if id(state) in states else state.zero_()

    def __call__(self, inputs: Sequence[Tensor]) -> Tensor:
        """Take the step on `inputs`; returns the loss before it."""
        for mine, given in zip(self._inputs, inputs, strict=True):
            mine.copy_(given)
        self._graph.replay()
        return self._loss.clone()

    def _step(self) -> Tensor:
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._loss_of(*self._inputs)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._parameters, self._clip)
        for optimiser in self._optimisers:
            optimiser.step()
        return loss.detach()

    def _states(self) -> list[Tensor]:
        found = [
            value for optimiser in self._optimisers for state in optimiser.state.values() for value in state.values()
        ]
        return [x for x in found if isinstance(x, Tensor)]
