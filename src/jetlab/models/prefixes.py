"""Many architectures on the same inputs: layers below the first difference compute once.

Architectures that agree in their first n layers have the same hidden states there. Visited in the order of
`by_prefix`, each one computes only the layers behind the last agreement with the one before it: of all placements of
up to two full layers in eight, 128 layers instead of 296.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from jetlab.models.surgery import LayerKinds, activate, decoder


def by_prefix(architectures: Iterable[LayerKinds]) -> list[LayerKinds]:
    """Sorted so that those with a common beginning stand together."""
    return sorted(architectures)


@contextmanager
def reusing_prefixes(model: PreTrainedModel) -> Iterator:
    """Yields `choose(kinds)`, which activates an architecture and starts its sequence of forward calls.

    Within it every architecture must be given the same calls in the same order, each beginning a cache or continuing
    the one begun before. A layer whose own path and all paths below it are those of the architecture before returns
    what it returned then. What a continued cache holds behind the call is not kept: it is read and thrown away.
    """
    layers, call = decoder(model).layers, model._call
    memory: dict[tuple[int, int], tuple] = {}  # (call, layer): kinds up to the layer, output, state, what layers share
    now = {"kinds": (), "call": -1}

    def choose(kinds: LayerKinds) -> None:
        activate(model, kinds)
        now.update(kinds=tuple(kinds), call=-1)

    def remember(index: int, forward):
        def recall(hidden_states, *args, past_key_values=None, **kwargs):
            if index == 0:
                now["call"] += 1
            key, prefix = (now["call"], index), now["kinds"][: index + 1]
            known, output, state, shared = memory.get(key, ((), None, None, None))
            if known != prefix:
                begins = past_key_values is not None and past_key_values.n_seen == 0
                output = forward(hidden_states, *args, past_key_values=past_key_values, **kwargs)
                state = past_key_values.states[index] if begins else None
                memory[key] = prefix, output, state, dict(call.shared)
                return output
            call.shared.update(shared)
            if state is not None:
                past_key_values.states[index] = state
            return output

        return recall

    for index, layer in enumerate(layers):
        layer.forward = remember(index, layer.forward)
    try:
        yield choose
    finally:
        for layer in layers:
            del layer.forward  # the class's own shows again
