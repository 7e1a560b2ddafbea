"""How far an architecture is from its teacher on rows of tokens, in predictions or in logits, without a question asked."""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from jetlab.models.prefixes import branching
from jetlab.models.surgery import LayerKinds, decoder
from jetlab.tasks import Task

# Rows of one forward. 37 placements and the teacher, 32 texts of 148 tokens at most on one core of an EPYC: 3.1, 3.0, 3.1,
# 3.5, 5.2 s at 40, 128, 256, 512, 1280 rows, and at most 0.45, 0.53, 0.63, 0.88, 1.4 GiB.
MAX_ROWS = 128


def token_rows(task: Task, tokenizer, split: str, n_contexts: int, seed: int) -> list[list[int]]:
    """One row of tokens for each example of `task`: its context, and the prompt and the answer of its first question."""
    examples = task.examples(split, n_contexts, seed)
    texts = [example.context + example.questions[0].prompt + example.questions[0].answer for example in examples]
    return [tokenizer(text, add_special_tokens=False).input_ids for text in texts]


def text_divergence(
    model,
    texts: Sequence[Sequence[int]],
    architectures: Iterable[LayerKinds],
    teacher: LayerKinds,
    *,
    max_rows: int = MAX_ROWS,
) -> dict[LayerKinds, np.ndarray]:
    """KL(teacher ‖ student) in nats a token, mean over the predicted tokens of each text -> {architecture: [n texts]}.

        1/(T − 1) · Σ_{t<T} Σ_v p(v | x_1 … x_t) · (log p(v | x_1 … x_t) − log q(v | x_1 … x_t))      p teacher, q student

    `texts` are rows of tokens of any lengths T ≥ 2. The teacher, all attention as a rule, is one more architecture of the
    same forward, which holds at most `max_rows` texts times architectures but one text at least.
    Raises ValueError for a text of fewer than two tokens, or if there is no text.
    """

    def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
        return F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)

    log_softmax = partial(torch.log_softmax, dim=-1)
    return _distances(model, texts, architectures, teacher, log_softmax, divergence, n_unread=1, max_rows=max_rows)


def logit_error(
    model,
    rows: Sequence[Sequence[int]],
    architectures: Iterable[LayerKinds],
    teacher: LayerKinds,
    *,
    max_rows: int = MAX_ROWS,
) -> dict[LayerKinds, np.ndarray]:
    """Mean squared error of the logits z against the teacher's, over all tokens of each row -> {architecture: [n rows]}.

        1/(T · V) · Σ_{t≤T} Σ_v (z_teacher(v | x_1 … x_t) − z_student(v | x_1 … x_t))²      V size of the vocabulary

    The distance by which Nemotron Nano 2 scores its layers (arXiv:2508.14444, Sec 4). Unlike a divergence it also counts
    what moves all logits of a token alike, which changes no prediction. `rows` are of any lengths T ≥ 1, the teacher and
    `max_rows` as in `text_divergence`. Raises ValueError for a row without tokens, or if there is no row.
    """

    def squared_error(expected: Tensor, logits: Tensor) -> Tensor:
        return (logits - expected).square().mean(-1)

    return _distances(model, rows, architectures, teacher, lambda z: z, squared_error, n_unread=0, max_rows=max_rows)


@torch.no_grad()
def _distances(
    model,
    rows: Sequence[Sequence[int]],
    architectures: Iterable[LayerKinds],
    teacher: LayerKinds,
    view: Callable[[Tensor], Tensor],
    distance: Callable[[Tensor, Tensor], Tensor],
    *,
    n_unread: int,
    max_rows: int,
) -> dict[LayerKinds, np.ndarray]:
    """The mean over the tokens of each row of a distance from the teacher, the last `n_unread` left out.

    `view` is what is compared, made of fp32 logits [n, T, vocabulary]; `distance` takes the teacher's and the student's
    and gives [n, T].
    """
    architectures, shortest = list(dict.fromkeys(map(tuple, architectures))), min(map(len, rows), default=None)
    if shortest is None:
        raise ValueError("a distance from the teacher is measured on rows of tokens, got none; give at least one")
    if shortest <= n_unread:
        raise ValueError(f"a row must have {n_unread + 1} tokens or more, got {shortest}; drop the short ones")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: dict[LayerKinds, list[float]] = {kinds: [] for kinds in architectures}
    with branching(model, {tuple(teacher), *architectures}) as order:
        size = max(1, max_rows // len(order))
        for batch in (rows[at : at + size] for at in range(0, len(rows), size)):
            n_tokens = torch.tensor([len(row) for row in batch], device=device)
            T = int(n_tokens.max())
            ids = torch.tensor([[*row, *[0] * (T - len(row))] for row in batch], device=device)
            # [n, T]; a model is causal, so no token that counts sees padding
            counts = torch.arange(T, device=device) < n_tokens[:, None] - n_unread
            hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state.unflatten(0, (len(batch), -1))

            def seen(kinds: LayerKinds, hidden=hidden) -> Tensor:
                return view(model.lm_head(hidden[:, order.index(kinds)]).float())

            expected = seen(tuple(teacher))
            for kinds, values in found.items():
                values += ((distance(expected, seen(kinds)) * counts).sum(1) / counts.sum(1)).tolist()
    model.train(was_training)
    return {kinds: np.array(values) for kinds, values in found.items()}
