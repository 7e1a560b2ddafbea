"""Placement by gates that train together, all weights frozen, in the manner of FlashMorph (arXiv:2606.30562) and DASH
(arXiv:2605.20936).

    y_l = g_l · attention_l(x) + (1 − g_l) · linear_l(x)      g_l = σ((α_l − b) / τ)      b such that Σ_l g_l = budget

Only α trains, on the divergence from the teacher at the answers. FlashMorph presses the gates towards linear by a penalty
and takes the largest in the end; here b keeps the budget at every step, so that no penalty has to be weighed and a gate
rises only at the cost of others. The temperature τ falls from 1, which drives gates to 0 or 1, as a placement has them.
Where half of two layers does better than the whole of one, they may still end at halves, and the choice between the two
is then close to chance.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from jetlab.data.packing import Mixture
from jetlab.models.surgery import activate, blended, kinds_of, slots
from jetlab.train.loop import adamw, fit
from jetlab.train.losses import distillation_loss
from jetlab.train.paths import forward

BISECTIONS = 60  # of the bracket of b: below the resolution of float64


@dataclass(frozen=True)
class GateRun:
    """The gate of each layer at the end, the loss curve with every gate, and the tokens of the rows trained on."""

    gates: tuple[float, ...]
    budget: int
    history: list[dict]
    n_tokens: int

    @property
    def placement(self) -> tuple[int, ...]:
        """The `budget` layers with the largest gates, sorted; ties go to the smaller layers."""
        ranked = sorted(range(len(self.gates)), key=lambda layer: (-self.gates[layer], layer))
        return tuple(sorted(ranked[: self.budget]))


def gates_within(logits: Tensor, budget: float, temperature: float) -> Tensor:
    """σ((α_l − b) / τ) with b such that they sum to `budget`; α, gates [n_layers], 0 < budget < n_layers.

    b has its exact gradient ∂b/∂α_l = s_l / Σ s with s = g (1 − g), so ∂(Σ g)/∂α = 0.
    """
    with torch.no_grad():
        scaled = logits.double() / temperature
        alike = math.log(budget / (len(logits) - budget))  # what every gate's argument is when all are equal
        low, high = scaled.min() - alike, scaled.max() - alike  # there the sum is ≥ and ≤ the budget
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            above = (scaled - middle).sigmoid().sum() > budget
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        gates = (scaled - high).sigmoid()
        slope = gates * (high - scaled).sigmoid()  # g (1 − g), which 1 − g would lose near 1
        share = slope / slope.sum().clamp(min=torch.finfo(slope.dtype).tiny)  # ∂b/∂α
    moved = (logits.double() - logits.detach().double()) / temperature  # 0, and carries the gradient
    return (gates + slope * (moved - (share * moved).sum())).to(logits.dtype)


def train_gates(
    model: PreTrainedModel,
    mixture: Mixture,
    *,
    budget: int,
    linear: str,
    n_steps: int,
    learning_rate: float,
    weights: Mapping[str, float] | None = None,
    final_temperature: float = 0.1,
    warmup: int = 0,
    label: str = "gates",
) -> GateRun:
    """Train one gate a layer between attention and the path of kind `linear`; the objective is what `mixture` holds.

    Loss: Σ_tasks weight · KL(teacher ‖ student) at the answers, the teacher being attention in every layer. All gates start
    at budget / n_layers; τ falls geometrically to `final_temperature`. Deterministic; the model is left as it was.
    Raises ValueError for a budget that leaves no choice, a temperature outside (0, 1] or a path that a layer lacks.
    """
    n_layers = len(slots(model))
    if not 1 <= budget < n_layers:
        raise ValueError(f"budget must be 1 … {n_layers - 1} full layers so that there is a choice, got {budget}")
    if not 0 < final_temperature <= 1:
        raise ValueError(f"final_temperature must be in (0, 1], got {final_temperature}; 1 keeps the gates soft")
    if n_steps < 1:
        raise ValueError(f"n_steps must be at least 1, got {n_steps}")
    device = next(model.parameters()).device
    logits = nn.Parameter(torch.zeros(n_layers))  # on the CPU, where bisecting a few numbers is fastest

    def gates_at(step: int) -> Tensor:
        return gates_within(logits, budget, final_temperature ** (step / n_steps))

    def loss_at(step: int):
        batch = mixture.batch(step).to(device)
        position, _, which = batch.targets()

        def answers() -> Tensor:
            return model.lm_head(forward(model, batch.ids)[0].flatten(0, 1)[position])

        with torch.no_grad():
            teacher = answers()
        gates = gates_at(step)
        with blended(model, linear, gates.to(device)):
            student = answers()
        shown = {f"gate_{layer}": round(gate, 6) for layer, gate in enumerate(gates.tolist())}
        tokens = (step + 1) * mixture.tokens_per_step
        return distillation_loss(student, teacher, which, dict(weights or {})), {"tokens": tokens} | shown

    before = kinds_of(model), model.training, {p: p.requires_grad for p in model.parameters()}
    model.requires_grad_(False).eval()
    activate(model, ("attention",) * n_layers)
    try:
        optimiser = adamw([logits], learning_rate)
        history = fit([("gates", logits)], [optimiser], loss_at, n_steps=n_steps, label=label, warmup=warmup)
    finally:
        kinds, training, trained = before
        activate(model, kinds)
        model.train(training)
        for parameter, required in trained.items():
            parameter.requires_grad_(required)
    gates = tuple(gates_at(n_steps).tolist())
    return GateRun(gates, budget, history, n_steps * mixture.tokens_per_step)
