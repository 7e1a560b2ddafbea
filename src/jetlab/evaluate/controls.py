"""What a trained hybrid loses when a part of it is switched off: is each path used, or only there?

A switched-off layer adds nothing to the residual stream (`zero`), or at every token the mean of what it adds on other
contexts (`mean`). The mean is the milder cut: it takes away what a layer says about its input and leaves what it always
says, so a loss under it cannot be blamed on activations of a size that later layers never met.
"""

from collections.abc import Iterable, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from jetlab.config import Tasks
from jetlab.evaluate.suite import Score, exam
from jetlab.models.surgery import recorded, slots
from jetlab.tasks import build_tasks

WAYS = ("zero", "mean")
N_MEAN_CONTEXTS = 8  # contexts of each task from which mean outputs are taken


@contextmanager
def silenced(model: PreTrainedModel, layers: Iterable[int], outputs: Mapping[int, Tensor] | None = None):
    """Within it each of `layers` gives `outputs[layer]` [D] at every token, zeros where None; afterwards all is as it was.

    Its states stay as they are, so with a cache and without one the model still computes the same. Raises ValueError for a
    layer that the model does not have.
    """
    found = slots(model)
    chosen = sorted(set(layers))
    if outside := [layer for layer in chosen if not 0 <= layer < len(found)]:
        raise ValueError(f"layers must be 0 … {len(found) - 1}, got {', '.join(map(str, outside))}")

    def constant(layer: int):
        def forward(x: Tensor, state=None, **_call):
            y = torch.zeros_like(x) if outputs is None else outputs[layer].to(x).expand_as(x)
            return y, state if state is not None else x.new_zeros(x.shape[0], 0)

        return forward

    paths = {layer: found[layer].paths[found[layer].active] for layer in chosen}
    try:
        for layer, path in paths.items():
            path.forward = constant(layer)  # of the path, because scoring many architectures takes the slot's own place
        yield
    finally:
        for path in paths.values():
            vars(path).pop("forward", None)  # the class's own shows again


@torch.no_grad()
def mean_outputs(model: PreTrainedModel, tokenizer, texts: Iterable[str]) -> dict[int, Tensor]:
    """layer -> the mean of its output over all tokens of `texts`, [D]."""
    sums: dict[int, Tensor] = {}
    n_tokens = 0
    device = next(model.parameters()).device
    for text in texts:
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids], device=device)
        with recorded(model) as tape:
            model.model(input_ids=ids, use_cache=False)
        for layer, (_, y) in enumerate(tape):
            sums[layer] = sums.get(layer, 0) + y[0].sum(0)
        n_tokens += ids.shape[1]
    return {layer: total / n_tokens for layer, total in sums.items()}


def parts(model: PreTrainedModel) -> dict[str, list[int]]:
    """The layers of each part that a control switches off: all linear ones, and all with attention."""
    attention = [i for i, slot in enumerate(slots(model)) if not slot.linear]
    return {"linear": [i for i in range(len(slots(model))) if i not in attention], "attention": attention}


def switched_off(
    model: PreTrainedModel, tokenizer, tasks: Tasks, seed: int, names: Iterable[str] | None = None
) -> dict[tuple[str, str], dict[str, Score]]:
    """(part, way) -> the score of every task, or of `names`, on split `test` with all layers of that part off in that way.

    Means are taken on split `search`, over contexts with their first question and its answer. A part without layers is
    left out.
    """
    examples = [e for task in build_tasks(tasks.sizes).values() for e in task.examples("search", N_MEAN_CONTEXTS, seed)]
    texts = [e.context + e.questions[0].prompt + e.questions[0].answer for e in examples]
    means = mean_outputs(model, tokenizer, texts)
    paper = exam(tasks, tokenizer, "test", seed, names)
    found = {}
    for part, layers in parts(model).items():
        for way in WAYS if layers else ():
            with silenced(model, layers, means if way == "mean" else None):
                found[part, way] = paper.score(model)
    return found
