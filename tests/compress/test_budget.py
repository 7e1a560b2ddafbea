"""The memory model: the published shapes by hand, and a real cache."""

import dataclasses

import pytest
import torch
from transformers import DynamicCache

from jetlab.compress.budget import GIB, Budget, bytes_per_token, fits, largest_batch, nano2_budget, needed
from jetlab.inference import roofline
from jetlab.models import nemotron, zoo

LARGE = zoo.shape("NVIDIA-Nemotron-Nano-12B-v2-Base")
SMALL = zoo.shape("NVIDIA-Nemotron-Nano-9B-v2")


@pytest.mark.parametrize(
    ("shape", "n_params", "n_attention", "n_mamba2"),
    [pytest.param(LARGE, 12_310_001_152, 6, 28, id="12B"), pytest.param(SMALL, 8_888_227_328, 4, 27, id="9B")],
)
def test_the_published_models_at_128k_by_hand(shape, n_params, n_attention, n_mamba2):
    found = needed(shape, nano2_budget())
    assert found.weights == 2 * n_params
    assert found.kv_cache == n_attention * 2 * 8 * 128 * 131072 * 2
    assert found.states == n_mamba2 * 128 * 80 * 128 * 4
    assert found.conv == n_mamba2 * 4 * (128 * 80 + 2 * 8 * 128) * 2
    assert found.total == found.weights + found.kv_cache + found.states + found.conv


def test_the_budget_of_nano_2_is_why_it_has_9b_and_not_12b():
    budget = nano2_budget()
    assert round(budget.n_bytes / GIB, 2) == 19.66  # as the report prints it
    assert not fits(LARGE, budget) and fits(SMALL, budget)
    short = (needed(LARGE, budget).total - budget.n_bytes) / GIB
    left = (budget.n_bytes - needed(SMALL, budget).total) / GIB
    assert (round(short, 2), round(left, 2)) == (6.41, 0.97)


def test_a_model_fits_its_own_size_and_not_a_byte_less():
    budget = nano2_budget()
    exact = dataclasses.replace(budget, n_bytes=needed(SMALL, budget).total)
    assert fits(SMALL, exact) and not fits(SMALL, dataclasses.replace(exact, n_bytes=exact.n_bytes - 1))


def test_what_is_counted_is_what_a_cache_of_transformers_holds(small):
    model, n_tokens, batch = small("M-*M*"), 13, 3
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(torch.zeros(batch, n_tokens, dtype=torch.long), past_key_values=cache, use_cache=True)
    # The model is in fp32, so all have 4 bytes a value.
    found = needed(nemotron.shape_of(model.config), Budget(1, n_tokens, batch, 4, 4, 4))
    held = [vars(layer) for layer in cache.layers]
    keys = [layer[name] for layer in held for name in ("keys", "values") if layer.get(name) is not None]

    def states(name: str) -> int:
        return sum(x.nbytes for layer in held for x in (layer.get(name) or {}).values())

    assert found.weights == sum(p.nbytes for p in model.parameters())
    assert found.kv_cache == sum(x.nbytes for x in keys)
    assert (found.states, found.conv) == (states("recurrent_states"), states("conv_states"))


def test_traffic_is_the_roofline_and_the_columns_of_convolutions():
    budget = Budget(1, 4096, batch=8)
    columns = 2 * 27 * 4 * (128 * 80 + 2 * 8 * 128) * 2  # read and written
    assert bytes_per_token(SMALL, budget) == roofline.decode_bytes(SMALL, 4096, 8) / 8 + columns


def test_the_largest_batch_fits_and_one_more_does_not():
    budget = dataclasses.replace(nano2_budget(), context=8192)
    batch = largest_batch(SMALL, budget)
    assert batch > 1 and largest_batch(LARGE, budget) == 0
    assert fits(SMALL, dataclasses.replace(budget, batch=batch))
    assert not fits(SMALL, dataclasses.replace(budget, batch=batch + 1))
    assert largest_batch(SMALL, dataclasses.replace(budget, batch=5)) == batch


def test_a_budget_of_nothing_is_refused():
    with pytest.raises(ValueError, match="context of a budget must be positive, got 0"):
        Budget(10, context=0)


def test_a_model_of_mlps_has_no_largest_batch(small):
    with pytest.raises(ValueError, match="MLPs alone"):
        largest_batch(nemotron.shape_of(small("--").config), nano2_budget())
