"""The tasks by name: four scored families, three sub-axes and two controls, each a file with the protocol of base.py."""

from dataclasses import fields

from jetlab.tasks.base import SPLITS, Example, Question, Task, split_of
from jetlab.tasks.chain import Chain
from jetlab.tasks.code import Code
from jetlab.tasks.facts import Facts
from jetlab.tasks.knowledge import Knowledge
from jetlab.tasks.math import Math
from jetlab.tasks.patterns import Patterns
from jetlab.tasks.recency import Recency
from jetlab.tasks.retrieval import Retrieval
from jetlab.tasks.text import Text

TASKS: dict[str, type[Task]] = {
    task.name: task for task in (Knowledge, Math, Retrieval, Code, Recency, Patterns, Chain, Facts, Text)
}
SCORED = ("knowledge", "math", "retrieval", "code")  # what a search looks at
SUB_AXES = ("recency", "patterns", "chain")  # each asks one mechanism; reported, never searched for
CONTROLS = ("facts", "text")


def build_tasks(sizes: dict[str, dict]) -> dict[str, Task]:
    """The tasks of the study at the given sizes: `{"retrieval": {"n_pairs": 30}, …}`; controls need none.

    Raises ValueError for a name that is no task or a size that a task does not have, naming the known ones.
    """
    unknown = sorted(set(sizes) - set(TASKS))
    if unknown:
        raise ValueError(f"tasks must be among {', '.join(TASKS)}, got {', '.join(unknown)}")
    for name, task in TASKS.items():
        expected, given = {field.name: field.type for field in fields(task)}, sizes.get(name, {})
        if set(given) != set(expected):
            raise ValueError(
                f"sizes of {name} must be {', '.join(expected) or 'none'}, got {', '.join(given) or 'none'}"
            )
        for key, value in given.items():
            if expected[key] is int and not isinstance(value, int):
                raise ValueError(f"{name}.{key} must be a whole number, got {value!r}; round it")
    return {name: task(**sizes.get(name, {})) for name, task in TASKS.items()}


__all__ = [
    "CONTROLS",
    "SCORED",
    "SPLITS",
    "SUB_AXES",
    "TASKS",
    "Example",
    "Question",
    "Task",
    "build_tasks",
    "split_of",
]
