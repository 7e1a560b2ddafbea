"""Specification of the surgery: nothing changes that was not meant to, and what is damaged is refused."""

import copy
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BambaConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    Llama4TextConfig,
    LlamaConfig,
    Mamba2Config,
    MistralConfig,
    Olmo2Config,
    Olmo3Config,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from jetlab.data.tokenizer import build_tokenizer
from jetlab.layers import UnknownMixerError
from jetlab.layers.dims import BlockDims
from jetlab.models import surgery
from jetlab.paths import ROOT, MissingInput

DIMS = BlockDims(d_model=24, n_heads=2, head_dim=8, head_dim_v=16)
SHAPE = {
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
    "attn_implementation": "sdpa",
}
CONFIGS = {
    "qwen2": lambda: Qwen2Config(**SHAPE, tie_word_embeddings=True),
    "qwen3": lambda: Qwen3Config(**SHAPE, head_dim=8, tie_word_embeddings=False),
    "llama": lambda: LlamaConfig(**SHAPE, tie_word_embeddings=False),
    "gemma3": lambda: Gemma3TextConfig(
        **SHAPE,
        head_dim=8,
        query_pre_attn_scalar=8,
        sliding_window=5,
        layer_types=["sliding_attention", "full_attention", "sliding_attention"],
    ),
    "olmo2": lambda: Olmo2Config(**SHAPE, tie_word_embeddings=False),
    "mistral": lambda: MistralConfig(**SHAPE, sliding_window=5, tie_word_embeddings=False),
    "qwen3_moe": lambda: Qwen3MoeConfig(
        **SHAPE, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, tie_word_embeddings=False
    ),
}
PLAIN = {key: value for key, value in SHAPE.items() if key != "attn_implementation"}  # the family's own choice
MIXED = ("attention", "gated_deltanet", "jetblock")
MIXTURES = [
    MIXED,
    ("rwkv7", "attention", "rwkv7"),
    ("attention", "rwkv7", "rwkv7"),
    ("retnet", "sliding_attention", "mamba2"),
    ("gla", "deltanet", "sliding_attention"),
]
WINDOW = 6
every_model = pytest.mark.parametrize("family", CONFIGS)
every_mixture = pytest.mark.parametrize("kinds", MIXTURES, ids="-".join)


def build(family="qwen2", seed=0):
    """A random model with weights large enough that attention is not uniform."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(CONFIGS[family](), dtype=torch.float32).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def hybrid(family="qwen2", kinds=MIXED):
    """A random hybrid, its linear blocks away from their special starting values."""
    model = surgery.convert(build(family), kinds, DIMS, **options_of(kinds)).eval()
    with torch.no_grad():
        for parameter in surgery.freeze(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.requires_grad_(True)


def options_of(kinds):
    return {"window": WINDOW} if "sliding_attention" in kinds else {}


def ids(B=2, T=14, seed=1):
    return torch.randint(2, 50, (B, T), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model, x, mask=None, cache=None):
    out = model.model(input_ids=x, attention_mask=mask, past_key_values=cache, use_cache=cache is not None)
    return model.lm_head(out.last_hidden_state)


@every_model
def test_slots_change_nothing_before_training(family):
    plain = build(family)
    expected = logits(plain, ids())
    model = surgery.attach(copy.deepcopy(plain))
    torch.testing.assert_close(logits(model, ids()), expected, atol=1e-5, rtol=0)
    assert surgery.kinds_of(model) == ("attention",) * 3


@every_model
def test_a_supernet_on_its_attention_paths_is_the_pretrained_model(family):
    plain = build(family)
    expected = logits(plain, ids())
    model = surgery.wrap(copy.deepcopy(plain), "jetblock", DIMS)
    surgery.activate(model, ["attention"] * 3)
    torch.testing.assert_close(logits(model, ids()), expected, atol=1e-5, rtol=0)


@every_model
@pytest.mark.parametrize("kinds", [("attention",) * 3, *MIXTURES], ids="-".join)
@pytest.mark.parametrize("parts", [(9, 1, 1, 1, 1, 1), (1, 6, 7)], ids=["steps", "chunks"])
def test_prefill_and_steps_equal_one_pass(family, kinds, parts):
    model, x = hybrid(family, kinds), ids()
    expected = logits(model, x)
    cache = surgery.HybridCache()
    found = [logits(model, part, cache=cache) for part in x.split(parts, dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)  # fp32: another order of sums
    assert cache.get_seq_length() == 14


@every_model
@every_mixture
def test_padding_on_the_left_changes_nothing_at_once_or_step_by_step(family, kinds):
    model, x = hybrid(family, kinds), ids()
    expected = logits(model, x)
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    padded[1] = torch.cat([x[1], x[1, :3]])  # the second row is full: three real tokens more at the end
    mask = torch.ones(2, 17, dtype=torch.long)
    mask[0, :3] = 0
    torch.testing.assert_close(logits(model, padded, mask)[0, 3:], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(logits(model, padded, mask)[1, :14], expected[1], atol=1e-4, rtol=1e-4)
    cache, found = surgery.HybridCache(), []
    for start, stop in ((0, 12), (12, 13), (13, 15), (15, 17)):
        found.append(logits(model, padded[:, start:stop], mask[:, :stop], cache))
    found = torch.cat(found, 1)
    torch.testing.assert_close(found[0, 3:], expected[0], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[1, :14], expected[1], atol=1e-4, rtol=1e-4)


@every_model
@every_mixture
def test_generate_equals_whole_passes_with_batches_and_left_padding(family, kinds):
    model, x = hybrid(family, kinds), ids()
    padded = torch.cat([torch.zeros(2, 3, dtype=torch.long), x], 1)
    mask = (torch.arange(17) >= torch.tensor([[3], [0]])).long()
    padded[1, :3] = x[0, :3]
    found = model.generate(
        padded,
        attention_mask=mask,
        past_key_values=surgery.HybridCache(),
        max_new_tokens=4,
        do_sample=False,
        eos_token_id=None,
    )
    whole, whole_mask = padded, mask
    for _ in range(4):
        whole = torch.cat([whole, logits(model, whole, whole_mask)[:, -1:].argmax(-1)], 1)
        whole_mask = torch.cat([whole_mask, torch.ones(2, 1, dtype=torch.long)], 1)
    assert found.tolist() == whole.tolist()


def test_a_plain_call_brings_a_cache_of_the_right_kind():
    model = hybrid()
    with torch.no_grad():
        out = model(ids()[:, :9])
        found = model(ids()[:, 9:], past_key_values=out.past_key_values).logits
    torch.testing.assert_close(found, logits(model, ids())[:, 9:], atol=1e-4, rtol=1e-4)


def test_a_cache_of_another_kind_is_refused():
    with pytest.raises(ValueError, match=r"got a DynamicCache; pass past_key_values=HybridCache\(\)"):
        hybrid().generate(ids(), max_new_tokens=1)


@every_mixture
def test_rows_of_a_cache_may_be_chosen_and_repeated(kinds):
    model, x = hybrid(kinds=kinds), ids()
    cache = surgery.HybridCache()
    logits(model, x[:, :9], cache=cache)
    cache.batch_select_indices(torch.tensor([1, 1, 0]))
    found = logits(model, x[[1, 1, 0], 9:], cache=cache)
    torch.testing.assert_close(found, logits(model, x)[[1, 1, 0], 9:], atol=1e-4, rtol=1e-4)


@every_mixture
def test_a_cache_holds_as_many_bytes_as_the_mixers_say(kinds):
    model = hybrid(kinds=kinds)
    cache = surgery.HybridCache()
    logits(model, ids(B=1), cache=cache)
    attention = [state for state in cache.states.values() if hasattr(state, "real")]  # what it notes beside k and v
    notes = sum(state.real.nbytes + (state.position.nbytes if hasattr(state, "position") else 0) for state in attention)
    assert cache.nbytes() - notes == surgery.state_bytes(model, 14)


def test_choosing_paths_and_pruning_to_them_compute_the_same():
    model = surgery.wrap(build(), "gated_deltanet", DIMS)
    kinds = ("gated_deltanet", "attention", "gated_deltanet")
    surgery.activate(model, kinds)
    expected = logits(model, ids())
    assert not torch.allclose(expected, logits(build(), ids()), atol=1e-2)
    surgery.prune(model, kinds)
    torch.testing.assert_close(logits(model, ids()), expected, atol=0, rtol=0)
    assert [list(slot.paths) for slot in surgery.slots(model)] == [[kind] for kind in kinds]


def test_a_supernet_may_have_paths_in_some_layers_only():
    model = surgery.wrap(build(), "gated_deltanet", DIMS, layers=[1])
    assert [len(slot.paths) for slot in surgery.slots(model)] == [1, 2, 1]


THREE = ("gated_deltanet", "sliding_attention")


@every_model
def test_a_supernet_of_three_kinds_on_its_attention_paths_is_the_pretrained_model_to_the_bit(family):
    plain = build(family)
    attached = surgery.attach(copy.deepcopy(plain))
    model = surgery.wrap(plain, THREE, DIMS, window=WINDOW)
    assert [list(slot.paths) for slot in surgery.slots(model)] == [["attention", *THREE]] * 3
    torch.testing.assert_close(logits(model, ids()), logits(attached, ids()), atol=0, rtol=0)


@pytest.mark.parametrize(
    "kinds",
    [("sliding_attention",) * 3, ("gated_deltanet",) * 3, ("sliding_attention", "gated_deltanet", "attention")],
    ids="-".join,
)
def test_each_path_of_a_supernet_of_three_kinds_is_what_convert_builds(kinds):
    torch.manual_seed(3)
    model = surgery.wrap(build(), THREE, DIMS, window=WINDOW)
    torch.manual_seed(3)
    expected = surgery.convert(build(), kinds, DIMS, **options_of(kinds))
    surgery.activate(model, kinds)
    if kinds.count("gated_deltanet") == 1:  # convert draws no values for the layer before it
        surgery.slots(expected)[1].paths["gated_deltanet"] = surgery.slots(model)[1].paths["gated_deltanet"]
    torch.testing.assert_close(logits(model, ids()), logits(expected, ids()), atol=0, rtol=0)
    assert surgery.state_bytes(model, 14) == surgery.state_bytes(expected, 14)


def test_a_path_beside_sliding_attention_starts_with_the_values_that_it_has_alone():
    def built(kinds, **options):
        torch.manual_seed(3)
        model = build()
        return {name: p for name, p in surgery.wrap(model, kinds, DIMS, **options).named_parameters()}

    alone, beside = built("gated_deltanet"), built(THREE, window=WINDOW)
    assert list(alone) == list(beside)  # sliding attention has no parameters of its own, not even under another name
    assert all(torch.equal(alone[name], beside[name]) for name in alone)


def test_options_other_than_the_window_go_to_the_linear_path():
    model = surgery.wrap(build(), ("jetblock", "sliding_attention"), DIMS, window=4, conv_v="static")
    paths = surgery.slots(model)[0].paths
    assert paths["sliding_attention"].window == 4 and list(surgery.slots(model)[0].linear) == ["jetblock"]
    with pytest.raises(TypeError, match="window"):
        surgery.wrap(build(), "jetblock", DIMS, window=4)


def test_only_the_linear_paths_of_a_supernet_of_three_kinds_train():
    model = surgery.wrap(build(), THREE, DIMS, window=WINDOW)
    trained = surgery.freeze(model)
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == len(names) and all(".paths.gated_deltanet." in name for name in names)


def test_a_supernet_of_rwkv7_and_sliding_attention_has_one_first_layer():
    model = surgery.wrap(build(), ("rwkv7", "sliding_attention"), DIMS, window=4)
    assert [slot.paths["rwkv7"].v_lora is None for slot in surgery.slots(model)] == [True, False, False]


def test_the_bytes_of_every_path_are_those_of_the_architecture_that_uses_it():
    model = surgery.wrap(build(), THREE, DIMS, window=WINDOW, layers=[0, 2])
    found = surgery.path_bytes(model, 14)
    assert [list(of) for of in found] == [["attention", *THREE], ["attention"], ["attention", *THREE]]
    # 2 kv heads · head_dim 6 · keys and values · 4 bytes, of 14 tokens and of the last 6
    assert found[0]["attention"] == 2 * 12 * 14 * 4 and found[0]["sliding_attention"] == 2 * 12 * WINDOW * 4


@pytest.mark.parametrize("kind", ["gated_deltanet", "rwkv7"])
def test_blended_slots_go_from_one_path_to_the_other_and_come_back(kind):
    model = surgery.wrap(build(), kind, DIMS)
    surgery.activate(model, [kind] * 3)
    expected = logits(model, ids())
    with surgery.blended(model, kind, torch.zeros(3)):
        torch.testing.assert_close(logits(model, ids()), expected, atol=0, rtol=0)
    with surgery.blended(model, kind, torch.tensor([0.0, 1.0, 0.0])):
        mixed = logits(model, ids())
    torch.testing.assert_close(logits(model, ids()), expected, atol=0, rtol=0)
    surgery.activate(model, [kind, "attention", kind])
    torch.testing.assert_close(mixed, logits(model, ids()), atol=0, rtol=0)


def test_a_blended_slot_returns_the_weighted_sum_of_its_paths():
    model = surgery.wrap(build(), "gated_deltanet", DIMS)
    with surgery.blended(model, "gated_deltanet", torch.full((3,), 0.3)), surgery.recorded(model) as tape:
        logits(model, ids())
    x, y = tape[0]
    paths = surgery.slots(model)[0].paths
    with torch.no_grad():
        expected = 0.3 * paths["attention"](x)[0] + 0.7 * paths["gated_deltanet"](x)[0]
    torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-6)  # fp32: a gate and its complement are rounded


def test_blended_slots_carry_both_states():
    model = surgery.wrap(build(), "gated_deltanet", DIMS)
    with surgery.blended(model, "gated_deltanet", torch.tensor([0.2, 0.5, 0.9])):
        expected, cache = logits(model, ids()), surgery.HybridCache()
        found = [logits(model, part, cache=cache) for part in ids().split((9, 1, 4), dim=1)]
    torch.testing.assert_close(torch.cat(found, 1), expected, atol=1e-4, rtol=1e-4)  # fp32: another order of sums


def test_the_same_seed_builds_the_same_hybrid():
    def built(seed):
        model = build()
        torch.manual_seed(seed)
        return logits(surgery.convert(model, ["jetblock", "attention", "jetblock"], DIMS), ids())

    torch.testing.assert_close(built(3), built(3), atol=0, rtol=0)
    assert not torch.equal(built(3), built(4))


@every_model
def test_training_moves_not_one_byte_of_the_pretrained_part(family):
    def as_bytes(x):
        return x.detach().contiguous().numpy().tobytes()

    model = surgery.wrap(build(family), "jetblock", DIMS)
    parameters = surgery.freeze(model)
    surgery.activate(model, ["jetblock", "attention", "jetblock"])
    state = {name: as_bytes(x) for name, x in model.state_dict().items()}
    optimiser = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1)
    for step in range(3):
        hidden = model.model(input_ids=ids(seed=step), use_cache=False).last_hidden_state
        optimiser.zero_grad()
        model.lm_head(hidden).square().mean().backward()
        optimiser.step()
    moved = {name for name, x in model.state_dict().items() if as_bytes(x) != state[name]}
    assert moved and all(".paths.jetblock." in name for name in moved)
    assert {name.split(".paths.")[0].split(".")[2] for name in moved} == {"0", "2"}  # layer 1 used its attention


def test_the_first_rwkv7_layer_of_a_hybrid_has_no_value_to_mix_with_and_the_others_do():
    model = surgery.convert(build(), ["attention", "rwkv7", "rwkv7"], DIMS)
    first, second = (surgery.slots(model)[layer].paths["rwkv7"] for layer in (1, 2))
    assert first.v_lora is None and second.v_lora is not None
    assert (first.layer_idx, second.layer_idx) == (1, 2)
    x = ids()
    before = logits(model, x)
    with torch.no_grad():
        second.v_lora.w2.bias.fill_(-50)  # keeps its own value
    assert not torch.allclose(logits(model, x), before, atol=1e-4)


@pytest.mark.parametrize("kinds", [("attention", "rwkv7", "rwkv7"), ("rwkv7", "attention", "rwkv7")], ids="-".join)
def test_a_path_of_a_supernet_of_rwkv7_becomes_a_hybrid_that_saves_and_loads(kinds, tmp_path, tokenizer_files):
    model = surgery.wrap(build(), "rwkv7", DIMS)
    with torch.no_grad():
        for parameter in surgery.freeze(model):
            parameter.add_(0.1 * torch.randn_like(parameter))
    surgery.activate(model, kinds)
    expected = logits(model, ids())
    surgery.prune(model, kinds)
    torch.testing.assert_close(logits(model, ids()), expected, atol=0, rtol=0)
    surgery.save(model, tmp_path, dims=DIMS)
    for file in tokenizer_files.iterdir():
        shutil.copy(file, tmp_path)
    again, _ = surgery.load(tmp_path)
    torch.testing.assert_close(logits(again, ids()), expected, atol=0, rtol=0)


def test_a_supernet_of_rwkv7_in_some_layers_starts_at_the_first_of_them():
    model = surgery.wrap(build(), "rwkv7", DIMS, layers=[1, 2])
    assert [slot.paths["rwkv7"].v_lora is None for slot in surgery.slots(model)[1:]] == [True, False]


def test_sliding_attention_is_what_transformers_computes_with_a_window():
    plain = build()
    model = surgery.convert(
        copy.deepcopy(plain), ["attention", "sliding_attention", "sliding_attention"], None, window=4
    )
    kinds = ["full_attention", "sliding_attention", "sliding_attention"]
    config = Qwen2Config(
        **SHAPE, use_sliding_window=True, sliding_window=4, layer_types=kinds, tie_word_embeddings=True
    )
    theirs = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    theirs.load_state_dict(plain.state_dict())
    torch.testing.assert_close(logits(model, ids()), logits(theirs, ids()), atol=1e-5, rtol=0)
    assert not torch.allclose(logits(model, ids()), logits(plain, ids()), atol=1e-2)


def test_sliding_attention_shares_the_pretrained_layer_and_never_trains_it():
    model = surgery.wrap(build(), "sliding_attention", None, window=4)
    slot = surgery.slots(model)[0]
    assert slot.paths["sliding_attention"].inner is slot.paths["attention"].inner
    assert surgery.freeze(model) == [] and not any(p.requires_grad for p in model.parameters())


def test_what_goes_in_and_out_of_every_layer_is_recorded_within_the_block_only():
    model = hybrid()
    with surgery.recorded(model) as tape:
        logits(model, ids())
    logits(model, ids())
    assert [(x.shape, y.shape) for x, y in tape] == [((2, 14, 24), (2, 14, 24))] * 3


@pytest.fixture(scope="module")
def tokenizer_files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "assets/teacher/0" / name, folder)
    return folder


@pytest.fixture
def folder(tmp_path, tokenizer_files):
    """A saved random hybrid with a tokeniser."""
    path = tmp_path / "hybrid"
    model = surgery.convert(build(), ["attention", "jetblock", "jetblock"], DIMS, conv_v="static")
    surgery.save(model, path, dims=DIMS, conv_v="static")
    for file in tokenizer_files.iterdir():
        shutil.copy(file, path)
    return path


@every_model
def test_a_saved_hybrid_comes_back_to_the_bit(family, tmp_path, tokenizer_files):
    path = tmp_path / family
    kinds = ["attention", "jetblock", "gated_deltanet"]
    model = hybrid(family, ["attention", "jetblock", "jetblock"])
    surgery.save(model, path, dims=DIMS)
    for file in tokenizer_files.iterdir():
        shutil.copy(file, path)
    again, _ = surgery.load(path)
    assert surgery.kinds_of(again) == ("attention", "jetblock", "jetblock") != tuple(kinds)
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=0, rtol=0)
    assert not any(".paths." in name for name in load_file(path / "model.safetensors"))


def test_the_options_of_a_block_come_back_too(folder):
    model, tokenizer = surgery.load(folder)
    assert surgery.kinds_of(model) == ("attention", "jetblock", "jetblock")
    assert json.loads((folder / "config.json").read_text())["block_options"] == {"conv_v": "static"}
    assert tokenizer("<math> amber").input_ids


@every_mixture
def test_every_mixture_is_saved_and_comes_back_with_its_options(kinds, tmp_path, tokenizer_files):
    model = hybrid(kinds=kinds)
    surgery.save(model, tmp_path, dims=DIMS, **options_of(kinds))
    for file in tokenizer_files.iterdir():
        shutil.copy(file, tmp_path)
    again, _ = surgery.load(tmp_path)
    assert surgery.kinds_of(again) == kinds
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=0, rtol=0)


def test_an_all_attention_model_with_slots_is_saved_and_loaded(tmp_path, tokenizer_files):
    model = surgery.attach(build())
    surgery.save(model, tmp_path / "full")
    for file in tokenizer_files.iterdir():
        shutil.copy(file, tmp_path / "full")
    again, _ = surgery.load(tmp_path / "full")
    torch.testing.assert_close(logits(again, ids()), logits(model, ids()), atol=0, rtol=0)


def test_saving_twice_writes_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        surgery.save(hybrid(kinds=("attention", "jetblock", "jetblock")), tmp_path / name, dims=DIMS)
    for file in ("config.json", "model.safetensors"):
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()


def test_a_bundled_teacher_loads_as_a_plain_model():
    model, tokenizer = surgery.load(ROOT / "assets/teacher/0")
    assert model.config.num_hidden_layers == 8 and not model.training
    assert model.config.vocab_size == len(tokenizer)
    with pytest.raises(ValueError, match=r"no slots: call surgery\.attach"):
        surgery.slots(model)


def test_loading_writes_nothing_that_would_land_in_a_cell(capfd):
    surgery.load(ROOT / "assets/teacher/0")
    assert capfd.readouterr() == ("", "")


def test_the_tokeniser_of_a_folder_is_read_as_it_stands():
    _, tokenizer = surgery.load(ROOT / "assets/teacher/0")
    for text in ("e\u0301 is not é", "<|endoftext|>", " two  spaces\n"):  # Qwen2's own class would change all of these
        ids = tokenizer(text).input_ids
        assert tokenizer.decode(ids) == text and max(ids) < len(tokenizer) == len(build_tokenizer())


@pytest.mark.parametrize(
    ("act", "error", "message"),
    [
        pytest.param(lambda m: surgery.wrap(m, "jetblok", DIMS), UnknownMixerError, "'jetblock'", id="unknown-kind"),
        pytest.param(
            lambda m: surgery.convert(m, ["jetblok"] * 3, DIMS),
            UnknownMixerError,
            "'jetblock'",
            id="unknown-in-convert",
        ),
        pytest.param(
            lambda m: surgery.convert(m, ["jetblock"] * 2, DIMS),
            ValueError,
            "3 here, got 2",
            id="two-kinds-three-layers",
        ),
        pytest.param(
            lambda m: surgery.activate(surgery.attach(m), ["attention"] * 4),
            ValueError,
            "one kind per layer, 3 here, got 4",
            id="four-kinds-three-layers",
        ),
        pytest.param(
            lambda m: surgery.activate(surgery.attach(m), ["attention", "jetblock", "attention"]),
            ValueError,
            "layer 1 has paths attention, not 'jetblock'; wrap the model",
            id="path-that-is-not-there",
        ),
        pytest.param(
            lambda m: surgery.convert(m, ["attention", "sliding_attention", "gla"], DIMS),
            ValueError,
            "sliding_attention needs a window, got none; pass window=… in tokens",
            id="sliding-without-a-window",
        ),
        pytest.param(
            lambda m: surgery.wrap(m, "sliding_attention", None, window=0),
            ValueError,
            "window must be a whole number ≥ 1",
            id="window-of-nothing",
        ),
        pytest.param(
            lambda m: surgery.wrap(m, ("gla", "sliding_attention"), DIMS),
            ValueError,
            "sliding_attention needs a window, got none",
            id="sliding-beside-gla-without-a-window",
        ),
        pytest.param(
            lambda m: surgery.blended(surgery.wrap(m, "gla", DIMS), "gla", torch.ones(2)).__enter__(),
            ValueError,
            r"one gate per layer, 3 here, got shape \(2,\)",
            id="two-gates-three-layers",
        ),
        pytest.param(
            lambda m: surgery.blended(surgery.attach(m), "gla", torch.ones(3)).__enter__(),
            ValueError,
            "layer 0 has paths attention, not 'gla'; wrap the model",
            id="gates-to-a-path-that-is-not-there",
        ),
        pytest.param(
            lambda m: surgery.attach(surgery.attach(m)), ValueError, "has slots already; load a fresh one", id="twice"
        ),
        pytest.param(
            lambda m: surgery.save(surgery.wrap(m, "jetblock", DIMS), "never"),
            ValueError,
            r"choose one architecture with surgery\.prune",
            id="saving-a-supernet",
        ),
    ],
)
def test_operations_that_cannot_be_are_refused_with_the_way_out(act, error, message):
    with pytest.raises(error, match=message):
        act(build())


WAY_OUT = "use a Qwen2, Qwen3, Llama, Mistral, Gemma 3 or OLMo 2 model"
REFUSED = {
    "one-projection-for-q-k-v": (
        lambda: Phi3Config(**PLAIN),
        "layer 0 of Phi3ForCausalLM lacks q_proj, k_proj, v_proj",
    ),
    "another-layout": (
        lambda: GPT2Config(vocab_size=50, n_embd=24, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None),
        "GPT2LMHeadModel lacks q_proj, k_proj, v_proj, o_proj",
    ),
    "encoder-and-decoder": (
        lambda: T5Config(vocab_size=50, d_model=24, d_kv=8, d_ff=40, num_layers=1, num_heads=2),
        "decoder-only model, got T5ForConditionalGeneration",
    ),
    "state-space": (
        lambda: Mamba2Config(
            vocab_size=50, hidden_size=32, num_hidden_layers=1, num_heads=8, head_dim=8, state_size=8, n_groups=2
        ),
        "got Mamba2ForCausalLM, which keeps a recurrent state of its own",
    ),
    "another-mixer-in-some-layers": (
        lambda: BambaConfig(
            **PLAIN | {"num_hidden_layers": 2},
            attn_layer_indices=[0],
            mamba_n_heads=8,
            mamba_d_head=6,
            mamba_d_state=8,
        ),
        "got BambaForCausalLM, which keeps a recurrent state of its own",
    ),
    "attention-in-chunks": (
        lambda: Llama4TextConfig(
            **PLAIN, head_dim=8, attention_chunk_size=5, num_local_experts=2, intermediate_size_mlp=40
        ),
        "got chunked_attention in Llama4ForCausalLM",
    ),
    "capped-scores": (
        lambda: Gemma2Config(**PLAIN, head_dim=8, sliding_window=5, attn_logit_softcapping=2.0),
        "attention by sdpa, got 'eager' in Gemma2ForCausalLM; its scores have no such form",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_model_that_cannot_be_taken_is_refused_with_the_reason(case):
    config, reason = REFUSED[case]
    build = T5ForConditionalGeneration if case == "encoder-and-decoder" else AutoModelForCausalLM.from_config
    with pytest.raises(ValueError, match=rf"{reason}.*{WAY_OUT}"):
        surgery.attach(build(config()))


def test_attention_that_needs_a_mask_to_be_causal_is_refused():
    config = Qwen2Config(**SHAPE | {"attn_implementation": "eager"})
    with pytest.raises(ValueError, match="got 'eager' in Qwen2ForCausalLM; load it with attn_implementation='sdpa'"):
        surgery.attach(AutoModelForCausalLM.from_config(config))


def test_a_model_that_would_compute_something_else_is_refused_and_left_as_it_was():
    class Odd(nn.Module):
        """An attention layer that counts on an argument which slots do not pass on."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def __getattr__(self, name):
            return super().__getattr__(name) if name == "inner" else getattr(self.inner, name)

        def forward(self, **given):
            y, weights = self.inner(**given)
            return y * (1 if "position_ids" in given else 2), weights

    model = build("llama")
    model.model.layers[1].self_attn = Odd(model.model.layers[1].self_attn)
    expected = logits(model, ids())
    with pytest.raises(ValueError, match=rf"relative difference of .* of LlamaForCausalLM.*{WAY_OUT}"):
        surgery.attach(model)
    assert torch.equal(logits(model, ids()), expected)


def test_two_rotations_by_layer_type_are_told_apart():
    """OLMo 3: as OLMo 2, with windows, and with a rotation of its own for each type of layer."""
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    rope = {
        kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(types[:2], (1e2, 1e6), strict=True)
    }
    torch.manual_seed(0)
    config = Olmo3Config(**SHAPE, sliding_window=5, layer_types=types, rope_parameters=rope)
    plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    expected = logits(plain, ids())
    torch.testing.assert_close(logits(surgery.attach(plain), ids()), expected, atol=1e-5, rtol=0)


def test_a_probe_leaves_training_mode_and_random_numbers_alone():
    model = build().train()
    before = torch.get_rng_state()
    surgery.attach(model)
    assert model.training and torch.equal(torch.get_rng_state(), before)


def test_shapes_alone_can_be_operated_on():
    with torch.device("meta"):
        model = surgery.attach(AutoModelForCausalLM.from_config(CONFIGS["qwen2"](), dtype=torch.float32))
    assert next(model.parameters()).is_meta and len(surgery.slots(model)) == 3


@pytest.fixture
def teacher_copy(tmp_path):
    return shutil.copytree(ROOT / "assets/teacher/0", tmp_path / "teacher")


@pytest.fixture(params=["hybrid", "plain"])
def any_folder(request):
    """A saved hybrid and a plain model."""
    return request.getfixturevalue("folder" if request.param == "hybrid" else "teacher_copy")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_missing_file_is_named(name, any_folder):
    (any_folder / name).unlink()
    with pytest.raises(MissingInput, match=f"{name} is missing: restore it"):
        surgery.load(any_folder)


def garble(path):
    path.write_bytes(b"\xff" * 200)


def truncate(path):
    path.write_bytes(path.read_bytes()[:-100])


def empty(path):
    path.write_bytes(b"")


def drop_a_tensor(path):
    weights = load_file(path)
    weights.pop(next(name for name in weights if "mlp" in name))
    save_file(weights, path, metadata={"format": "pt"})


def widen_a_tensor(path):
    weights = load_file(path)
    name = next(name for name in weights if "mlp" in name)
    save_file(weights | {name: torch.cat([weights[name], weights[name]])}, path, metadata={"format": "pt"})


@pytest.mark.parametrize("damage", [garble, truncate, empty, drop_a_tensor, widen_a_tensor])
def test_damaged_weights_are_refused_not_guessed(damage, any_folder):
    damage(any_folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"a file is damaged or does not fit config\.json: restore it"):
        surgery.load(any_folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_damaged_text_file_is_refused_too(name, any_folder):
    (any_folder / name).write_text("{ not json")
    with pytest.raises(ValueError, match=r"a file is damaged or does not fit config\.json: restore it"):
        surgery.load(any_folder)


def test_pickled_weights_are_never_read(teacher_copy):
    class Trap:
        def __reduce__(self):
            return (exit, ("unpickled",))

    torch.save({"trap": Trap()}, teacher_copy / "pytorch_model.bin")
    (teacher_copy / "model.safetensors").unlink()
    with pytest.raises(MissingInput, match=r"model\.safetensors is missing"):
        surgery.load(teacher_copy)


def test_a_folder_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(MissingInput, match=r"no model in .*nowhere: it must be a folder"):
        surgery.load(tmp_path / "nowhere")
