"""Recency, a sub-axis of retrieval: pairs that no longer count, a sign, then the pairs that are asked for.

    <recency> amber fox kettle owl … = amber cat oar frog … | amber -> cat

The same names are bound before the sign, to other objects. A state that forgets at the sign has all its room for what
follows, which rewards a decay that depends on the input; one that cannot forget is full before the sign comes.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from jetlab.data import words
from jetlab.tasks.base import Example, Question, Task, passes

_QUESTIONS = 60  # enough to fill a training row


@dataclass(frozen=True)
class Recency(Task):
    n_pairs: int  # pairs behind the sign at full difficulty, 2 … 64
    n_distractors: int  # pairs before it
    name = "recency"
    objective = None

    def __post_init__(self):
        if not 2 <= self.n_pairs <= len(words.NAMES):
            raise ValueError(f"n_pairs must be 2 … {len(words.NAMES)} (there are so many names), got {self.n_pairs}")
        if self.n_distractors < 1:
            raise ValueError(f"n_distractors must be at least 1, got {self.n_distractors}; retrieval has none")

    @property
    def chance(self) -> float:
        return 1 / len(words.OBJECTS)

    def draw(self, rng: random.Random, size: Callable[[int], int], *, worked: bool) -> Example:
        n = size(self.n_pairs)
        n_before = max(1, round(self.n_distractors * n / self.n_pairs))
        before = [(name, rng.choice(words.OBJECTS)) for name in passes(rng, words.NAMES, n_before)[:n_before]]
        pairs = [(name, rng.choice(words.OBJECTS)) for name in rng.sample(words.NAMES, n)]
        first, last = ("".join(f" {name} {obj}" for name, obj in part) for part in (before, pairs))
        asked = passes(rng, pairs, _QUESTIONS)
        return Example(f"<recency>{first} ={last}", tuple(Question(f" {name}", f" {obj}") for name, obj in asked))
