"""Any pretrained decoder, end to end: a folder is loaded, wrapped, trained, pruned, saved, loaded again, and generates.

Each family is a tiny random Hugging Face model, saved as a published folder is, with the bundled teachers' tokeniser.
"""

import math

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

from jetlab.config import Training
from jetlab.data.packing import Mixture
from jetlab.layers.dims import BlockDims
from jetlab.models import export, surgery
from jetlab.train.paths import fixed_law, train_paths

DIMS = BlockDims(d_model=32, n_heads=2, head_dim=8, head_dim_v=16)
KINDS = ("jetblock", "attention", "jetblock", "jetblock")
SHAPE = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "attn_implementation": "sdpa",
}
HEADS = SHAPE | {"head_dim": 8}
SLIDING = ["sliding_attention", "full_attention"] * 2
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
FAMILIES = {
    "qwen2": lambda **v: Qwen2Config(**SHAPE, **v, tie_word_embeddings=True),
    "qwen3": lambda **v: Qwen3Config(**HEADS, **v, tie_word_embeddings=True),
    "llama3": lambda **v: LlamaConfig(**SHAPE, **v, rope_parameters=LLAMA3_ROPE, tie_word_embeddings=True),
    "gemma3": lambda **v: Gemma3TextConfig(
        **HEADS, **v, query_pre_attn_scalar=8, sliding_window=9, layer_types=SLIDING, tie_word_embeddings=True
    ),
    "olmo2": lambda **v: Olmo2Config(**SHAPE, **v, tie_word_embeddings=False),
    "mistral": lambda **v: MistralConfig(**SHAPE, **v, sliding_window=9, tie_word_embeddings=False),
    "qwen3_moe": lambda **v: Qwen3MoeConfig(
        **HEADS, **v, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False
    ),
}
every_family = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def folder(family, tokenizer, tmp_path):
    """A model as its publisher would save it, its weights so large that what it writes depends on what it reads."""
    torch.manual_seed(0)
    config = FAMILIES[family](vocab_size=len(tokenizer))
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "pretrained")
    tokenizer.save_pretrained(tmp_path / "pretrained")
    return tmp_path / "pretrained"


def ids(tokenizer):
    return torch.randint(2, len(tokenizer), (2, 24), generator=torch.Generator().manual_seed(1))


def as_bytes(model):
    return {name: x.detach().contiguous().numpy().tobytes() for name, x in model.state_dict().items()}


@torch.no_grad()
def written(model, x):
    return model.generate(
        x, past_key_values=surgery.HybridCache(), max_new_tokens=8, do_sample=False, eos_token_id=None
    )[:, x.shape[1] :].tolist()


@every_family
def test_a_pretrained_folder_becomes_a_hybrid_that_lasts(family, folder, tasks, tmp_path):
    model, tokenizer = surgery.load(folder)
    x = ids(tokenizer)
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
    pretrained = as_bytes(model)
    torch.manual_seed(0)
    surgery.wrap(model, "jetblock", DIMS)
    started = as_bytes(model)

    # Before training the full path is the pretrained model.
    with torch.no_grad():
        torch.testing.assert_close(model(x, use_cache=False).logits, expected, atol=1e-5, rtol=0)

    training = Training(
        n_local=2, n_steps=2, learning_rate=5e-3, warmup=1, growth=0.0, feature_weight=1.0, logit_weight=1.0,
        rows={"retrieval": 1, "math": 1}, weights={},
    )  # fmt: skip
    mixture = Mixture(tasks, training.rows, tokenizer, 40, seed=0)
    history = train_paths(model, mixture, fixed_law(KINDS), training, label=family)
    assert all(math.isfinite(row["loss"]) for row in history)

    # Every byte that came with the model is as it was; every parameter of a path moved.
    trained = as_bytes(model)
    kept = {name.replace(".paths.attention.inner", ""): x for name, x in trained.items() if ".jetblock." not in name}
    assert kept == pretrained
    still = {name for name in trained if ".jetblock." in name and trained[name] == started[name]}
    assert not still and any(".jetblock." in name for name in trained)

    # As a hybrid it computes what its supernet did, and comes back from a folder with the same words.
    surgery.activate(model, KINDS)
    with torch.no_grad():
        expected = model(x, use_cache=False).logits
    surgery.prune(model, KINDS)
    surgery.save(model, tmp_path / "hybrid", tokenizer, dims=DIMS)
    again, _ = surgery.load(tmp_path / "hybrid")
    with torch.no_grad():
        assert torch.equal(again(x, use_cache=False).logits, expected)
    found = written(model, x)
    assert len({tuple(row) for row in found}) == 2 and written(again, x) == found

    if family == "qwen2":  # the one that the released layout is made of
        export.save(model, tmp_path / "product", tokenizer, dims=DIMS)
        product = AutoModelForCausalLM.from_pretrained(tmp_path / "product")
        options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
        assert product.generate(x, **options)[:, x.shape[1] :].tolist() == found


@every_family
def test_blocks_start_from_what_the_attention_that_they_replace_compares_and_copies(family, folder):
    """The two matrices of every head pair span what W_q'W_k and W_o W_v of the pretrained layer span."""
    model, _ = surgery.load(folder)
    attention = model.model.layers[2].self_attn
    width = attention.head_dim
    w_q, w_k, w_v = (
        getattr(attention, name).weight.detach().unflatten(0, (-1, width)) for name in ("q_proj", "k_proj", "v_proj")
    )
    w_o = attention.o_proj.weight.detach().unflatten(1, (-1, width)).transpose(0, 1)
    surgery.wrap(model, "gated_deltanet", DIMS)
    block = surgery.slots(model)[2].paths["gated_deltanet"]
    compared = block.q_proj.weight[:8].T @ block.k_proj.weight[:8]  # head 0 of 2 takes over head 0 of 4, of rank 8
    copied = block.o_proj.weight[:, :8] @ block.v_proj.weight[:8]
    for found, source in ((compared, w_q[0].T @ w_k[0]), (copied, w_o[0] @ w_v[0])):
        # Both are scaled by one number, which differs by family.
        torch.testing.assert_close(found / found.norm(), source / source.norm(), atol=1e-4, rtol=1e-3)
