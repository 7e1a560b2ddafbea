"""Specification of generation: the same text cached and uncached, batched and alone, at once and continued."""

import copy

import pytest
import torch

from jetlab.hf import JetNemotronCache

HYBRID = ["jetblock", "attention", "sliding_attention", "mamba2"]
WAYS = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "top_k": 0, "temperature": 1.5},
    "beam": {"do_sample": False, "num_beams": 3},
    "every-beam-to-its-end": {
        "num_beams": 3,
        "num_return_sequences": 3,
        "eos_token_id": [5, 9],
        "early_stopping": True,
    },
    "several-samples": {"do_sample": True, "num_return_sequences": 2},
}
ways = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


def generate(model, ids, **options):
    torch.manual_seed(7)
    return model.generate(ids, max_new_tokens=options.pop("max_new_tokens", 8), **options)


@ways
def test_the_text_is_the_same_cached_and_uncached(way, mixture, build_model, padded):
    model, (ids, mask, _) = build_model(mixture), padded
    uncached = generate(model, ids, attention_mask=mask, use_cache=False, **way)
    assert torch.equal(generate(model, ids, attention_mask=mask, **way), uncached)
    assert len(uncached[:, 9:].unique()) > 4  # a text that depends on what came before


@ways
def test_the_text_is_the_same_with_a_static_cache(way, mixture, build_model, padded):
    model, (ids, mask, _) = build_model(mixture), padded
    grown = generate(model, ids, attention_mask=mask, **way)
    assert torch.equal(generate(model, ids, attention_mask=mask, cache_implementation="static", **way), grown)


@pytest.mark.parametrize("name", ["greedy", "beam"])
def test_a_padded_batch_gives_each_row_what_it_gets_alone(name, mixture, build_model, padded):
    model, (ids, mask, rows) = build_model(mixture), padded
    together = generate(model, ids, attention_mask=mask, **WAYS[name])
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 9:], generate(model, row, **WAYS[name])[0, row.shape[1] :])


def test_a_text_is_continued_from_its_cache(mixture, build_model, tokens):
    model, ids = build_model(mixture), tokens(2, 5)
    expected = generate(model, ids, max_new_tokens=12, do_sample=False)
    first = generate(model, ids, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    again = generate(model, first.sequences, max_new_tokens=7, do_sample=False, past_key_values=first.past_key_values)
    assert torch.equal(again, expected)


def test_one_read_context_serves_several_questions(build_model, tokens):
    model, context = build_model(HYBRID), tokens(1, 9)
    cache = JetNemotronCache(model.config)
    with torch.no_grad():
        model(context, past_key_values=cache)
    for seed in (2, 3):
        ids = torch.cat([context, tokens(1, 3, seed=seed)], 1)
        from_cache = generate(model, ids, past_key_values=copy.deepcopy(cache), do_sample=False)
        assert torch.equal(from_cache, generate(model, ids, do_sample=False))


def test_a_static_cache_of_ones_own_is_used(build_model, tokens):
    model, ids = build_model(HYBRID), tokens(2, 5)
    cache = JetNemotronCache(model.config, max_cache_len=20)
    assert torch.equal(generate(model, ids, past_key_values=cache), generate(model, ids))
    assert cache.get_seq_length() == 12  # the last of 8 new tokens has not been read


def test_generation_begins_from_embeddings_as_from_ids(build_model, tokens):
    model, ids = build_model(HYBRID), tokens(2, 5)
    embeddings = model.get_input_embeddings()(ids)
    new = generate(model, None, inputs_embeds=embeddings, do_sample=False)
    assert torch.equal(new, generate(model, ids, do_sample=False)[:, 5:])


def test_generation_stops_at_the_end_token(build_model, tokens):
    model, ids = build_model(HYBRID), tokens(1, 5)
    free = generate(model, ids, do_sample=False)[0, 5:]
    end = int(free[3])
    stopped = generate(model, ids, do_sample=False, eos_token_id=end)[0, 5:]
    assert stopped.tolist() == free[: free.tolist().index(end) + 1].tolist()


def test_a_cache_that_holds_only_keys_and_values_is_refused(build_model, tokens):
    with pytest.raises(ValueError, match=r"cache_implementation must be 'dynamic' or 'static', got 'offloaded'"):
        generate(build_model(HYBRID), tokens(1, 3), cache_implementation="offloaded")


def test_assisted_generation_is_refused(build_model, tokens):
    model = build_model(HYBRID)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        generate(model, tokens(1, 3), assistant_model=build_model(["attention"]))
