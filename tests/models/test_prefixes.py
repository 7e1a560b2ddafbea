"""Specification of shared prefixes: the same outputs to the bit, for fewer layers."""

from itertools import combinations

import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2Config

from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.models.prefixes import by_prefix, reusing_prefixes

N_LAYERS = 4
CONFIG = Qwen2Config(
    vocab_size=50,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=N_LAYERS,
    num_attention_heads=4,
    num_key_value_heads=2,
    bos_token_id=None,
    eos_token_id=None,
)


def supernet(kind="gated_deltanet"):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG).eval()
    return surgery.wrap(model, kind, BlockDims(24, 2, 8, 8))


def architectures(kind="gated_deltanet"):
    placements = [full for k in range(3) for full in combinations(range(N_LAYERS), k)]
    return [tuple("attention" if i in full else kind for i in range(N_LAYERS)) for full in placements]


@torch.no_grad()
def read(model):
    """Two contexts, each answered in three continuations of one cache, as a scorer does: hidden states of every call."""
    outputs = []
    for seed in (1, 2):
        ids = torch.randint(50, (2, 9), generator=torch.Generator().manual_seed(seed))
        cache = surgery.HybridCache()
        outputs.append(model.model(input_ids=ids[:, :6], past_key_values=cache, use_cache=True).last_hidden_state)
        cache.batch_select_indices(torch.tensor([1, 0, 1]))
        later = ids[[1, 0, 1], 6:]
        outputs.append(model.model(input_ids=later, past_key_values=cache, use_cache=True).last_hidden_state)
    return outputs


@pytest.mark.parametrize("kind", ["gated_deltanet", "rwkv7"])  # layers of RWKV7 also share a value within a call
def test_outputs_are_those_of_each_architecture_alone_to_the_bit(kind):
    model = supernet(kind)
    expected = {}
    for kinds in architectures(kind):
        surgery.activate(model, kinds)
        expected[kinds] = read(model)
    with reusing_prefixes(model) as choose:
        for kinds in by_prefix(architectures(kind)):
            choose(kinds)
            assert all(map(torch.equal, read(model), expected[kinds])), kinds


def test_layers_below_the_first_difference_run_once():
    model, n_runs = supernet(), []
    for slot in surgery.slots(model):
        slot.register_forward_hook(lambda *_: n_runs.append(1))
    with reusing_prefixes(model) as choose:
        for kinds in by_prefix(architectures()):
            choose(kinds)
            read(model)
    prefixes = {kinds[:n] for kinds in architectures() for n in range(1, N_LAYERS + 1)}
    assert len(n_runs) == 4 * len(prefixes) < 4 * N_LAYERS * len(architectures())  # four calls each


def test_afterwards_the_model_computes_every_layer_again():
    model = supernet()
    with reusing_prefixes(model) as choose:
        choose(architectures()[0])
        before = read(model)
    with torch.no_grad():
        model.model.embed_tokens.weight.add_(1)
    assert not any(map(torch.equal, read(model), before))
