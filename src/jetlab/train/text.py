"""Training on text, on one process or many: the steps of the study with packed documents in place of tasks.

A step is `rows_per_step` rows, of which each process takes its own, `rows_at_once` at a time. Losses are means over the
tokens of a row, then over the rows of the step, so that the step does not depend on how many processes share it.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from jetlab.config import Text, Training
from jetlab.data.corpus import PackedCorpus, Row
from jetlab.models.surgery import LayerKinds, Shared, activate, freeze, on_documents, packed, recorded, slots
from jetlab.train.checkpoint import ShardedResume
from jetlab.train.loop import Accumulated, adamw, fit, merge
from jetlab.train.losses import row_feature_loss
from jetlab.train.paths import Law, forward
from jetlab.train.ranks import Ranks, shard

HEAD_TOKENS = 1024  # of which logits are alive at once: 0.6 GB in float32 at a vocabulary of 152 K


class Ahead:
    """The rows of a corpus, those of the next step made while this one trains."""

    def __init__(self, corpus: PackedCorpus):
        self._corpus, self._pool = corpus, ThreadPoolExecutor(1)
        self._next: tuple[int, Future] | None = None
        self._state = corpus.state_dict()

    def rows(self, step: int) -> list[Row]:
        """As `PackedCorpus.rows`."""
        number, future = self._next or (step, self._pool.submit(self._read, step))
        if number != step:
            raise ValueError(f"steps come one after the other, expected {number}, got {step}; use load_state_dict")
        rows, self._state = future.result()
        self._next = step + 1, self._pool.submit(self._read, step + 1)
        return rows

    def state_dict(self) -> dict:
        """Where the text stands behind the last rows that were handed out."""
        return self._state

    def load_state_dict(self, state: dict) -> None:
        if self._next is not None:
            self._next[1].result()  # the corpus is its own again
            self._next = None
        self._corpus.load_state_dict(state)
        self._state = self._corpus.state_dict()

    def close(self) -> None:
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _read(self, step: int) -> tuple[list[Row], dict]:
        return self._corpus.rows(step), self._corpus.state_dict()


def answer_losses(
    last: Tensor,
    expected: Tensor | None,
    head: nn.Module,
    expected_head: nn.Module | None,
    ids: Tensor,
    cu_seqlens: Tensor,
    label_weight: float = 0.0,
) -> Tensor:
    """(1 − w) · KL(teacher ‖ student) + w · cross-entropy of the next token, mean over a row's tokens, then rows, in nats.

    last, expected [B, T, D] are hidden states behind the final norm, ids [B, T]; w is `label_weight`; the last token of a
    document has nothing to predict. Logits are made for `HEAD_TOKENS` tokens at a time and again in the backward pass.
    """
    B, T = ids.shape
    asked = torch.ones(B * T, device=ids.device)
    asked[cu_seqlens[1:] - 1] = 0
    weight = (asked.view(B, T) / (B * asked.view(B, T).sum(1, keepdim=True).clamp(min=1))).flatten()
    target = F.pad(ids.flatten()[1:], (0, 1))
    last, expected = last.flatten(0, 1), None if expected is None else expected.flatten(0, 1)

    def part(last: Tensor, expected: Tensor | None, target: Tensor, weight: Tensor) -> Tensor:
        student = head(last).float().log_softmax(-1)
        loss = 0.0
        if label_weight < 1:
            with torch.no_grad():
                teacher = expected_head(expected).float().log_softmax(-1)
            loss = (1 - label_weight) * F.kl_div(student, teacher, reduction="none", log_target=True).sum(-1)
        if label_weight > 0:
            loss = loss + label_weight * F.nll_loss(student, target, reduction="none")
        return (loss * weight).sum()

    total = last.new_zeros((), dtype=torch.float32)
    for first in range(0, B * T, HEAD_TOKENS):
        here = slice(first, first + HEAD_TOKENS)
        theirs = None if expected is None else expected[here]
        total = total + checkpoint(part, last[here], theirs, target[here], weight[here], use_reentrant=False)
    return total


class PathStep(nn.Module):
    """The loss of rows [B, T] for the new paths of a wrapped model, as `paths.train_paths` defines it for tasks."""

    def __init__(self, model: PreTrainedModel, training: Training):
        super().__init__()
        self.model, self.training_ = model, training
        self._all_full = ("attention",) * len(slots(model))

    def forward(self, ids: Tensor, cu_seqlens: Tensor, kinds: LayerKinds | None) -> Tensor:
        """`kinds` names the architecture to train; None: each path on its own, on the teacher's input of its layer."""
        model, weights = self.model, self.training_
        activate(model, self._all_full)
        with torch.no_grad(), recorded(model) as tape:
            last_t, features_t = forward(model, ids)
        if kinds is None:
            shared, losses = Shared(), []
            for slot, (x, y) in zip(slots(model), tape, strict=True):
                for path in slot.linear.values():
                    losses.append(row_feature_loss(on_documents(path, x, cu_seqlens, shared), y))
            return torch.stack(losses).mean()
        activate(model, kinds)
        last, features = forward(model, ids)
        loss = last.new_zeros((), dtype=torch.float32)
        if weights.feature_weight:
            pairs = zip(features, features_t, strict=True)
            features = torch.stack([row_feature_loss(s, t) for s, t in pairs]).mean()
            loss = loss + weights.feature_weight * features
        if weights.logit_weight:
            head = model.lm_head
            loss = loss + weights.logit_weight * answer_losses(last, last_t, head, head, ids, cu_seqlens)
        return loss


class WeightsStep(nn.Module):
    """The loss of rows [B, T] for all weights of a hybrid: (1 − w) · KL(teacher ‖ hybrid) + w · next-token cross-entropy."""

    def __init__(self, model: PreTrainedModel, teacher: PreTrainedModel | None, label_weight: float):
        super().__init__()
        self.model, self.teacher, self.label_weight = model, teacher, label_weight

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        expected = head = None
        if self.teacher is not None:
            with torch.no_grad():
                expected, head = self.teacher.model(input_ids=ids, use_cache=False)[0], self.teacher.lm_head
        last = self.model.model(input_ids=ids, use_cache=False)[0]
        return answer_losses(last, expected, self.model.lm_head, head, ids, cu_seqlens, self.label_weight)


def laid_out(rows: Sequence[Row]) -> tuple[Tensor, Tensor]:
    """ids [B, T] of rows, and where documents begin when the rows are laid end to end, [N+1]."""
    T = len(rows[0].ids)
    begins = [row.cu_seqlens[:-1] + index * T for index, row in enumerate(rows)]
    return torch.stack([row.ids for row in rows]), torch.cat([*begins, torch.tensor([len(rows) * T])])


def accumulated(
    corpus: Ahead, ranks: Ranks, text: Text, models: list[PreTrainedModel], loss_of: Callable[..., Tensor], first: int
) -> Accumulated:
    """The steps of a phase that begins with step `first` of the corpus; `loss_of(step, ids, cu_seqlens)` is that of rows."""

    def losses_at(step: int) -> Iterator[Tensor]:
        rows = corpus.rows(first + step)
        for some in (rows[at : at + text.rows_at_once] for at in range(0, len(rows), text.rows_at_once)):
            ids, ends = (x.to(ranks.device) for x in laid_out(some))
            # FSDP takes the mean of the gradients over processes: what a process adds counts world_size times.
            scale = ranks.world_size * len(some) / text.rows_per_step
            with ExitStack() as documents:  # still open in the backward pass, which computes activations again
                for model in models:
                    documents.enter_context(packed(model, ends))
                yield loss_of(step, ids, ends) * scale

    def tokens(step: int) -> dict[str, float]:
        return {"tokens": (first + step + 1) * text.tokens_per_step}

    return Accumulated(losses_at, ranks.mean, tokens)


def train_paths_on_text(
    model: PreTrainedModel,
    corpus: PackedCorpus,
    law: Law,
    training: Training,
    text: Text,
    ranks: Ranks,
    folder: Path,
    *,
    label: str,
) -> list[dict]:
    """`paths.train_paths` on text: the new paths of a wrapped model, everything else frozen. Returns the loss curve.

    A row's distance of hidden states is that of all its tokens, its KL the mean over them. `folder` holds the checkpoints,
    from which a run that was killed goes on, also with another number of processes.
    """
    freeze(model)
    model.train()
    step = PathStep(model, training)
    shard(step, [model], ranks, precision=text.precision, recompute=text.recompute)
    ahead = Ahead(corpus)
    history, n_local = [], training.n_local
    phases = (("local", n_local, 0, lambda _: None), ("end to end", training.n_steps, n_local, law))
    for phase, n_steps, first, kinds_at in phases:
        parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        resume = ShardedResume(folder / phase.replace(" ", "-"), parameters, ahead, ranks, every=text.checkpoint_steps)

        def loss_of(number: int, ids: Tensor, ends: Tensor, kinds_at=kinds_at) -> Tensor:
            return step(ids, ends, kinds_at(number))

        part = fit(
            parameters.items(),
            [adamw(parameters.values(), training.learning_rate, capturable=False)],
            accumulated(ahead, ranks, text, [model], loss_of, first),
            n_steps=n_steps,
            label=f"{label}, {phase}",
            warmup=training.warmup,
            resume=resume,
        )
        history.append((phase, part))
        resume.save(n_steps, {f"value.{name}": p for name, p in parameters.items()}, part)
    ahead.close()
    return merge(history)


def train_weights_on_text(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    corpus: PackedCorpus,
    text: Text,
    ranks: Ranks,
    folder: Path,
    *,
    n_steps: int,
    learning_rate: float,
    warmup: int,
    label: str,
) -> list[dict]:
    """All weights of a hybrid on `WeightsStep`'s loss (stage 2, Sec 3.1); `teacher` None where labels alone count."""
    model.requires_grad_(True).train()
    models = [model]
    if teacher is not None:
        teacher.requires_grad_(False).eval()
        models.append(teacher)
    step = WeightsStep(model, teacher, text.stage2_label_weight)
    shard(step, models, ranks, precision=text.precision, recompute=text.recompute)
    ahead = Ahead(corpus)
    parameters = dict(model.named_parameters())
    resume = ShardedResume(folder / "weights", parameters, ahead, ranks, every=text.checkpoint_steps)
    history = fit(
        parameters.items(),
        [adamw(parameters.values(), learning_rate, capturable=False)],
        accumulated(ahead, ranks, text, models, lambda _, ids, ends: step(ids, ends), 0),
        n_steps=n_steps,
        label=label,
        warmup=warmup,
        resume=resume,
    )
    resume.save(n_steps, {f"value.{name}": p for name, p in parameters.items()}, history)
    ahead.close()
    return history
