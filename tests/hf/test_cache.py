"""Specification of the cache: what it holds, and that its rows can be chosen, repeated and begun again."""

import pytest
import torch

from jetlab.hf import JetNemotronCache

HYBRID = ["jetblock", "attention", "sliding_attention", "retnet"]


def prefilled(model, ids, **options):
    cache = JetNemotronCache(model.config, **options)
    model(ids, past_key_values=cache)
    return cache


@torch.no_grad()
def test_the_length_is_known_whatever_the_first_layer_is(mixture, build_model, tokens):
    model = build_model(mixture)
    cache = JetNemotronCache(model.config)
    assert cache.get_seq_length() == 0
    for part in tokens(2, 7).split([5, 1, 1], 1):
        model(part, past_key_values=cache)
    assert cache.get_seq_length() == 7
    assert len(cache) == len(mixture)


@torch.no_grad()
def test_rows_can_be_reordered_chosen_and_repeated(mixture, build_model, tokens):
    model, ids, more = build_model(mixture), tokens(3, 6), tokens(3, 2, seed=2)
    together = model(torch.cat([ids, more], 1)).logits[:, -2:]

    cache = prefilled(model, ids)
    cache.reorder_cache(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(model(more[[2, 0, 1]], past_key_values=cache).logits, together[[2, 0, 1]])

    cache = prefilled(model, ids)
    cache.batch_select_indices(torch.tensor([2, 0]))
    torch.testing.assert_close(model(more[[2, 0]], past_key_values=cache).logits, together[[2, 0]])

    cache = prefilled(model, ids)
    cache.batch_repeat_interleave(2)
    twice = more.repeat_interleave(2, 0)
    torch.testing.assert_close(model(twice, past_key_values=cache).logits, together.repeat_interleave(2, 0))


@pytest.mark.parametrize("max_cache_len", [None, 12])
@torch.no_grad()
def test_a_reset_cache_is_as_good_as_new(max_cache_len, mixture, build_model, tokens):
    model, ids = build_model(mixture), tokens(2, 9, seed=2)
    cache = prefilled(model, tokens(2, 7), max_cache_len=max_cache_len)
    cache.reset()
    assert cache.get_seq_length() == 0
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


@torch.no_grad()
def test_a_static_cache_gives_what_a_growing_one_gives(mixture, build_model, padded):
    model, (ids, mask, _) = build_model(mixture), padded
    expected = model(ids, attention_mask=mask).logits
    cache, logits = JetNemotronCache(model.config, max_cache_len=11), []
    for start, end in ((0, 3), (3, 6), (6, 7), (7, 9)):  # across the edge of the window of 4
        logits.append(model(ids[:, start:end], attention_mask=mask[:, :end], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(logits, 1)[mask.bool()], expected[mask.bool()])


@torch.no_grad()
def test_tensors_of_a_static_cache_stay_where_they_are(build_model, tokens):
    model = build_model(HYBRID)
    cache = prefilled(model, tokens(2, 5), max_cache_len=10)
    assert cache.is_compileable

    def addresses():
        states = [x for i in (0, 3) for x in (cache.layers[i].state.recurrent,)]
        keys = [cache.layers[i].keys for i in (1, 2)]
        return [x.data_ptr() for x in states + keys]

    before = addresses()
    model(tokens(2, 1), past_key_values=cache)
    model(tokens(2, 1), past_key_values=cache)
    assert addresses() == before


@pytest.mark.parametrize("window", [1, 2, 5])
@pytest.mark.parametrize("max_cache_len", [None, 12])
@torch.no_grad()
def test_every_window_continues_from_the_cache(window, max_cache_len, build_model, tokens):
    sections = {"sliding_attention": {"window_size": window}}
    model = build_model(["sliding_attention"] * 2, efficient_attention_config=sections)
    ids = tokens(2, 12)
    cache = JetNemotronCache(model.config, max_cache_len)
    parts = [model(part, past_key_values=cache).logits for part in ids.split([3, 1, 1, 4, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(parts, 1), model(ids).logits)


@torch.no_grad()
def test_states_do_not_grow_and_windows_stop_growing(build_model, tokens):
    model = build_model(["jetblock", "sliding_attention", "rwkv7"])
    sizes = [prefilled(model, tokens(2, n)).nbytes() for n in (8, 16, 32)]
    assert sizes[0] == sizes[1] == sizes[2]
    layer = prefilled(model, tokens(2, 8)).layers[0].state
    assert layer.recurrent.shape == (2, 2, 8, 12)
    assert layer.conv[0].shape == (2, 24, 3)


@torch.no_grad()
def test_a_cache_with_states_cannot_be_cut_back_and_says_so_before_it_changes(build_model, tokens):
    model = build_model(["attention", "jetblock"])
    cache = prefilled(model, tokens(1, 5))
    with pytest.raises(ValueError, match=r"a recurrent state cannot be cut back.*got crop\(-2\); copy the cache"):
        cache.crop(-2)
    assert cache.layers[0].keys.shape[-2] == 5
    cache.crop(0)
    assert not cache.is_croppable


@torch.no_grad()
def test_a_cache_of_full_attention_alone_can_be_cut_back(build_model, tokens):
    model, ids = build_model(["attention", "attention"]), tokens(1, 8)
    cache = prefilled(model, ids[:, :6])
    cache.crop(-2)
    torch.testing.assert_close(model(ids[:, 4:], past_key_values=cache).logits, model(ids).logits[:, 4:])


@pytest.mark.parametrize("max_cache_len", [0, -3])
def test_a_static_cache_needs_room(max_cache_len, build_config):
    with pytest.raises(ValueError, match=rf"max_cache_len must be at least 1 token, got {max_cache_len}; None lets"):
        JetNemotronCache(build_config(HYBRID), max_cache_len)
