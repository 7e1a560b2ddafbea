"""Training new paths in a frozen model: layer-local alignment, then feature distillation end to end (Sec 2.2, 3.1).

The model is its own teacher: with attention active in every layer it is the pretrained model, bit for bit, because
nothing that came with it trains. Which architecture a step trains is drawn from a law of paths.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jetlab.config import Training
from jetlab.data.packing import Batch, Mixture
from jetlab.models.surgery import LayerKinds, activate, decoder, freeze, recorded, slots
from jetlab.seeding import rng
from jetlab.train.captured import FixedShapes
from jetlab.train.loop import Resume, adamw, fit, merge
from jetlab.train.losses import distillation_loss, feature_loss, weighted_distillation_loss

Law = Callable[[int], LayerKinds]
"""From the number of a step to the architecture that it trains."""
LAWS = ("coin", "fixed_k", "up_to_k", "sandwich")


def placement_kinds(n_layers: int, full: tuple[int, ...], kind: str) -> LayerKinds:
    """The architecture with attention in the layers `full` and `kind` in all others."""
    outside = [layer for layer in full if not 0 <= layer < n_layers]
    if outside:
        raise ValueError(f"layers must be 0 … {n_layers - 1}, got {', '.join(map(str, outside))}")
    return tuple("attention" if layer in full else kind for layer in range(n_layers))


def path_law(name: str, n_layers: int, kind: str, max_full: int, seed: int) -> Law:
    """How a step draws the full layers of its path; k is `max_full`. The paper draws one path a step, its law is not printed.

    `coin`: each layer with probability k / n_layers, independently, so k on average. `fixed_k`: exactly k. `up_to_k`: a
    number uniform in 0 … k, then that many. `sandwich` (after the rule of slimmable networks, arXiv:1903.05134, one of its
    three a step instead of all): none, k, and up to k by turns. A coin that leaves no layer linear, so that nothing would
    train, is tossed again.
    Raises ValueError for another name, and for a k that is not below n_layers.
    """
    if name not in LAWS:
        raise ValueError(f"a law of paths must be one of {', '.join(LAWS)}, got {name!r}")
    if not 0 <= max_full < n_layers:
        raise ValueError(f"max_full must leave a layer linear, 0 … {n_layers - 1} of {n_layers} here, got {max_full}")

    def law(step: int) -> LayerKinds:
        draw = rng(seed, "path", step)
        match name:
            case "coin":
                full = range(n_layers)
                while len(full) == n_layers:
                    full = [layer for layer in range(n_layers) if draw.random() < max_full / n_layers]
            case "fixed_k":
                full = draw.sample(range(n_layers), max_full)
            case "up_to_k":
                full = draw.sample(range(n_layers), draw.randint(0, max_full))
            case "sandwich":
                full = draw.sample(range(n_layers), (0, max_full, draw.randint(0, max_full))[step % 3])
        return placement_kinds(n_layers, tuple(full), kind)

    return law


def fixed_law(kinds: LayerKinds) -> Law:
    """The same architecture at every step."""
    return lambda step: kinds


def forward(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Hidden states after the final norm, and those after every layer, each [B, T, D]; of the last layer both are normed."""
    out = decoder(model)(input_ids=ids, use_cache=False, output_hidden_states=True)
    return out.last_hidden_state, out.hidden_states[1:]


def difficulty(growing_steps: float, step: int) -> float:
    """Share of the full size that contexts reach at a step: min(1, 1/10 + step / growing_steps); 1 if those are 0."""
    return min(1.0, 0.1 + step / growing_steps) if growing_steps else 1.0


def train_paths(
    model: PreTrainedModel,
    mixture: Mixture,
    law: Law,
    training: Training,
    *,
    label: str,
    resume_key: object | None = None,
    measure: Callable[[int], dict[str, float]] | None = None,
) -> list[dict]:
    """Train the linear paths of a wrapped model; everything else stays as it is, to the bit. Returns the loss curve.

    First `n_local` steps per layer on its own: mean_l ‖y_l − a_l‖² / ‖a_l‖², with a_l the attention's output and y_l the
    path's, both on the teacher's input of that layer. Then `n_steps` steps of the architecture that `law` gives:
    `feature_weight` · mean_l ‖h_l − h_l^T‖² / ‖h_l^T‖² + `logit_weight` · Σ_tasks weight · KL(teacher ‖ student) at the
    answers, with h_l the hidden states after layer l, those of the last layer after the final norm (`forward`). A term of
    weight 0 is not computed. `measure(step)`, after logged steps end to end, adds to the curve. On a GPU steps are captured
    and replayed where each does the same work: the local ones, and the others under a law of a single architecture.
    With a `resume_key` a run that was killed goes on where it was.
    """
    n_local = training.n_local
    device = next(model.parameters()).device
    freeze(model)
    found = slots(model)
    all_full = tuple("attention" for _ in found)
    linear = [slot.linear for slot in found]
    model.train()

    def batch_at(step: int) -> Batch:
        return mixture.batch(n_local + step, difficulty(training.growth * training.n_steps, step))

    def tokens(step: int) -> dict[str, float]:
        return {"tokens": (n_local + step + 1) * mixture.tokens_per_step}

    def teacher(ids: Tensor):
        activate(model, all_full)
        with torch.no_grad(), recorded(model) as tape:
            return *forward(model, ids), list(tape)

    def local_loss(ids: Tensor) -> Tensor:
        _, _, tape = teacher(ids)
        pairs, shared = zip(linear, tape, strict=True), {}  # shared by the layers, as in a call of the model
        losses = [feature_loss(path(x, shared=shared)[0], y) for paths, (x, y) in pairs for path in paths.values()]
        return torch.stack(losses).mean()

    def path_loss(ids: Tensor, kinds: LayerKinds, answers: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        last_t, features_t, _ = teacher(ids)
        activate(model, kinds)
        last, features = forward(model, ids)
        loss = last.new_zeros(())
        if training.feature_weight:
            pairs = zip(features, features_t, strict=True)
            loss = loss + training.feature_weight * torch.stack([feature_loss(s, t) for s, t in pairs]).mean()
        if training.logit_weight:
            loss = loss + training.logit_weight * answers(last.flatten(0, 1), last_t.flatten(0, 1))
        return loss

    def local(step: int):
        return local_loss(mixture.batch(step).ids.to(device)), {}

    def end_to_end(step: int):
        batch = batch_at(step).to(device)

        def answers(last: Tensor, last_t: Tensor) -> Tensor:
            position, _, which = batch.targets()
            student, expected = (model.lm_head(h[position]) for h in (last, last_t))
            return distillation_loss(student, expected, which, training.weights)

        return path_loss(batch.ids, law(step), answers), tokens(step)

    def end_to_end_inputs(step: int) -> tuple[Tensor, Tensor]:
        batch = batch_at(step)
        return batch.ids, batch.weights(training.weights)

    def end_to_end_loss(ids: Tensor, weight: Tensor) -> Tensor:
        def answers(last: Tensor, last_t: Tensor) -> Tensor:
            return weighted_distillation_loss(model.lm_head(last), model.lm_head(last_t), weight)

        return path_loss(ids, law(0), answers)

    if device.type == "cuda":
        local = FixedShapes(lambda step: (mixture.batch(step).ids,), local_loss)
        if len({law(step) for step in range(training.n_steps)}) == 1:
            end_to_end = FixedShapes(end_to_end_inputs, end_to_end_loss, tokens)

    history, checkpoints = [], []
    for phase, loss_at, steps in (("local", local, n_local), ("end to end", end_to_end, training.n_steps)):
        resume = None if resume_key is None else Resume(f"{label}-{phase}".replace(" ", "-"), [resume_key, phase])
        optimiser = adamw((p for p in model.parameters() if p.requires_grad), training.learning_rate)
        part = fit(
            model.named_parameters(),
            [optimiser],
            loss_at,
            n_steps=steps,
            label=f"{label}, {phase}",
            warmup=training.warmup,
            measure=measure if phase == "end to end" else None,
            resume=resume,
        )
        history.append((phase, part))
        if resume is not None:
            resume.save(steps, {f"value.{name}": p for name, p in model.named_parameters() if p.requires_grad}, part)
            checkpoints.append(resume)
    for resume in checkpoints:
        resume.clear()
    model.eval()
    return merge(history)
