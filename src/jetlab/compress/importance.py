"""What a NemotronH needs least, from forward passes alone (arXiv:2508.14444, Sec 4).

Layers by the error that their removal leaves in the logits. MLP neurons, channels of the residual stream and Mamba heads by
the size of their activations, as Minitron (arXiv:2407.14679) and Minitron-SSM (arXiv:2504.11409) rank them.
Layers are numbered as in the whole model throughout; one that is removed is skipped, so that its input goes on unchanged.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM

from jetlab.compress.calibration import Calibration
from jetlab.models import nemotron
from jetlab.progress import progress

KINDS = ("mamba2", "mlp", "attention")
Aggregate = Literal["mean", "l2"]
ROWS_AT_ONCE = 8  # of a forward; a 12B at thousands of tokens wants 1


@dataclasses.dataclass(frozen=True)
class Removal:
    """One layer less, and the mean squared error of the logits against the whole model's that is left then."""

    layer: int
    error: float


@dataclasses.dataclass(frozen=True)
class Importance:
    """Scores to be compared within a tensor, larger is more important, fp32 on the CPU.

    `neurons` [d_ff] of each MLP layer, `channels` [d_model] of the residual stream, `heads` [H] of each Mamba2 layer.
    """

    neurons: dict[int, Tensor]
    channels: Tensor
    heads: dict[int, Tensor]


@contextmanager
def only(model: NemotronHForCausalLM, layers: Sequence[int]) -> Iterator[NemotronHForCausalLM]:
    """The model of these layers alone while the block lasts. No weight is copied; not for use with a cache."""
    whole = model.model.layers
    model.model.layers = nn.ModuleList(whole[layer] for layer in layers)
    try:
        yield model
    finally:
        model.model.layers = whole


@contextmanager
def _measuring(model: NemotronHForCausalLM) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


@torch.no_grad()
def logit_error(
    model: NemotronHForCausalLM, pruned: NemotronHForCausalLM, data: Calibration, *, rows_at_once: int = ROWS_AT_ONCE
) -> float:
    """1/(n·V) Σ over n real positions and V entries of the vocabulary of (z_model − z_pruned)², z the logits."""
    total, device = 0.0, next(model.parameters()).device
    for ids, real in data.batches(rows_at_once, device):
        total += _squared_error(_logits(pruned, real, input_ids=ids), _logits(model, real, input_ids=ids))
    return total / data.n_tokens


def _logits(model: NemotronHForCausalLM, real: Tensor, **inputs) -> Tensor:
    """Logits [n real positions, V] in fp32."""
    return model.lm_head(model.model(**inputs, use_cache=False).last_hidden_state[real]).float()


def _squared_error(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).square().mean(-1).sum(dtype=torch.float64))


def _errors_without(
    model: NemotronHForCausalLM, kept: Sequence[int], candidates: Sequence[int], data: Calibration, rows_at_once: int
) -> list[float]:
    """The error of `kept` less each candidate. What lies before a candidate is computed once for all of them."""
    errors = [0.0] * len(candidates)
    device = next(model.parameters()).device
    for ids, real in data.batches(rows_at_once, device):
        expected = _logits(model, real, input_ids=ids)
        entering: dict[int, Tensor] = {}
        with ExitStack() as stack:
            for layer in candidates:
                keep = partial(_keep_input, entering, layer)
                stack.enter_context(_removing(model.model.layers[layer].register_forward_pre_hook(keep)))
            stack.enter_context(only(model, kept))
            model.model(input_ids=ids, use_cache=False)
        for i, layer in enumerate(candidates):
            with only(model, kept[kept.index(layer) + 1 :]):
                errors[i] += _squared_error(_logits(model, real, inputs_embeds=entering.pop(layer)), expected)
    return [error / data.n_tokens for error in errors]


def _keep_input(held: dict[Any, Tensor], place: Any, _, args: tuple[Tensor, ...]) -> None:
    held[place] = args[0]


def _keep_output(held: dict[Any, Tensor], place: Any, _, args: tuple[Tensor, ...], output: Tensor) -> None:
    held[place] = output


@contextmanager
def _removing(handle) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


def single_removals(
    model: NemotronHForCausalLM, data: Calibration, *, rows_at_once: int = ROWS_AT_ONCE
) -> list[Removal]:
    """The one-layer map: what each layer's removal alone does to the logits, in the order of the layers.

    Raises ValueError for a model that is no NemotronH of Mamba2, MLP and attention.
    """
    layers = list(range(nemotron.shape_of(model.config).n_layers))
    with _measuring(model):
        errors = _errors_without(model, layers, layers, data, rows_at_once)
    return [Removal(layer, error) for layer, error in zip(layers, errors, strict=True)]


def remove_layers(
    model: NemotronHForCausalLM,
    data: Calibration,
    n: int,
    *,
    kinds: Sequence[str] = KINDS,
    first: Sequence[Removal] | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> list[Removal]:
    """`n` layers in the order in which they are given up: each time the one whose loss leaves the smallest error.

    The error is always against the whole model (Sec 4: one candidate at a time, mean squared error of the logits, the least
    harmful goes, repeat). `kinds` are those that may go: attention layers hold all of the KV cache, so a budget of memory
    may ask for them where the error alone would not. The last attention layer stays, since Transformers counts the tokens of
    a cache by one: without it a model could not generate. `first` is the one-layer map where it is known already, which
    saves the first of n rounds. Raises ValueError for an unknown kind, and for more layers than can go.
    """
    shape = nemotron.shape_of(model.config)
    if unknown := sorted(set(kinds) - set(KINDS)):
        raise ValueError(f"layers are of kinds {', '.join(KINDS)}, got {', '.join(unknown)}; leave it out")
    kept, removed = list(range(shape.n_layers)), []
    attention = {layer for layer in kept if shape.layer_kinds[layer] == "attention"}
    most = min(
        sum(kind in kinds for kind in shape.layer_kinds) - bool(attention and "attention" in kinds), shape.n_layers - 1
    )
    if not 0 <= n <= most:
        raise ValueError(
            f"of {shape.n_layers} layers 0 to {most} of kinds {', '.join(kinds)} can be removed, got {n}; "
            "one layer stays, of attention where there is any"
        )
    with _measuring(model), progress(n, "layers to remove") as bar:
        for turn in range(n):
            last = attention if len(attention) == 1 else set()
            left = [layer for layer in kept if shape.layer_kinds[layer] in kinds and layer not in last]
            if turn == 0 and first is not None:
                found = [removal for removal in first if removal.layer in left]
            else:
                errors = _errors_without(model, kept, left, data, rows_at_once)
                found = [Removal(layer, error) for layer, error in zip(left, errors, strict=True)]
            removed.append(min(found, key=lambda removal: (removal.error, removal.layer)))
            kept.remove(removed[-1].layer)
            attention.discard(removed[-1].layer)
            bar.update(1, error=removed[-1].error)
    return removed


class _Seen:
    """What one place of the model has held, entry by entry of the last dimension, over all real positions so far."""

    def __init__(self):
        self.means, self.squared_means, self.squares, self.n_rows, self.n_tokens = 0.0, 0.0, 0.0, 0, 0

    def add(self, a: Tensor, real: Tensor) -> None:
        a = a.float() * real[..., None]
        mean = a.abs().sum(1) / real.sum(1, keepdim=True)  # of |a| over the positions of a row
        self.means = self.means + mean.sum(0).cpu()
        self.squared_means = self.squared_means + mean.square().sum(0).cpu()
        self.squares = self.squares + a.square().sum((0, 1)).cpu()
        self.n_rows, self.n_tokens = self.n_rows + len(a), self.n_tokens + int(real.sum())

    def size(self, how: Aggregate) -> Tensor:
        return self.means / self.n_rows if how == "mean" else (self.squared_means / self.n_rows).sqrt()

    def mean_square(self) -> Tensor:
        return self.squares / self.n_tokens


def measure(
    model: NemotronHForCausalLM,
    data: Calibration,
    *,
    how: Aggregate = "l2",
    layers: Sequence[int] | None = None,
    rows_at_once: int = ROWS_AT_ONCE,
) -> Importance:
    """The importance of neurons, channels and heads in the model of `layers`, all by default; the others are skipped.

    With m_s the mean of |a| over the real positions of row s, a score is the mean over rows of m_s ("mean") or √(mean m_s²)
    ("l2", by which a row of large activations counts more). a is, for a neuron, what enters the second matrix of its MLP;
    for a channel, the outputs of the RMSNorms before all layers and before the logits, whose scores are summed. A Mamba head
    has the L2 norm over its channels of the root mean square over positions of x, its values as projected, before the
    convolution: heads are compared within a group, so that every group keeps as many (Minitron-SSM, nested).
    Raises ValueError for another aggregate, and for a model that is no NemotronH of Mamba2, MLP and attention.
    """
    if how not in ("mean", "l2"):
        raise ValueError(f"activations are aggregated by mean or l2, got {how!r}")
    shape, layers = (
        nemotron.shape_of(model.config),
        range(len(model.model.layers)) if layers is None else sorted(layers),
    )
    n_heads, inner = shape.linear.n_heads, shape.linear.n_heads * shape.linear.head_dim_v
    places: dict[tuple[str, int], nn.Module] = {("norm", shape.n_layers): model.model.norm_f}
    for layer in layers:
        block, kind = model.model.layers[layer], shape.layer_kinds[layer]
        places["norm", layer] = block.norm
        if kind != "attention":
            places[kind, layer] = block.mixer.down_proj if kind == "mlp" else block.mixer.in_proj
    seen = {place: _Seen() for place in places}
    held: dict[tuple[str, int], Tensor] = {}
    with _measuring(model), only(model, layers), ExitStack() as stack:
        for place, module in places.items():
            if place[0] == "mlp":
                handle = module.register_forward_pre_hook(partial(_keep_input, held, place))
            else:
                handle = module.register_forward_hook(partial(_keep_output, held, place))
            stack.enter_context(_removing(handle))
        for ids, real in data.batches(rows_at_once, next(model.parameters()).device):
            model.model(input_ids=ids, use_cache=False)
            for (what, layer), a in held.items():
                seen[what, layer].add(
                    a[..., inner : 2 * inner] if what == "mamba2" else a, real
                )  # x lies behind the gate z
            held.clear()
    of = {
        what: {layer: at for (found, layer), at in seen.items() if found == what} for what in ("norm", "mlp", "mamba2")
    }
    return Importance(
        neurons={layer: at.size(how) for layer, at in of["mlp"].items()},
        channels=torch.stack([at.size(how) for at in of["norm"].values()]).sum(0),
        heads={
            layer: at.mean_square().unflatten(0, (n_heads, -1)).sum(-1).sqrt() for layer, at in of["mamba2"].items()
        },
    )
