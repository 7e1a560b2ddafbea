"""Patterns, a sub-axis of retrieval: records of two objects, a name, and a digit that says which object is the name's.

    <patterns> fox owl amber 2 cat eel kettle 1 … | amber -> owl

Where the value of a key stands depends on what is written beside it, within four tokens: the shape that a convolution
made from the input can read (JetBlock, Sec 2.4) and one fixed kernel cannot. Who finds the record and not the pattern is
right half of the time.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from jetlab.data import words
from jetlab.tasks.base import Example, Question, Task, passes

_QUESTIONS = 60  # enough to fill a training row


@dataclass(frozen=True)
class Patterns(Task):
    n_records: int  # records of a context at full difficulty, 2 … 64
    name = "patterns"
    objective = None

    def __post_init__(self):
        if not 2 <= self.n_records <= len(words.NAMES):
            raise ValueError(f"n_records must be 2 … {len(words.NAMES)} (names at hand), got {self.n_records}")

    @property
    def chance(self) -> float:
        return 1 / len(words.OBJECTS)

    def draw(self, rng: random.Random, size: Callable[[int], int], *, worked: bool) -> Example:
        context, records = "<patterns>", []
        for name in rng.sample(words.NAMES, size(self.n_records)):
            objects, digit = rng.sample(words.OBJECTS, 2), rng.choice((1, 2))
            context += f" {objects[0]} {objects[1]} {name} {digit}"
            records.append((name, objects[digit - 1]))
        asked = passes(rng, records, _QUESTIONS)
        return Example(context, tuple(Question(f" {name}", f" {obj}") for name, obj in asked))
