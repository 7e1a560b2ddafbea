"""Take layers and widths out of a NemotronH: the weights that stay are copied as they are (arXiv:2508.14444, Sec 4).

No weight is rescaled, as in Minitron. An RMSNorm divides by the root mean square over its channels, so over fewer channels
it divides by another number: where those that went were silent, its output shrinks by √(kept / all), likewise a Mamba2
layer's norm over the channels of a group when heads go. Distillation takes that up.
"""

import copy

import torch
from torch import Tensor, nn
from transformers import NemotronHForCausalLM

from jetlab.compress.budget import Budget, fits
from jetlab.compress.calibration import Calibration, random_rows
from jetlab.compress.importance import Aggregate, Importance, logit_error, measure, remove_layers
from jetlab.compress.search import Space, candidates, require_reachable, space_like_nano2
from jetlab.compress.target import Target, whole
from jetlab.models import nemotron
from jetlab.models.zoo import Shape

N_RANDOM_ROWS, RANDOM_SEQ_LEN = 8, 256  # of a calibration without text


def prune(
    model: NemotronHForCausalLM,
    budget: Budget,
    *,
    calibration: Calibration | None = None,
    space: Space | None = None,
    how: Aggregate = "l2",
    seed: int = 0,
    rows_at_once: int = 1,
) -> NemotronHForCausalLM:
    """A new model that fits the budget, by importance and logit error alone; distil it next (`distill.distill`).

    Layers are ordered by `remove_layers`; of the maximal targets of the space that fit (by default `space_like_nano2`), the
    one whose logits on the calibration rows have the smallest mean squared error against the model's is taken. Nano 2 ranks
    candidates by a distillation of each instead, as `study.compress` does. Without calibration rows the ids are drawn evenly
    from the vocabulary, seeded by `seed`: that shows the model nothing it was trained for, so give text where there is some.
    A model that fits as it is comes back as a copy.
    Raises BudgetTooSmall, naming the smallest size within reach, and ValueError for a model that is no NemotronH of Mamba2,
    MLP and attention.
    """
    shape = nemotron.shape_of(model.config)
    if calibration is None:
        calibration = random_rows(shape.vocab_size, N_RANDOM_ROWS, RANDOM_SEQ_LEN, seed)
    if fits(shape, budget):
        return apply(model, whole(shape), None)
    space = space or space_like_nano2(shape)
    require_reachable(shape, space, budget)
    order = [
        removal.layer for removal in remove_layers(model, calibration, space.n_removed[-1], rows_at_once=rows_at_once)
    ]
    of_layers: dict[tuple[int, ...], Importance] = {}
    best, least = None, float("inf")
    for candidate in candidates(shape, order, space, budget):
        layers = candidate.target.layers
        if layers not in of_layers:
            of_layers[layers] = measure(model, calibration, how=how, layers=layers, rows_at_once=rows_at_once)
        pruned = apply(model, candidate.target, of_layers[layers])
        error = logit_error(model, pruned, calibration, rows_at_once=rows_at_once)
        if error < least:
            best, least = pruned, error
    return best


def apply(model: NemotronHForCausalLM, target: Target, importance: Importance | None) -> NemotronHForCausalLM:
    """A new model of the target's layers with the most important neurons, channels and heads, in the order they had.

    Heads are chosen within each group, as many in all. Nothing is changed but what the model holds, so a target that removes
    nothing gives the same logits bit for bit; `importance` may be None then. Weights are copied one at a time in their own
    type and on their own device. Raises ValueError for a target that the model does not reach.
    """
    shape = nemotron.shape_of(model.config)
    pruned_shape = target.of(shape)
    if importance is None and target != Target(target.layers, *_widths(shape)):
        raise ValueError(f"narrowing to {target} needs the importance of what may go; importance.measure gives it")
    config = copy.deepcopy(model.config)
    config.hidden_size, config.intermediate_size = target.d_model, target.d_ff
    config.mamba_num_heads = target.n_mamba_heads
    config.layers_block_type = [nemotron.HF_TYPES[kind] for kind in pruned_shape.layer_kinds]
    with torch.device("meta"):
        pruned = NemotronHForCausalLM(config)
    pruned.load_state_dict(_weights(model, shape, target, importance), assign=True)
    pruned.generation_config = copy.deepcopy(model.generation_config)
    return pruned.train(model.training)


def _widths(shape: Shape) -> tuple[int, int, int]:
    return shape.d_model, shape.d_ff, shape.linear.n_heads


def _kept(scores: Tensor | None, n: int, n_all: int) -> Tensor | None:
    """The `n` indices of the largest scores, ascending; None for all. Of equal scores the first stay."""
    if n == n_all:
        return None
    return scores.argsort(descending=True, stable=True)[:n].sort().values


def _kept_heads(scores: Tensor | None, n: int, n_all: int, n_groups: int) -> Tensor | None:
    """As `_kept`, n / n_groups of each group: heads of a group read keys and queries together and are normed together."""
    if n == n_all:
        return None
    by_group = scores.unflatten(0, (n_groups, -1))
    inside = by_group.argsort(dim=1, descending=True, stable=True)[:, : n // n_groups].sort(dim=1).values
    return (inside + torch.arange(n_groups)[:, None] * (n_all // n_groups)).flatten()


def _spread(heads: Tensor | None, width: int) -> Tensor | None:
    """The channels of these heads of `width` channels each."""
    return None if heads is None else (heads[:, None] * width + torch.arange(width)).flatten()


def _joined(parts: list[tuple[Tensor | None, int]]) -> Tensor:
    """Indices into rows that hold several things one after the other: (those kept of it, None for all; its length)."""
    starts = torch.tensor([0, *(n for _, n in parts)]).cumsum(0)
    return torch.cat(
        [
            start + (torch.arange(n) if kept is None else kept)
            for start, (kept, n) in zip(starts[:-1], parts, strict=True)
        ]
    )


def _weights(
    model: NemotronHForCausalLM, shape: Shape, target: Target, importance: Importance | None
) -> dict[str, Tensor]:
    """The tensors of the pruned model. Each is named with what is kept along its first axes, None for all."""
    dims = shape.linear
    inner, shared = dims.n_heads * dims.head_dim_v, dims.n_groups * dims.head_dim
    channels = _kept(importance and importance.channels, target.d_model, shape.d_model)
    weights = {
        "model.embeddings.weight": _cut(model.model.embeddings.weight, None, channels),
        "model.norm_f.weight": _cut(model.model.norm_f.weight, channels),
        "lm_head.weight": _cut(model.lm_head.weight, None, channels),
    }
    for place, layer in enumerate(target.layers):
        block, kind = model.model.layers[layer], shape.layer_kinds[layer]
        cuts: dict[str, tuple[Tensor | None, ...]] = {"norm.weight": (channels,)}
        if kind == "mlp":
            scores = importance.neurons.get(layer) if importance else None
            neurons = _kept(scores, target.d_ff, shape.d_ff)
            cuts |= {"mixer.up_proj.weight": (neurons, channels), "mixer.down_proj.weight": (channels, neurons)}
        elif kind == "attention":
            cuts |= {f"mixer.{name}_proj.weight": (None, channels) for name in "qkv"}
            cuts |= {"mixer.o_proj.weight": (channels, None)}
        else:
            scores = importance.heads.get(layer) if importance else None
            heads = _kept_heads(scores, target.n_mamba_heads, dims.n_heads, dims.n_groups)
            values = _spread(heads, dims.head_dim_v)
            convolved = [(values, inner), (None, shared), (None, shared)]  # x, B, C
            projected = _joined([(values, inner), *convolved, (heads, dims.n_heads)])  # z before them, dt behind
            cuts |= {"mixer.in_proj.weight": (projected, channels), "mixer.out_proj.weight": (channels, values)}
            cuts |= {f"mixer.conv1d.{name}": (_joined(convolved),) for name in ("weight", "bias")}
            cuts |= {f"mixer.{name}": (heads,) for name in ("A_log", "D", "dt_bias")}
            cuts |= {"mixer.norm.weight": (values,)}
        weights |= {
            f"model.layers.{place}.{name}": _cut(block.get_parameter(name), *kept) for name, kept in cuts.items()
        }
    return weights


@torch.no_grad()
def _cut(weight: nn.Parameter, *kept: Tensor | None) -> Tensor:
    """A copy of what is kept along the first axes."""
    cut = weight.detach()
    for axis, index in enumerate(kept):
        if index is not None:
            cut = cut.index_select(axis, index.to(cut.device))
    return cut.clone() if cut.data_ptr() == weight.data_ptr() else cut
