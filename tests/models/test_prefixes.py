"""Specification of branching: the outputs of each architecture alone, from one forward that computes shared layers once."""

from itertools import combinations, product

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.models.prefixes import branching

DIMS = BlockDims(24, 2, 8, 8)
LENGTHS = (6, 3)  # tokens of a context, and of what is asked about it
OWNERS = torch.tensor([1, 0, 1])  # the contexts that are asked about


def supernet(kinds, n_layers=4, dtype=torch.float64):
    """A small decoder with a path of each of `kinds` beside its attention."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=50,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    paths = {}
    for kind in kinds:
        other = AutoModelForCausalLM.from_config(config)
        surgery.wrap(other, kind, DIMS, **({"window": 4} if kind == "sliding_attention" else {}))
        paths[kind] = [slot.paths[kind] for slot in surgery.slots(other)]
    surgery.attach(model)
    for kind, layers in paths.items():
        for slot, path in zip(surgery.slots(model), layers, strict=True):
            slot.paths[kind] = path
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)  # far from the start, where many maps give 0
    return model.to(dtype)


def placements(kind, n_layers=4):
    """All placements of up to two full layers."""
    full = [layers for k in range(3) for layers in combinations(range(n_layers), k)]
    return [tuple("attention" if i in layers else kind for i in range(n_layers)) for layers in full]


MIXTURE = list(product(["attention", "sliding_attention", "rwkv7"], repeat=4))


@torch.no_grad()
def read(model, padding=0):
    """Hidden states of two contexts and of three continuations from their cache, as a scorer reads them."""
    ids = torch.randint(50, (2, sum(LENGTHS)), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    how = {} if padding == 0 else {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    cache, known = surgery.HybridCache(), LENGTHS[0]

    def call(rows, columns):
        part = {name: x[rows, columns] for name, x in how.items()}
        seen = mask[rows, : columns.stop] if padding else None
        return model.model(
            input_ids=ids[rows, columns], attention_mask=seen, past_key_values=cache, use_cache=True, **part
        ).last_hidden_state

    context = call(slice(None), slice(0, known))
    cache.batch_select_indices(OWNERS)
    return context, call(OWNERS, slice(known, ids.shape[1]))


def assert_equals_each_alone(model, architectures, **how):
    expected = {}
    for kinds in architectures:
        surgery.activate(model, kinds)
        expected[kinds] = read(model, **how)
    with branching(model, architectures) as order:
        found = [x.unflatten(0, (-1, len(order))) for x in read(model, **how)]
    assert sorted(order) == sorted(expected)
    for p, kinds in enumerate(order):
        for actual, alone in zip(found, expected[kinds], strict=True):
            # fp64: products over more rows may sum in another order
            torch.testing.assert_close(actual[:, p], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("padding", [0, 2])
@pytest.mark.parametrize(
    ("kinds", "architectures"),
    [
        pytest.param(["gated_deltanet"], placements("gated_deltanet"), id="gated_deltanet"),
        pytest.param(["rwkv7"], placements("rwkv7"), id="rwkv7-shares-a-value-from-layers-of-different-depth"),
        pytest.param(["sliding_attention", "rwkv7"], MIXTURE, id="every-mixture-of-three"),
        pytest.param(["retnet"], placements("retnet")[:1], id="a-single-architecture"),
    ],
)
def test_each_architecture_has_the_outputs_that_it_has_alone(kinds, architectures, padding):
    assert_equals_each_alone(supernet(kinds), architectures, padding=padding)


def test_a_layer_is_evaluated_once_for_each_distinct_prefix():
    architectures = placements("gated_deltanet", n_layers=8)
    model, evaluated, calls = supernet(["gated_deltanet"], n_layers=8, dtype=torch.float32), [], []
    for layer in surgery.decoder(model).layers:
        layer.mlp.register_forward_hook(lambda _mlp, _x, y: evaluated.append(len(y)))
        for path in layer.self_attn.paths.values():
            path.register_forward_hook(lambda _path, _x, y: calls.append(len(y[0])))
    with branching(model, architectures):
        model.model(input_ids=torch.zeros(3, 5, dtype=torch.long))
    n_prefixes = len({kinds[:n] for kinds in architectures for n in range(1, 9)})
    assert n_prefixes == 128 and 8 * len(architectures) == 296
    assert sum(evaluated) == sum(calls) == 3 * n_prefixes < 3 * 296 / 2
    assert len(evaluated) == 8 and len(calls) == 16  # one call of each path, for all architectures


def test_afterwards_the_model_is_as_it_was():
    model = supernet(["gated_deltanet"])
    kinds = ("attention", "gated_deltanet") * 2
    surgery.activate(model, kinds)
    before = read(model)
    with pytest.raises(KeyError), branching(model, placements("gated_deltanet")):
        raise KeyError
    assert surgery.kinds_of(model) == kinds
    assert all(map(torch.equal, read(model), before))


def test_what_the_model_cannot_be_is_refused():
    model = supernet(["gated_deltanet"])
    before = surgery.kinds_of(model)
    with pytest.raises(ValueError, match="layer 0 has paths attention, gated_deltanet, not 'rwkv7'"):
        branching(model, [("rwkv7",) * 4]).__enter__()
    with pytest.raises(ValueError, match="at least one architecture"):
        branching(model, []).__enter__()
    assert surgery.kinds_of(model) == before
