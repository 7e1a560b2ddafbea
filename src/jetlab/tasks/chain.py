"""Chain, a sub-axis of math: counters that start at a digit and are changed again and again; all states are asked for.

    <chain> amber 3 kettle 8 … kettle - 1 amber + 4 kettle + 5 amber + 2 … | ? amber -> 3 7 9        (modulo 10)

Each state follows from the one before and a change that stands somewhere in the context: state tracking. The states
between are part of the answer, as worked steps are in GSM8K.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

from jetlab.data import words
from jetlab.tasks.base import Example, Question, Task, passes

_QUESTIONS = 40  # enough to fill a training row


@dataclass(frozen=True)
class Chain(Task):
    n_names: int  # counters of a context at full difficulty, 2 … 64
    n_changes: int  # changes of each
    name = "chain"
    objective = None

    def __post_init__(self):
        if not 2 <= self.n_names <= len(words.NAMES):
            raise ValueError(f"n_names must be 2 … {len(words.NAMES)} (there are so many names), got {self.n_names}")
        if self.n_changes < 1:
            raise ValueError(f"n_changes must be at least 1, got {self.n_changes}; math has none")

    @property
    def chance(self) -> float:
        return 0.1 ** (1 + self.n_changes)  # each state is a digit

    def draw(self, rng: random.Random, size: Callable[[int], int], *, worked: bool) -> Example:
        states = {name: [rng.randrange(10)] for name in rng.sample(words.NAMES, size(self.n_names))}
        context = "<chain>" + "".join(f" {name} {found[0]}" for name, found in states.items())
        changed = [name for name in states for _ in range(self.n_changes)]
        rng.shuffle(changed)
        for name in changed:
            sign, digit = rng.choice("+-"), rng.randrange(1, 10)
            states[name].append((states[name][-1] + (digit if sign == "+" else -digit)) % 10)
            context += f" {name} {sign} {digit}"
        asked = passes(rng, list(states), _QUESTIONS)
        answers = {name: "".join(f" {state}" for state in found) for name, found in states.items()}
        return Example(context, tuple(Question(f" ? {name}", answers[name]) for name in asked))
