"""The engine gives what `generate` gives, for every kind of decoder, however prompts are cut, batched and padded."""

import pytest
import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from jetlab.hf import JetNemotronConfig, JetNemotronForCausalLM
from jetlab.inference import mamba2, memory
from jetlab.inference.engine import Engine, Sampling
from jetlab.layers.state import tensors

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WIDTHS = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4}
WIDTHS |= {"num_attention_heads": 4, "num_key_value_heads": 2}
HEADS = WIDTHS | {"head_dim": 8}
SLIDING = ["sliding_attention", "full_attention"] * 2
MAMBA = {"vocab_size": 97, "hidden_size": 32, "num_hidden_layers": 2, "num_heads": 8, "head_dim": 8, "state_size": 8}
HYBRID = {"vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "head_dim": 8}
HYBRID |= {"num_key_value_heads": 2, "mamba_num_heads": 4, "mamba_head_dim": 12, "ssm_state_size": 8, "n_groups": 2}
BLOCKS = ["jetblock", "gated_deltanet", "deltanet", "gla", "mamba2", "retnet", "rwkv7"]
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**WIDTHS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**HEADS)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**WIDTHS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**HEADS, sliding_window=5, layer_types=SLIDING)),
    "mamba2": lambda: Mamba2ForCausalLM(Mamba2Config(**MAMBA, n_groups=2, chunk_size=4)),
    "nemotron_h": lambda: NemotronHForCausalLM(hybrid("M-M*-M")),
} | {f"jet-{kind}": lambda kind=kind: jet(kind) for kind in BLOCKS}
PROMPTS = [list(range(1, 14)), [5, 6, 7], list(range(20, 41))]
N_NEW = 12


def hybrid(pattern, **options):
    """With time steps of which many are below the bound that Transformers keeps while it reads."""
    options = {"chunk_size": 4, "time_step_min": 0.3, "time_step_max": 0.5} | options
    return NemotronHConfig(**HYBRID | options, hybrid_override_pattern=pattern)


def jet(kind):
    blocks = {"sliding_attention": {"window_size": 5}}
    blocks[kind] = {"num_heads": 2, "head_dim": 8, "expand_v": 2.0, "norm_eps": 1e-5, "conv_size": 4}
    kinds = [kind, "attention", "sliding_attention", kind]
    return JetNemotronForCausalLM(JetNemotronConfig(**WIDTHS, layer_kinds=kinds, efficient_attention_config=blocks))


def made(name):
    """Weights so large that tokens depend on the whole prompt and no two logits are near each other.

    So are the biases of convolutions, which then give something for padding too.
    """
    torch.manual_seed(0)
    model = MODELS[name]()
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim > 1 or parameter_name.endswith("conv1d.bias"):
                parameter.normal_(std=0.3)
    return model.to(DEVICE).eval()


def generated(model, prompts, **options):
    """What the model's own generate adds to prompts padded on the left."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts], device=DEVICE)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=DEVICE)
    options = {"max_new_tokens": N_NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0} | options
    return model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_tokens_are_those_of_generate(name):
    model = made(name)
    expected = generated(model, PROMPTS)
    assert len({tuple(row) for row in expected}) == 3
    for chunk, at_once in ((64, 4096), (4, 4), (7, 14)):  # one chunk; row after row; two rows at a time, a ragged end
        engine = Engine(model, batch_size=3, max_len=21 + N_NEW, prefill_chunk=chunk, prefill_tokens=at_once)
        assert engine.generate(PROMPTS, N_NEW) == expected
        assert engine.generate(PROMPTS, N_NEW) == expected  # nothing of the first run is left
        assert engine.generate(PROMPTS[1:2], N_NEW) == generated(model, PROMPTS[1:2])  # a short one behind a long one


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h"])
def test_a_prompt_read_token_by_token_is_read_alike(name):
    model = made(name)
    engine = Engine(model, batch_size=3, max_len=21 + N_NEW, prefill_chunk=1, prefill_tokens=2)
    assert engine.generate(PROMPTS, N_NEW) == generated(model, PROMPTS)


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h"])
@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_padding_in_front_of_a_prompt_changes_nothing(name, chunk):
    engine = Engine(made(name), batch_size=2, max_len=40, prefill_chunk=chunk)
    padded = engine.prefill([PROMPTS[2], [5]])[1].clone()
    torch.testing.assert_close(padded, engine.prefill([[5]])[0], rtol=1e-4, atol=1e-4)  # fp32: the order of sums


@pytest.mark.parametrize("name", ["mamba2", "nemotron_h"])
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_mamba2_layers_of_transformers_are_read_a_few_rows_at_a_time(name, state_dtype, monkeypatch):
    """And count their states: nothing of Transformers' cache is left."""
    model, rows = made(name), []
    engine = Engine(model, batch_size=3, max_len=40, prefill_chunk=8, prefill_tokens=16, state_dtype=state_dtype)
    monkeypatch.setattr(
        engine, "_forward", lambda ids, *rest, own=engine._forward: rows.append(len(ids)) or own(ids, *rest)
    )
    engine.prefill(PROMPTS)
    assert set(rows) == {2, 1}
    row = memory.kv_bytes(model.config, 40, model.dtype) + memory.state_bytes(model, state_dtype)
    assert engine.cache.nbytes() == 3 * row


def test_a_filled_cache_of_a_hybrid_is_full_of_random_numbers_and_empty_again():
    engine = Engine(made("nemotron_h"), batch_size=2, max_len=40)
    filled = engine.cache.layers[0].all
    assert not any(x.any() for x in tensors(filled))
    engine.cache.fill(8, torch.Generator(DEVICE).manual_seed(0))
    assert all(float(x.std()) == pytest.approx(0.1, rel=0.3) for x in tensors(filled))
    assert engine.cache.layers[1].held() == []  # an MLP
    expected = Engine(made("nemotron_h"), batch_size=2, max_len=40).generate(PROMPTS[:2], 5)
    assert engine.generate(PROMPTS[:2], 5) == expected


def test_a_step_of_a_mamba2_layer_is_the_op(monkeypatch):
    engine, calls = Engine(made("nemotron_h"), batch_size=2, max_len=40), []
    monkeypatch.setattr(mamba2, "mamba2_step", lambda *x, own=mamba2.mamba2_step, **y: calls.append(y) or own(*x, **y))
    engine.prefill(PROMPTS[:2])
    assert calls == []
    if engine.graph is None:
        engine.step()
        assert len(calls) == 3 and all(call["in_place"] for call in calls)


@pytest.mark.parametrize("name", ["qwen2", "gemma3", "jet-jetblock", "mamba2"])
def test_logits_do_not_depend_on_how_a_text_is_cut(name):
    model = made(name)
    text = list(range(3, 40))
    with torch.no_grad():
        exact = model(torch.tensor([text], device=DEVICE)).logits[0]
    engine = Engine(model, batch_size=1, max_len=64, prefill_chunk=9)
    for cut in (1, 8, 9, 30):
        found = [engine.prefill([text[:cut]])[0].clone()]
        found += [engine.step(torch.tensor([token], device=DEVICE))[0].clone() for token in text[cut:]]
        torch.testing.assert_close(torch.stack(found), exact[cut - 1 :], rtol=2e-3, atol=2e-3)


def test_more_prompts_than_rows_take_turns():
    model = made("qwen2")
    engine = Engine(model, batch_size=2, max_len=40)
    assert engine.generate(PROMPTS, 5) == generated(model, PROMPTS, max_new_tokens=5)


def test_answers_end_at_an_end_token_each_by_itself():
    model = made("qwen3")
    free = generated(model, PROMPTS)
    ends = [free[0][3], free[2][6]]
    engine = Engine(model, batch_size=3, max_len=40)
    for row, answer in zip(free, engine.generate(PROMPTS, N_NEW, eos_token_id=ends), strict=True):
        stop = min((i for i, token in enumerate(row) if token in ends), default=N_NEW - 1)
        assert answer == row[: stop + 1]


@pytest.mark.parametrize("name", ["llama", "jet-jetblock"])
def test_sampling_draws_what_generate_draws(name):
    model = made(name)
    options = {"temperature": 0.7, "top_k": 20, "top_p": 0.9}
    torch.manual_seed(5)
    expected = generated(model, PROMPTS, do_sample=True, **options)
    engine = Engine(model, batch_size=3, max_len=40)
    torch.manual_seed(5)
    assert engine.generate(PROMPTS, N_NEW, sampling=Sampling(**options)) == expected
    assert engine.generate(PROMPTS, N_NEW) != expected


def test_a_generator_of_its_own_repeats_and_leaves_the_global_one_alone():
    engine = Engine(made("qwen2"), batch_size=3, max_len=40)
    before = torch.get_rng_state()
    runs = [
        engine.generate(PROMPTS, 5, sampling=Sampling(), generator=torch.Generator(DEVICE).manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert runs[0] == runs[1] != runs[2]
    if DEVICE == "cpu":
        assert torch.equal(before, torch.get_rng_state())


def test_the_model_has_its_own_attention_again_afterwards():
    model = made("qwen2")
    before = model.config._attn_implementation
    Engine(model, batch_size=1, max_len=8).generate([[1, 2]], 2)
    assert model.config._attn_implementation == before


def test_mixers_have_their_own_forward_again_afterwards_even_where_one_failed(monkeypatch):
    model = made("nemotron_h")
    mixer = model.model.layers[0].mixer
    engine = Engine(model, batch_size=1, max_len=8)
    assert "forward" not in vars(mixer)
    hook = lambda *x, **y: type(mixer).forward(mixer, *x, **y)  # noqa: E731  as accelerate sets one
    mixer.forward = hook
    monkeypatch.setattr(mamba2, "short_conv", None)
    with pytest.raises(TypeError):
        engine.generate([[1, 2]], 2)
    assert mixer.forward is hook
    assert "forward" not in vars(model.model.layers[2].mixer)
    assert generated(model, [[1, 2]], max_new_tokens=2)


def test_a_step_without_tokens_reads_the_likeliest():
    engine = Engine(made("qwen2"), batch_size=2, max_len=40)
    likeliest = engine.prefill(PROMPTS[:2]).argmax(-1)
    told = engine.step(likeliest).clone()
    engine.prefill(PROMPTS[:2])
    assert torch.equal(engine.step(), told)


@pytest.mark.parametrize("name", ["jet-jetblock", "nemotron_h"])
def test_addresses_stay_what_they_were(name):
    engine = Engine(made(name), batch_size=2, max_len=40, prefill_chunk=4)

    def addresses():
        held = [x for layer in engine.cache.layers for x in layer.held()]
        return [x.data_ptr() for x in [*held, engine.cache.end, engine.cache.start, engine.tokens, engine.logits]]

    before = addresses()
    for prompts in (PROMPTS[:2], PROMPTS[2:]):
        engine.generate(prompts, 6)
        assert addresses() == before


@pytest.mark.skipif(DEVICE == "cuda", reason="a graph cannot be stopped in the middle")
def test_a_step_that_was_stopped_leaves_an_engine_that_works(monkeypatch):
    model = made("qwen2")
    engine = Engine(model, batch_size=1, max_len=40)
    expected = engine.generate(PROMPTS[:1], 5)
    with monkeypatch.context() as stopped:

        def stop():
            raise KeyboardInterrupt

        stopped.setattr(engine, "_next", stop)
        with pytest.raises(KeyboardInterrupt):
            engine.generate(PROMPTS[:1], 5)
    assert engine.generate(PROMPTS[:1], 5) == expected
    assert engine.generate([[7]], 5) == generated(model, [[7]], max_new_tokens=5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (lambda: MistralForCausalLM(MistralConfig(**WIDTHS, sliding_window=5)), "got a model of type mistral"),
        (lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=9)), "got a model of type gpt2"),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(**WIDTHS, rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
            ),
            "rope_type must not be one of .* got 'dynamic'",
        ),
        (
            lambda: NemotronHForCausalLM(hybrid("ME*", n_routed_experts=2, moe_intermediate_size=8)),
            "full_attention, linear_attention, mlp of NemotronHConfig, got moe; use the model's own generate",
        ),
        (
            lambda: NemotronHForCausalLM(hybrid("M", mamba_hidden_act="gelu")),
            "activation must be silu, got 'gelu' in NemotronHConfig",
        ),
    ],
)
def test_refuses_models_that_it_would_get_wrong(config, message):
    with pytest.raises(ValueError, match=message):
        Engine(config(), batch_size=1, max_len=8)


@pytest.mark.parametrize("options", [{"temperature": 0.0}, {"top_k": -5}, {"top_p": 1.5}])
def test_refuses_a_sampling_that_means_nothing(options):
    with pytest.raises(ValueError, match="temperature must be positive, top_k at least 0 and top_p in"):
        Sampling(**options)


def test_nothing_is_generated_if_one_prompt_of_many_cannot_be():
    engine = Engine(made("qwen2"), batch_size=1, max_len=12)
    engine.prefill = None  # would be called
    with pytest.raises(ValueError, match=r"max_len = 12 tokens, got 9 \+ 4"):
        engine.generate([[1], [2], list(range(9))], 4)
    with pytest.raises(ValueError, match="max_new_tokens must be at least 1, got -2"):
        engine.generate([[1]], -2)
    for token in (97, -1):
        with pytest.raises(ValueError, match=f"from 0 to below the vocabulary's 97, got {token} to {token}"):
            engine.generate([[token]], 2)


@pytest.mark.parametrize("name", ["qwen2", "nemotron_h without Mamba2"])
def test_refuses_a_state_format_where_there_is_no_state_of_its_own(name):
    model = made(name) if name in MODELS else NemotronHForCausalLM(hybrid("*-"))
    with pytest.raises(ValueError, match="keeps no recurrent matrix"):
        Engine(model, batch_size=1, max_len=8, state_dtype=torch.bfloat16)


def test_states_in_bf16_take_half_the_bytes_and_change_little():
    model = made("jet-jetblock")
    engines = [Engine(model, batch_size=1, max_len=40, state_dtype=dtype) for dtype in (None, torch.bfloat16)]
    logits = [engine.prefill([PROMPTS[0]]).clone() for engine in engines]
    for _ in range(4):
        logits = [engine.step(torch.tensor([9], device=DEVICE)).clone() for engine in engines]
    error = (logits[1] - logits[0]).norm() / logits[0].norm()
    assert 0 < error < 0.05
    full, half = (engine.cache.nbytes() for engine in engines)
    assert full - half == 2 * 2 * (2 * 8 * 16)  # two layers, two bytes of each number of their matrices


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_the_memory_model_counts_states_of_either_format(kind, state_dtype):
    model = made(f"jet-{kind}")
    engine = Engine(model, batch_size=2, max_len=30, state_dtype=state_dtype)
    row = memory.kv_bytes(model.config, 30, model.dtype) + memory.state_bytes(model, state_dtype)
    assert engine.cache.nbytes() == 2 * row


def test_a_window_keeps_no_more_than_its_tokens():
    engine = Engine(made("gemma3"), batch_size=2, max_len=4096)
    assert [layer.keys.shape[2] for layer in engine.cache.layers] == [5, 4096, 5, 4096]


def test_the_memory_model_counts_what_is_allocated():
    for name in ("qwen2", "gemma3"):
        model = made(name)
        engine = Engine(model, batch_size=3, max_len=50)
        row = memory.kv_bytes(model.config, 50, model.dtype) + memory.state_bytes(model)
        assert engine.cache.nbytes() == 3 * row


def test_what_does_not_fit_is_refused_with_what_would(monkeypatch):
    model, state = made("jet-jetblock"), torch.bfloat16
    for options in ({"prefill_tokens": 64}, {"prefill_tokens": 640}, {"prefill_tokens": 640, "state_dtype": state}):
        options |= {"prefill_chunk": 64, "max_len": 100}
        rows = min(10, options["prefill_tokens"] // 64)
        need = memory.engine_bytes(model, 10, 100, rows * 64, options.get("state_dtype"))
        monkeypatch.setattr(memory, "available_bytes", lambda device, need=need: need)
        Engine(model, batch_size=10, **options)
        message = rf"11 sequences of 100 tokens needs .* {need:,} are there; the largest batch that fits is 10$"
        with pytest.raises(MemoryError, match=message):
            Engine(model, batch_size=11, **options)
        with pytest.raises(MemoryError, match="the largest batch that fits is 0, so shorten the context"):
            Engine(model, batch_size=1, **options | {"max_len": 10**5})


@pytest.mark.parametrize(
    ("prompts", "n_new", "message"),
    [
        ([], 1, "at least one token, got none"),
        ([[1], []], 1, "at least one token, got none or an empty one"),
        ([list(range(9))], 4, r"max_len = 12 tokens, got 9 \+ 4"),
    ],
)
def test_refuses_prompts_that_it_cannot_answer(prompts, n_new, message):
    with pytest.raises(ValueError, match=message):
        Engine(made("qwen2"), batch_size=2, max_len=12).generate(prompts, n_new)


def test_refuses_a_step_beyond_the_cache_and_sizes_below_one():
    engine = Engine(made("qwen2"), batch_size=1, max_len=3)
    engine.prefill([[1, 2, 3]])
    with pytest.raises(ValueError, match="max_len = 3 tokens and is full"):
        engine.step()
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        Engine(made("qwen2"), batch_size=0, max_len=3)
    with pytest.raises(ValueError, match="at most batch_size = 1 prompts at once, got 2"):
        engine.prefill([[1], [2]])


def test_the_largest_batch_is_tried_from_the_estimate_up_and_down():
    for limit in (1, 7, 100, 133):
        asked = []
        works = lambda batch, limit=limit, asked=asked: asked.append(batch) or batch <= limit  # noqa: E731
        found = memory.largest_batch(works, 100)
        assert found == limit and limit in asked
        assert len(asked) == len(set(asked)) < 60  # none twice: each is an engine
    assert memory.largest_batch(lambda batch: False, 50) == 0
