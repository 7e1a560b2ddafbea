"""Losses of the study. All are means in nats, or pure numbers."""

import torch.nn.functional as F
from torch import Tensor


def answer_loss(logits: Tensor, target: Tensor, which: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Σ over tasks of weight · mean cross-entropy at the task's answer tokens, in nats.

    Each task has a mean of its own: pooled, a task with few answer tokens would get nothing of the gradient.
    logits [N, vocabulary], target [N], `which` the rows of each task.
    """
    losses = F.cross_entropy(logits.float(), target, reduction="none")
    return sum(weights.get(name, 1.0) * losses[rows].mean() for name, rows in which.items())


def distillation_loss(student: Tensor, teacher: Tensor, which: dict[str, Tensor], weights: dict[str, float]) -> Tensor:
    """Σ over tasks of weight · mean KL(teacher ‖ student) = Σ p_T (log p_T − log p_S) at the task's answer tokens, in nats."""
    divergence = F.kl_div(
        student.float().log_softmax(-1), teacher.float().log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    return sum(weights.get(name, 1.0) * divergence[rows].mean() for name, rows in which.items())


def weighted_distillation_loss(student: Tensor, teacher: Tensor, weight: Tensor) -> Tensor:
    """Σ weight · KL(teacher ‖ student), weight [N] at logits [N, vocabulary]: with `Batch.weights` the `distillation_loss`.

    The same sum in shapes that do not depend on how many answers a batch holds, as a captured step needs them.
    """
    student, teacher = student.float().log_softmax(-1), teacher.float().log_softmax(-1)
    return (weight * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)).sum()


def weighted_answer_loss(logits: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    """Σ weight · cross-entropy, in nats; weight, target [N]: with `Batch.weights` the `answer_loss`."""
    return (weight * F.cross_entropy(logits.float(), target, reduction="none")).sum()


def feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """‖s − t‖² / ‖t‖² over all tokens and channels: 0 is a perfect copy, 1 is as good as a zero output."""
    return (student - teacher).square().sum() / teacher.square().sum().clamp(min=1e-12)


def row_feature_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """`feature_loss` of each row of [B, T, D], and their mean: the same however the rows are spread over processes."""
    student, teacher = student.float(), teacher.float()
    return ((student - teacher).square().sum((1, 2)) / teacher.square().sum((1, 2)).clamp(min=1e-12)).mean()
