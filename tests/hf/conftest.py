"""Small Jet-Nemotron models for the tests: every layer kind, weights away from their special starting values, fp64."""

import pytest
import torch

from jetlab.hf import JetNemotronConfig, JetNemotronForCausalLM
from jetlab.layers import MIXERS

VOCAB = 48
WINDOW = 4
LINEAR_KINDS = [kind for kind in MIXERS if kind not in ("attention", "sliding_attention")]
# A linear layer first, because a cache must know its length even so, and two of a kind, because RWKV7 hands values on.
MIXTURES = {kind: [kind, "attention", "sliding_attention", kind] for kind in LINEAR_KINDS}
MIXTURES["all-linear"] = LINEAR_KINDS
MIXTURES["all-attention"] = ["attention", "sliding_attention"]


def pytest_generate_tests(metafunc):
    """A test that takes `mixture` runs with every mixture of layer kinds."""
    if "mixture" in metafunc.fixturenames:
        metafunc.parametrize("mixture", list(MIXTURES.values()), ids=list(MIXTURES))


def tiny_config(layer_kinds, **changes) -> JetNemotronConfig:
    block = {"num_heads": 2, "head_dim": 8, "head_dim_v": 12, "conv_size": 4}
    sections = {kind: dict(block) for kind in LINEAR_KINDS} | {"sliding_attention": {"window_size": WINDOW}}
    sections["jetblock"]["dconv_generator_reduction"] = 8
    options = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": len(layer_kinds),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "layer_kinds": list(layer_kinds),
        "efficient_attention_config": sections,
        "bos_token_id": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return JetNemotronConfig(**options | changes)


@pytest.fixture
def build_config():
    """`build_config(layer_kinds, **changes)`."""
    return tiny_config


@pytest.fixture
def build_model():
    """`build_model(layer_kinds, **changes)`: in fp64, so that tolerances need no room for rounding."""

    def build(layer_kinds, **changes):
        torch.manual_seed(0)
        model = JetNemotronForCausalLM(tiny_config(layer_kinds, **changes)).double().eval()
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.1 * torch.randn_like(p))
        return model

    return build


@pytest.fixture
def tokens():
    """`tokens(B, T, seed=1)`: ids that are neither padding nor the first token."""

    def draw(B, T, seed=1):
        return torch.randint(2, VOCAB, (B, T), generator=torch.Generator().manual_seed(seed))

    return draw


@pytest.fixture
def padded(tokens):
    """A batch of rows of 9, 4 and 1 tokens padded on the left: ids, mask and the rows alone."""
    rows = [tokens(1, n, seed=n) for n in (9, 4, 1)]
    ids = torch.cat([torch.nn.functional.pad(row, (9 - row.shape[1], 0)) for row in rows])
    return ids, (ids != 0).long(), rows
