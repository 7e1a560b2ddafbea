"""Short distillation of pruned models on the logits of the original (arXiv:2508.14444, Sec 4.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import NemotronHForCausalLM

from jetlab.data.packing import Mixture
from jetlab.train.distill import last_hidden
from jetlab.train.loop import adamw, fit
from jetlab.train.losses import distillation_loss


@dataclass(frozen=True)
class Lesson:
    """One step: `ids` [B, T], `position` of the tokens before an answer's in [B · T], which task each answer is of.

    `expected` [n answers, V] are the original's logits there.
    """

    ids: Tensor
    position: Tensor
    which: dict[str, Tensor]
    expected: Tensor


class Lessons:
    """Lessons of an original, by the number of the step. Each is made once and kept, for any number of students.

    Kept are n_steps · answers of a step · vocabulary numbers in the original's type.
    """

    def __init__(self, original: NemotronHForCausalLM, mixture: Mixture):
        self.original, self.mixture = original.eval(), mixture
        self._made: dict[int, Lesson] = {}

    def at(self, step: int) -> Lesson:
        if step not in self._made:
            batch = self.mixture.batch(step)
            position, _, which = batch.targets()  # before the move: on a GPU each look-up would wait for the device
            device = next(self.original.parameters()).device
            ids, position = batch.ids.to(device), position.to(device)
            with torch.no_grad():
                expected = self.original.lm_head(last_hidden(self.original, ids)[position])
            self._made[step] = Lesson(ids, position, {name: rows.to(device) for name, rows in which.items()}, expected)
        return self._made[step]


def distill(
    lessons: Lessons,
    students: Sequence[NemotronHForCausalLM],
    *,
    n_steps: int,
    learning_rate: float,
    warmup: int,
    weights: dict[str, float] | None = None,
    label: str = "distil",
) -> list[list[dict]]:
    """Train all weights of each student on the same lessons, alone and in turn; returns their loss curves.

    Σ_tasks weight · mean KL(original ‖ student) at the answer tokens, AdamW, the study's schedule. The report distils on the
    logits of all tokens. Our originals are trained on answers alone, so that what they predict elsewhere, in contexts drawn
    at random, is nothing that a student should learn. Students are trained in place, on the original's device, and end in
    evaluation mode. A student's weights do not depend on who is taught with it.
    Raises TrainingDiverged if a loss is not finite.
    """
    histories = []
    for number, student in enumerate(students, 1):
        student.requires_grad_(True).train()

        def loss_at(step: int, student=student):
            lesson = lessons.at(step)
            logits = student.lm_head(last_hidden(student, lesson.ids)[lesson.position])
            return distillation_loss(logits, lesson.expected, lesson.which, weights or {}), {}

        histories.append(
            fit(
                student.named_parameters(),
                [adamw(student.parameters(), learning_rate)],
                loss_at,
                n_steps=n_steps,
                warmup=warmup,
                label=label if len(students) == 1 else f"{label} {number} of {len(students)}",
            )
        )
        student.eval()
    return histories
