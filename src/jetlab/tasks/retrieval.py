"""Retrieval: pairs of a key and an object, then a key; its object is asked for (recall of key-value pairs).

    <retrieval> amber fox kettle owl … | kettle -> owl

The paper's axis is FDA, SWDE and SQuAD completion (Sec 3.1): find in the context what belongs to a key.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from jetlab.data import words
from jetlab.tasks.base import Example, Question, Task, passes

_QUESTIONS = 60  # enough to fill a training row


@dataclass(frozen=True)
class Retrieval(Task):
    n_pairs: int  # pairs in a context at full difficulty, at least 2 and at most as many as there are keys
    key_words: int  # 1: a key is one of 64 names; 2: a name and a relation, of which there are 256
    name = "retrieval"

    def __post_init__(self):
        if self.key_words not in (1, 2):
            raise ValueError(f"key_words must be 1 (a name) or 2 (a name and a relation), got {self.key_words}")
        if not 2 <= self.n_pairs <= len(self._keys):
            raise ValueError(
                f"n_pairs must be 2 … {len(self._keys)} (there are so many keys of {self.key_words} words), got "
                f"{self.n_pairs}"
            )

    @property
    def _keys(self) -> list[str]:
        return (
            words.NAMES if self.key_words == 1 else [f"{name} {rel}" for name in words.NAMES for rel in words.RELATIONS]
        )

    @property
    def chance(self) -> float:
        return 1 / len(words.OBJECTS)

    def draw(self, rng: random.Random, size: Callable[[int], int], *, worked: bool) -> Example:
        n = size(self.n_pairs)
        pairs = [(key, rng.choice(words.OBJECTS)) for key in rng.sample(self._keys, n)]
        context = "<retrieval>" + "".join(f" {key} {obj}" for key, obj in pairs)
        asked = passes(rng, pairs, _QUESTIONS)
        return Example(context, tuple(Question(f" {key}", f" {obj}") for key, obj in asked))
