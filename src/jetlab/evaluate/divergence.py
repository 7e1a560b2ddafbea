"""How far an architecture is from its teacher on running text: what it lost of the language, without a question asked."""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
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


@torch.no_grad()
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
    Raises ValueError for a text of fewer than two tokens.
    """
    architectures = list(dict.fromkeys(map(tuple, architectures)))
    if any(len(text) < 2 for text in texts):
        raise ValueError(f"a text must have 2 tokens or more, got {min(map(len, texts))}; drop the short ones")
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    found: dict[LayerKinds, list[float]] = {kinds: [] for kinds in architectures}
    with branching(model, {tuple(teacher), *architectures}) as order:
        size = max(1, max_rows // len(order))
        for batch in (texts[at : at + size] for at in range(0, len(texts), size)):
            n_tokens = torch.tensor([len(text) for text in batch], device=device)
            T = int(n_tokens.max())
            ids = torch.tensor([[*text, *[0] * (T - len(text))] for text in batch], device=device)
            predicts = torch.arange(T, device=device) < n_tokens[:, None] - 1  # [n, T]; causal, so padding is not seen
            hidden = decoder(model)(input_ids=ids, use_cache=False).last_hidden_state.unflatten(0, (len(batch), -1))

            def log_p(kinds: LayerKinds, hidden=hidden):
                return model.lm_head(hidden[:, order.index(kinds)]).float().log_softmax(-1)  # [n, T, vocabulary]

            expected = log_p(tuple(teacher))
            for kinds, values in found.items():
                divergence = F.kl_div(log_p(kinds), expected, reduction="none", log_target=True).sum(-1)
                values += ((divergence * predicts).sum(1) / predicts.sum(1)).tolist()
    model.train(was_training)
    return {kinds: np.array(values) for kinds, values in found.items()}
