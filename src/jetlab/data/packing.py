"""From examples to rows of tokens: the questions of a context packed behind it, with the answers marked."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from jetlab.tasks import Example, Task


@dataclass(frozen=True)
class Batch:
    """`ids` [B, T]; `answer` [B, T], True where a token is to be predicted; `task` the task's name of each row."""

    ids: Tensor
    answer: Tensor
    task: tuple[str, ...]

    def to(self, device: torch.device | str) -> "Batch":
        return Batch(self.ids.to(device), self.answer.to(device), self.task)

    def targets(self) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Where to predict and what: (row·T + position of the token before, target ids, per task which of them are its).

        The first indexes hidden states flattened to [B · T, D]. Raises ValueError for a task without an answer.
        """
        row, column = torch.nonzero(self.answer, as_tuple=True)
        names = sorted(set(self.task))
        of_row = torch.tensor([names.index(name) for name in self.task], device=row.device)
        which = {name: torch.nonzero(of_row[row] == index)[:, 0] for index, name in enumerate(names)}
        if empty := [name for name, rows in which.items() if not len(rows)]:
            raise ValueError(
                f"each task needs an answer within a row of seq_len = {self.ids.shape[1]} tokens, {', '.join(empty)} has none "
                "in this batch; raise seq_len or make the contexts smaller"
            )
        return row * self.ids.shape[1] + column - 1, self.ids[row, column], which

    def weights(self, of_task: dict[str, float]) -> Tensor:
        """[B · T]: at the token before an answer's, the weight of its task (1 where not named) over the task's answer tokens.

        0 elsewhere. Σ weights · losses is Σ over tasks of weight · mean loss at the task's answers.
        """
        position, _, which = self.targets()
        weights = torch.zeros(self.ids.numel(), device=self.ids.device)
        for name, rows in which.items():
            weights[position[rows]] = of_task.get(name, 1.0) / len(rows)
        return weights


def pack(examples: Sequence[Example], tokenizer, seq_len: int, names: Sequence[str]) -> Batch:
    """One row an example: context, then prompt and answer of its questions, cut at `seq_len` tokens, padded on the right.

    A token belongs to an answer when its first character after the space does; offsets come from the tokeniser, so any
    fast tokeniser will do.
    """
    texts, marks = [], []
    for example in examples:
        parts = [(example.context, False)]
        for question in example.questions:
            parts += [(question.prompt, False), (question.answer, True)]
        texts.append("".join(text for text, _ in parts))
        marks.append(np.repeat([mark for _, mark in parts], [len(text) for text, _ in parts]))
    ids = torch.full((len(texts), seq_len), tokenizer.pad_token_id)
    answer = torch.zeros(len(texts), seq_len, dtype=torch.bool)
    for row, (encoding, mark) in enumerate(
        zip(tokenizer(texts, add_special_tokens=False).encodings, marks, strict=True)
    ):
        n = min(len(encoding.ids), seq_len)
        ids[row, :n] = torch.tensor(encoding.ids[:n])
        last = np.array([end - 1 for _, end in encoding.offsets[:n]])  # the last character: the first may be the space
        answer[row, :n] = torch.from_numpy(mark[last])
    answer[:, 0] = False  # nothing comes before the first token, so it cannot be predicted
    return Batch(ids, answer, tuple(names))


class Mixture:
    """Training rows, step by step: `rows[name]` rows of each task in every batch. Step n is the same in every run."""

    def __init__(self, tasks: dict[str, Task], rows: dict[str, int], tokenizer, seq_len: int, seed: int):
        unknown = sorted(set(rows) - set(tasks))
        if not rows:
            raise ValueError("rows must name a task to train on, got none; name one, or train on text")
        if unknown:
            raise ValueError(f"rows must name tasks among {', '.join(tasks)}, got {', '.join(unknown)}")
        self.tasks, self.rows, self.tokenizer, self.seq_len, self.seed = tasks, rows, tokenizer, seq_len, seed

    @property
    def tokens_per_step(self) -> int:
        return sum(self.rows.values()) * self.seq_len

    def batch(self, step: int, difficulty: float = 1.0) -> Batch:
        examples, names = [], []
        for name, n in self.rows.items():
            examples += self.tasks[name].examples("train", n, self.seed, start=step * n, difficulty=difficulty)
            names += [name] * n
        return pack(examples, self.tokenizer, self.seq_len, names)
