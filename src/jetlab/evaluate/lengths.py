"""The same questions about longer contexts: plain text before or behind what is asked about.

What must be remembered stays, only the length grows, so that a model that fails fails on length and not on load (a
released model of this kind was measured to fail from 128K tokens on, HALO, arXiv:2601.22156).
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedModel

from jetlab.config import Tasks
from jetlab.evaluate.suite import Exam, Score
from jetlab.tasks import SCORED, build_tasks
from jetlab.tasks.base import Example, Task
from jetlab.tasks.text import paragraph

PLACES = ("before", "behind")


@dataclass(frozen=True)
class Stretched(Task):
    """`inner`, its context preceded or followed by about `n_characters` of plain text.

    "before": the text comes first, and what is asked about lies at its usual distance from the question; past the length of
    a training row, at positions never seen. "behind": the text stands between the two, and states must carry over it.
    """

    inner: Task
    n_characters: int
    place: str

    def __post_init__(self):
        if self.place not in PLACES:
            raise ValueError(f"place must be one of {', '.join(PLACES)}, got {self.place!r}")
        if self.n_characters < 0:
            raise ValueError(f"n_characters must be 0 or more, got {self.n_characters}")

    @property
    def name(self) -> str:
        return self.inner.name

    @property
    def metric(self) -> str:
        return self.inner.metric

    @property
    def objective(self) -> str | None:
        return self.inner.objective

    @property
    def chance(self) -> float:
        return self.inner.chance

    def draw(self, rng: random.Random, size: Callable[[int], int], *, worked: bool) -> Example:
        """Not drawn anew: the examples are those of `inner`."""
        raise NotImplementedError("a stretched task takes the examples of its inner task")

    def examples(self, split: str, n: int, seed: int, *, start: int = 0, **options) -> list[Example]:
        found = self.inner.examples(split, n, seed, start=start, **options)
        return [self._stretch(example, seed, index) for index, example in enumerate(found, start)]

    def _stretch(self, example: Example, seed: int, index: int) -> Example:
        if not self.n_characters:
            return example
        filler = ""
        rng = random.Random(f"filler {seed} {index}")
        while len(filler) < self.n_characters:
            filler += " " + paragraph(rng)
        filler = filler[: self.n_characters]
        context = f"<text>{filler} {example.context}" if self.place == "before" else f"{example.context} <text>{filler}"
        return Example(context, example.questions)


def over_lengths(
    models: dict[str, PreTrainedModel], tokenizer, tasks: Tasks, lengths: Sequence[int], n_contexts: int, seed: int
) -> dict[tuple[str, str, int], dict[str, Score]]:
    """(model, place, characters of filler) -> the scores of the scored tasks, `n_contexts` test contexts each."""
    found = {}
    for place in PLACES:
        for n_characters in lengths:
            stretched = [Stretched(build_tasks(tasks.sizes)[name], n_characters, place) for name in SCORED]
            paper = Exam(stretched, tokenizer, "test", n_contexts, seed, n_questions=tasks.n_questions)
            for name, model in models.items():
                found[name, place, n_characters] = paper.score(model)
    return found
