"""Specification of the Jet-Nemotron model: what each layer computes, and what one call owes to another."""

import copy
import math
import pickle

import pytest
import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, Qwen2Config, Qwen2ForCausalLM
from transformers.masking_utils import flash_attention_mask

from jetlab.hf import JetNemotronCache, JetNemotronForCausalLM, JetNemotronModel
from jetlab.hf.modeling_jet_nemotron import create_masks
from jetlab.layers import MIXERS

HYBRID = ["jetblock", "attention", "sliding_attention", "gated_deltanet"]
EVERY_KIND = list(MIXERS)
SHARED_WITH_QWEN2 = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads
    rms_norm_eps max_position_embeddings tie_word_embeddings""".split()


@torch.no_grad()
def test_tokens_then_one_more_equal_all_at_once(mixture, build_model, tokens):
    model, ids = build_model(mixture), tokens(2, 14)
    expected = model(ids, use_cache=False).logits
    cache, logits = None, []
    for part in ids.split([6, 1, 3, 1, 1, 2], dim=1):
        output = model(part, past_key_values=cache)
        logits.append(output.logits)
        cache = output.past_key_values
    torch.testing.assert_close(torch.cat(logits, 1), expected)
    assert cache.get_seq_length() == 14


@torch.no_grad()
def test_padding_on_the_left_changes_nothing_at_once_or_in_parts(mixture, build_model, padded):
    model, (ids, mask, rows) = build_model(mixture), padded
    at_once = model(ids, attention_mask=mask).logits
    for step in (1, 4):  # token by token some rows have yet to begin
        cache, logits = None, []
        for end in range(step, 10, step) if step == 1 else (4, 8, 9):
            start = 0 if cache is None else cache.get_seq_length()
            output = model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            logits.append(output.logits)
            cache = output.past_key_values
        in_parts = torch.cat(logits, 1)
        for i, row in enumerate(rows):
            alone = model(row).logits[0]
            torch.testing.assert_close(at_once[i, -len(alone) :], alone)
            torch.testing.assert_close(in_parts[i, -len(alone) :], alone)


@torch.no_grad()
def test_the_future_does_not_change_the_past(mixture, build_model, tokens):
    model, ids = build_model(mixture), tokens(2, 12)
    changed = ids.clone()
    changed[:, 8:] = tokens(2, 4, seed=2)
    before, after = (model(x).logits for x in (ids, changed))
    torch.testing.assert_close(after[:, :8], before[:, :8], rtol=0, atol=1e-12)
    assert (after[:, 8:] - before[:, 8:]).abs().max() > 1e-3


def test_the_norm_rounds_once_after_its_weight(build_model):
    norm = build_model(["attention"]).model.norm.bfloat16()
    x = torch.randn(500, 32, generator=torch.Generator().manual_seed(2)).bfloat16()
    exact = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-6).sqrt() * norm.weight.double()
    # Rounded before the weight as well, as Qwen2 does it, a quarter of the numbers would be off by a last bit.
    assert (norm(x) != exact.bfloat16()).double().mean() < 1e-3


@torch.no_grad()
def test_packed_documents_equal_each_document_alone(mixture, build_model, tokens):
    model, documents = build_model(mixture), [tokens(1, n, seed=n) for n in (1, 7, 5)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    logits = model(torch.cat(documents, 1), position_ids=positions).logits
    alone = torch.cat([model(x).logits for x in documents], 1)
    torch.testing.assert_close(logits, alone)


def row_of_documents(tokens):
    documents = [tokens(1, n, seed=n) for n in (1, 7, 5)]
    positions = torch.cat([torch.arange(x.shape[1]) for x in documents])[None]
    return documents, torch.cat(documents, 1), positions


@torch.no_grad()
def test_the_ends_of_packed_documents_say_what_positions_say(mixture, build_model, tokens):
    model, (_, ids, positions) = build_model(mixture), row_of_documents(tokens)
    ends = torch.tensor([0, 1, 8, 13], dtype=torch.int32)
    logits = model(ids, cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=7, max_length_k=7).logits
    torch.testing.assert_close(logits, model(ids, position_ids=positions).logits)


@torch.no_grad()
def test_packed_documents_are_seen_by_a_compiled_model(build_model, tokens):
    torch._dynamo.reset()
    model, (documents, ids, positions) = build_model(HYBRID), row_of_documents(tokens)
    logits = torch.compile(model, backend="eager")(ids, position_ids=positions, use_cache=False).logits
    torch.testing.assert_close(logits, torch.cat([model(x).logits for x in documents], 1))


def test_flash_attention_is_told_where_packed_documents_begin(build_model, tokens):
    """With the library's flash attention, which runs on a GPU alone, in place of which a function notes what it gets."""
    model, (_, ids, positions) = build_model(["attention", "sliding_attention", "jetblock"]), row_of_documents(tokens)
    calls = []

    def flash(module, q, k, v, mask, **given):
        calls.append((mask, given["position_ids"], given["sliding_window"], given["scaling"]))
        return q.transpose(1, 2), None

    AttentionInterface.register("noted_flash", flash)
    AttentionMaskInterface.register("noted_flash", flash_attention_mask)
    model.config._attn_implementation = "noted_flash"
    model(ids, position_ids=positions)
    (mask, seen, window, scaling), (_, _, narrow, _) = calls
    assert mask is None
    assert torch.equal(seen, positions)
    assert (window, narrow, scaling) == (None, 4, 8**-0.5)


class TestAttention:
    def test_a_model_of_attention_alone_equals_qwen2(self, build_model, tokens):
        kinds = ["attention", "sliding_attention", "attention"]
        model = build_model(kinds).float()
        config = Qwen2Config(
            **{name: getattr(model.config, name) for name in SHARED_WITH_QWEN2},
            rope_parameters={"rope_type": "default", "rope_theta": model.config.rope_theta},
            use_sliding_window=True,
            sliding_window=4,
            layer_types=["full_attention", "sliding_attention", "full_attention"],
        )
        qwen = Qwen2ForCausalLM(config).eval()
        qwen.load_state_dict(model.state_dict())
        ids = tokens(2, 11)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        actual = model(ids, attention_mask=mask).logits
        expected = qwen(ids, attention_mask=mask, position_ids=positions).logits
        torch.testing.assert_close(actual[0], expected[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(actual[1, 3:], expected[1, 3:], atol=1e-5, rtol=1e-5)

    @pytest.mark.parametrize("window", [1, 2, 4])
    @torch.no_grad()
    def test_the_window_holds_this_many_keys_with_the_current_token(self, window, build_model, tokens):
        sections = {"sliding_attention": {"window_size": window}}
        model = build_model(["sliding_attention"], efficient_attention_config=sections)
        ids = tokens(1, 8)
        last = model(ids).logits[0, -1]

        def changed_at(position):
            other = ids.clone()
            other[0, position] = (other[0, position] + 1) % 40 + 2
            return (model(other).logits[0, -1] - last).abs().max()

        assert changed_at(8 - window) > 1e-3
        if window > 1:
            assert changed_at(8 - window - 1) == 0

    @pytest.mark.parametrize("attention_bias", [True, False])
    def test_biases_are_on_queries_keys_and_values_alone(self, attention_bias, build_model):
        names = {name for name, _ in build_model(["attention"], attention_bias=attention_bias).named_parameters()}
        biases = {f"model.layers.0.self_attn.{x}_proj.bias" for x in "qkv"}
        assert {name for name in names if name.endswith("bias")} == (biases if attention_bias else set())

    @torch.no_grad()
    def test_eager_attention_equals_sdpa_and_shows_its_weights(self, build_model, padded):
        model, (ids, mask, _) = build_model(HYBRID), padded
        expected = model(ids, attention_mask=mask).logits
        model.set_attn_implementation("eager")
        output = model(ids, attention_mask=mask, output_attentions=True)
        real = mask.bool()
        torch.testing.assert_close(output.logits[real], expected[real])
        assert len(output.attentions) == 2  # the linear layers have none
        torch.testing.assert_close(output.attentions[0].sum(-1)[0], torch.ones(4, 9).double())


class TestJetBlock:
    """One layer in fp64 against loops over tokens, heads and channels, written from the equations."""

    @staticmethod
    def by_loops(w, x, H, K, V, W, eps):
        silu, T = F.silu, len(x)
        q, k = silu(x @ w["q_proj.weight"].T), silu(x @ w["k_proj.weight"].T)
        v, z = x @ w["v_proj.weight"].T, x @ w["g_proj.weight"].T
        beta = torch.sigmoid(x @ w["b_proj.weight"].T)
        g = -w["A_log"].exp() * F.softplus(x @ w["a_proj.weight"].T + w["dt_bias"])
        generator = "dynamic_conv1d.kernel_generator."
        taps = silu(x @ w[generator + "w1.weight"].T) @ w[generator + "w2.weight"].T + w[generator + "w2.bias"]
        state, rows = [torch.zeros(K, V).double() for _ in range(H)], []
        for t in range(T):
            convolved = torch.zeros(H * V).double()
            for channel in range(H * V):
                for j in range(W):
                    if t - W + 1 + j >= 0:
                        convolved[channel] += taps[t, channel * W + j] * v[t - W + 1 + j, channel]
            heads = []
            for h in range(H):
                q_h, k_h = (y[t, h * K : (h + 1) * K] for y in (q, k))
                q_h, k_h = (y / torch.sqrt((y * y).sum() + 1e-6) for y in (q_h, k_h))
                decayed = torch.exp(g[t, h]) * state[h]
                correction = beta[t, h] * (silu(convolved[h * V : (h + 1) * V]) - k_h @ decayed)
                state[h] = decayed + torch.outer(k_h, correction)
                o = (q_h / math.sqrt(K)) @ state[h]
                o = o / torch.sqrt((o * o).mean() + eps) * w["o_norm.weight"]
                heads.append(o * silu(z[t, h * V : (h + 1) * V]))
            rows.append(w["o_proj.weight"] @ torch.cat(heads))
        return torch.stack(rows)

    @torch.no_grad()
    def test_the_layer_equals_plain_loops(self, build_model):
        model = build_model(
            ["jetblock"],
            efficient_attention_config={
                "jet": {
                    "num_heads": 2,
                    "head_dim": 6,
                    "expand_v": 1.5,
                    "norm_eps": "1e-3",
                    "dconv_generator_reduction": 3,
                }
            },
        )
        layer = model.model.layers[0].self_attn
        assert layer.dynamic_conv1d.kernel_generator.w1.weight.shape == (18 // 3, 32)
        x = torch.randn(1, 9, 32, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
        expected = self.by_loops(dict(layer.named_parameters()), x[0], H=2, K=6, V=9, W=4, eps=1e-3)
        torch.testing.assert_close(layer(x)[0][0], expected, rtol=1e-9, atol=1e-9)


class TestStart:
    """What a new model begins with: the mixers' own values, and N(0, initializer_range²) elsewhere."""

    def test_mixers_keep_the_start_that_they_drew(self, build_config):
        torch.manual_seed(0)
        model = JetNemotronForCausalLM(build_config(["jetblock", "mamba2", "rwkv7"], initializer_range=7.0))
        jetblock, mamba2, rwkv7 = (layer.self_attn for layer in model.model.layers)
        assert jetblock.dynamic_conv1d.kernel_generator.w2.weight.eq(0).all()
        assert jetblock.dynamic_conv1d.kernel_generator.w2.bias.view(-1, 4)[:, -1].mean().round() == 1
        assert jetblock.A_log.dtype == torch.float32
        assert jetblock.A_log.min() >= math.log(1e-4)
        assert jetblock.A_log.max() <= math.log(16)
        assert jetblock.q_proj.weight.std() < 1
        assert mamba2.D.eq(1).all()
        assert rwkv7.k_a.eq(1.02).all()
        assert 6 < model.model.layers[0].mlp.up_proj.weight.std() < 8
        assert model.model.embed_tokens.weight[0].eq(0).all()  # the padding token
        assert model.model.norm.weight.eq(1).all()

    def test_the_same_seed_gives_the_same_model(self, build_config):
        models = []
        for _ in range(2):
            torch.manual_seed(5)
            models.append(JetNemotronForCausalLM(build_config(EVERY_KIND)))
        for (name, a), b in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
            assert torch.equal(a, b), name

    def test_the_meta_device_holds_shapes_alone(self, build_config):
        with torch.device("meta"):
            model = JetNemotronForCausalLM(build_config(EVERY_KIND))
        assert all(p.is_meta for p in model.parameters())

    def test_rwkv7_knows_its_depth_and_its_first_layer(self, build_config):
        model = JetNemotronForCausalLM(build_config(["attention", "rwkv7", "jetblock", "rwkv7"]))
        first, later = model.model.layers[1].self_attn, model.model.layers[3].self_attn
        assert first.v_lora is None
        assert later.v_lora is not None
        assert (first.layer_idx, later.layer_idx) == (1, 3)


class TestInterface:
    @torch.no_grad()
    def test_logits_to_keep_chooses_tokens(self, build_model, tokens):
        model, ids = build_model(HYBRID), tokens(2, 7)
        logits = model(ids).logits
        torch.testing.assert_close(model(ids, logits_to_keep=2).logits, logits[:, -2:])
        torch.testing.assert_close(model(ids, logits_to_keep=torch.tensor([0, 3])).logits, logits[:, [0, 3]])

    @torch.no_grad()
    def test_embeddings_stand_for_ids(self, build_model, tokens):
        model, ids = build_model(HYBRID), tokens(2, 7)
        embedded = model(inputs_embeds=model.get_input_embeddings()(ids)).logits
        torch.testing.assert_close(embedded, model(ids).logits)

    @torch.no_grad()
    def test_hidden_states_are_those_before_between_and_after_the_layers(self, build_model, tokens):
        model, ids = build_model(HYBRID), tokens(2, 7)
        output = model(ids, output_hidden_states=True)
        assert len(output.hidden_states) == 5
        torch.testing.assert_close(output.hidden_states[0], model.model.embed_tokens(ids))
        torch.testing.assert_close(model.lm_head(output.hidden_states[-1]), output.logits)
        first = model.model.layers[0]
        y, _ = first.self_attn(first.input_layernorm(output.hidden_states[0]))
        x = output.hidden_states[0] + y
        torch.testing.assert_close(output.hidden_states[1], x + first.mlp(first.post_attention_layernorm(x)))

    @torch.no_grad()
    def test_the_loss_is_the_mean_cross_entropy_of_the_next_token(self, build_model, tokens):
        model, ids = build_model(HYBRID), tokens(2, 7)
        labels = ids.clone()
        labels[0, :4] = -100
        output = model(ids, labels=labels)
        expected = F.cross_entropy(output.logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        torch.testing.assert_close(output.loss.float(), expected)

    @torch.no_grad()
    # A number is off by up to 2^-9 in bf16, 2^-12 in fp16; seven layers of a dozen steps measure 0.044 and 0.0055.
    @pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 0.06), (torch.float16, 0.0075)])
    def test_half_precision_stays_near(self, dtype, bound, mixture, build_model, tokens):
        half, ids = build_model(mixture).to(dtype), tokens(2, 20)
        logits = half(ids).logits
        assert logits.dtype == dtype
        expected = half.float()(ids).logits  # the same weights: what differs is the arithmetic
        error = (logits.float() - expected).norm() / expected.norm()
        assert error < bound

    @torch.no_grad()
    def test_embeddings_can_be_resized(self, build_model, tokens, tmp_path):
        model, ids = build_model(HYBRID), tokens(2, 7)
        before = model(ids).logits
        model.resize_token_embeddings(60)
        assert model.config.vocab_size == 60
        assert model.lm_head.weight is model.model.embed_tokens.weight
        torch.testing.assert_close(model(ids).logits[..., :48], before)
        model.resize_token_embeddings(40)
        assert model.get_output_embeddings().weight.shape == (40, 32)
        expected = model(ids % 40).logits
        model.save_pretrained(tmp_path)
        torch.testing.assert_close(JetNemotronForCausalLM.from_pretrained(tmp_path)(ids % 40).logits, expected)

    @torch.no_grad()
    def test_a_copy_computes_the_same(self, mixture, build_model, tokens):
        model, ids = build_model(mixture), tokens(2, 7)
        for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            torch.testing.assert_close(copied(ids).logits, model(ids).logits)

    def test_embeddings_are_tied_or_not(self, build_model, tokens):
        tied, untied = (build_model(HYBRID, tie_word_embeddings=tie) for tie in (True, False))
        assert tied.lm_head.weight is tied.model.embed_tokens.weight
        assert untied.lm_head.weight is not untied.model.embed_tokens.weight
        assert untied.num_parameters() - tied.num_parameters() == 48 * 32
        untied.config.tie_word_embeddings = True
        untied.tie_weights()
        assert untied.lm_head.weight is untied.model.embed_tokens.weight

    @torch.no_grad()
    def test_the_decoder_without_head_ends_with_the_norm(self, build_config, build_model, tokens):
        model, ids = build_model(HYBRID), tokens(1, 5)
        decoder = JetNemotronModel(build_config(HYBRID)).double().eval()
        decoder.load_state_dict(model.model.state_dict())
        torch.testing.assert_close(model.lm_head(decoder(ids).last_hidden_state), model(ids).logits)


def test_a_mask_that_hides_nothing_costs_linear_layers_nothing(build_model, padded):
    model, (ids, mask, _) = build_model(["jetblock"]), padded
    x = model.get_input_embeddings()(ids)
    assert create_masks(model.config, x, torch.ones_like(mask), None) == {"linear": None}
    assert torch.equal(create_masks(model.config, x[:, 5:], mask, None)["linear"], mask[:, 5:])


class TestCompiled:
    @staticmethod
    def check(model, ids, mask):
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=False)
        real = mask.bool()
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(compiled(ids, attention_mask=mask, use_cache=False).logits[real], expected[real])

    @torch.no_grad()
    def test_the_forward_is_one_graph_and_equals_eager(self, build_model, padded):
        self.check(build_model(["jetblock", "attention", "sliding_attention"]), *padded[:2])

    @pytest.mark.slow
    @torch.no_grad()
    def test_the_forward_of_every_kind_is_one_graph_and_equals_eager(self, mixture, build_model, padded):
        self.check(build_model(mixture), *padded[:2])

    @pytest.mark.slow
    @torch.no_grad()
    def test_a_step_of_decoding_with_a_static_cache_is_one_graph(self, mixture, build_model, tokens):
        torch._dynamo.reset()
        model, ids = build_model(mixture), tokens(2, 9)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        cache = JetNemotronCache(model.config, max_cache_len=12)
        model(ids[:, :5], past_key_values=cache)
        steps = []
        for t in range(5, 9):
            position = torch.tensor([[t]])
            masks = model.create_masks_for_generate(model.config, torch.empty(2, 1, 0), None, cache, position)
            output = compiled(ids[:, t : t + 1], attention_mask=masks, position_ids=position, past_key_values=cache)
            steps.append(output.logits)
        torch.testing.assert_close(torch.cat(steps, 1), model(ids).logits[:, 5:])

    @pytest.mark.slow
    @torch.no_grad()
    def test_inductor_equals_eager(self, build_model, tokens):
        torch._dynamo.reset()
        model, ids = build_model(HYBRID).float(), tokens(2, 9)
        compiled = torch.compile(model)
        torch.testing.assert_close(compiled(ids).logits, model(ids).logits, atol=1e-4, rtol=1e-4)


class TestBadInput:
    @pytest.mark.parametrize("inputs", [{}, {"input_ids": torch.tensor([[1]]), "inputs_embeds": torch.zeros(1, 1, 32)}])
    def test_ids_and_embeddings_exclude_each_other(self, inputs, build_model):
        with pytest.raises(ValueError, match=r"give one of input_ids and inputs_embeds, got both or neither"):
            build_model(HYBRID)(**inputs)

    def test_a_foreign_cache_is_refused(self, build_model, tokens):
        with pytest.raises(ValueError, match=r"past_key_values must be a JetNemotronCache, got a DynamicCache; pass"):
            build_model(HYBRID)(tokens(1, 3), past_key_values=DynamicCache())

    def test_a_mask_that_forgets_the_cached_tokens_is_refused(self, build_model, tokens):
        model = build_model(HYBRID)
        cache = model(tokens(1, 3)).past_key_values
        with pytest.raises(
            ValueError, match=r"a column for each of 3 tokens in the cache and 2 new ones, got \[1, 2\]"
        ):
            model(tokens(1, 2), attention_mask=torch.ones(1, 2), past_key_values=cache)

    def test_a_cache_of_another_architecture_is_refused(self, build_model, build_config, tokens):
        cache = JetNemotronCache(build_config(["attention", "jetblock"]))
        with pytest.raises(
            ValueError, match=r"made for this model's layer_kinds, .*got a cache for \['attention', 'jetb"
        ):
            build_model(HYBRID)(tokens(1, 3), past_key_values=cache)

    def test_a_mask_of_another_batch_is_refused(self, build_model, tokens):
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, past \+ T\] with B = 2 rows, got \[3, 4\]"):
            build_model(HYBRID)(tokens(2, 4), attention_mask=torch.ones(3, 4))

    def test_positions_of_another_length_are_refused(self, build_model, tokens):
        with pytest.raises(ValueError, match=r"position_ids must be \[B or 1, T\] with T = 4 new tokens, got \[1, 3\]"):
            build_model(HYBRID)(tokens(2, 4), position_ids=torch.arange(3)[None])

    def test_a_mask_of_pairs_is_refused_by_linear_layers(self, build_model, tokens):
        with pytest.raises(ValueError, match=r"attention_mask must be \[B, T\].*got \[1, 1, 3, 3\]"):
            build_model(HYBRID)(tokens(1, 3), attention_mask=torch.zeros(1, 1, 3, 3))

    def test_packed_documents_in_several_rows_are_refused(self, build_model, tokens):
        with pytest.raises(ValueError, match=r"position_ids must rise by 1 in each row of a batch.*got \[2, 4\]"):
            build_model(HYBRID)(tokens(2, 4), position_ids=torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]]))
