"""The word lists from which the tasks are built, and the fixed world of facts.

Every word here is one token of the bundled tokeniser (`jetlab.data.tokenizer`), with the space before it.
"""

import random
from functools import cache

NAMES = (
    "amber anchor anvil apron arrow basin basket beacon bell bench bottle bridge broom bucket button cabin candle canoe "
    "carpet castle chain chisel clock coin cradle crown cup drum fence ferry flute fork glove hammer harbour hat helmet "
    "hinge jar kettle key kite knife ladder lamp lantern mirror mitten needle oar oven paddle pearl piano pillow plough "
    "quilt ribbon saddle scarf spoon table trumpet wagon"
).split()

OBJECTS = (
    "adder badger bat bear beaver bee bison boar buffalo camel cat cod cow crab crane crow deer dingo dog dove duck eagle "
    "eel elk emu falcon ferret finch fox frog gecko goat goose hare hawk hen heron horse hyena jackal koala lark lemur "
    "lion llama lynx mole moose mouse otter owl panda pike pony rat raven robin seal sheep swan tiger trout wolf zebra"
).split()

RELATIONS = ("likes", "fears", "hides", "feeds")
DIGITS = tuple("0123456789")
LETTERS = tuple("ABCDEFGHIJKLMNOP")
SIGNS = ("?", "=", "+", "-", "is")
TAGS = ("<knowledge>", "<math>", "<retrieval>", "<code>", "<recency>", "<patterns>", "<chain>", "<facts>", "<text>")


@cache
def facts() -> dict[tuple[str, str], str]:
    """The world: (name, relation) -> object, 256 facts fixed for the whole study, each object named by four of them.

    A teacher learns them in training and holds them in its weights; no task states them in a context.
    """
    objects = [obj for obj in OBJECTS for _ in RELATIONS]
    random.Random("jetlab world").shuffle(objects)
    return dict(zip(((name, relation) for name in NAMES for relation in RELATIONS), objects, strict=True))


@cache
def subjects_of() -> dict[str, tuple[tuple[str, str], ...]]:
    """The inverse of `facts`: object -> the four (name, relation) pairs that lead to it."""
    pairs: dict[str, list[tuple[str, str]]] = {obj: [] for obj in OBJECTS}
    for subject, obj in facts().items():
        pairs[obj].append(subject)
    return {obj: tuple(found) for obj, found in pairs.items()}
