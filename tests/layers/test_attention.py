"""Specification of attention as a token mixer: whole, and seen through a window with a state that stops growing."""

from itertools import pairwise

import pytest
import torch
from transformers import Qwen2Config
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RotaryEmbedding

from jetlab.layers import MIXERS
from jetlab.layers.state import select

D, WINDOW = 24, 5
CONFIG = Qwen2Config(
    hidden_size=D,
    num_attention_heads=4,
    num_key_value_heads=2,
    num_hidden_layers=1,
    intermediate_size=8,
    vocab_size=8,
    attn_implementation="sdpa",
)


def build(window=WINDOW, *, own_window=None):
    """The same random layer at every call, in fp64; whole attention if `window` is None."""
    torch.manual_seed(0)
    inner = Qwen2Attention(CONFIG, layer_idx=0).double().eval().requires_grad_(False)
    inner.sliding_window = own_window
    rotary = Qwen2RotaryEmbedding(CONFIG)
    if window is None:
        return MIXERS["attention"].from_attention(inner, rotary)
    return MIXERS["sliding_attention"].from_attention(inner, rotary, window=window)


def tokens(B, T, seed=1):
    return torch.randn(B, T, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)  # the rotation's tables are fp32


def test_each_token_sees_what_attention_sees_of_its_window_alone():
    x = tokens(1, 17)
    y, _ = build()(x)
    for t in range(17):
        start = max(0, t - WINDOW + 1)
        alone, _ = build(None)(x[:, start : t + 1])  # rotation is relative: where the window starts does not matter
        assert_close(y[:, t], alone[:, -1])


def test_a_window_as_long_as_the_text_is_attention_itself():
    x = tokens(2, 9)
    assert_close(build(9)(x)[0], build(None)(x)[0])


@pytest.mark.parametrize("window", [1, 4, WINDOW, 7, 30])
@pytest.mark.parametrize("parts", [(12, 1, 1, 1, 1, 4), (1, 3, 16), (2, 2, 16)], ids=["steps", "chunks", "short-first"])
def test_tokens_then_more_equal_all_at_once_and_the_state_keeps_a_window(window, parts):
    mixer, x = build(window), tokens(2, 20)
    expected, _ = mixer(x)
    outputs, state, seen = [], None, 0
    for part in x.split(parts, dim=1):
        y, state = mixer(part, state)
        outputs.append(y)
        seen += part.shape[1]
        assert state.k.shape == state.v.shape == (2, 2, min(seen, window), 6)
        assert 2 * mixer.state_bytes(seen, torch.float64) == state.k.nbytes + state.v.nbytes
        assert state.k.untyped_storage().nbytes() == state.k.nbytes  # nothing longer is kept alive behind it
    assert_close(torch.cat(outputs, 1), expected)


def test_padding_on_the_left_takes_no_place_in_the_window_first_or_later():
    mixer, x = build(), tokens(1, 12)
    expected, _ = mixer(x)
    noise, none, some = tokens(1, 3, seed=2), torch.zeros(1, 3), torch.ones(1, 12)
    y1, state = mixer(torch.cat([noise, x[:, :7]], 1), mask=torch.cat([none, some[:, :7]], 1))
    y2, state = mixer(torch.cat([noise, x[:, 7:10]], 1), state, mask=torch.cat([none, some[:, 7:10]], 1))
    y3, state = mixer(x[:, 10:], state)
    assert_close(torch.cat([y1[:, 3:], y2[:, 3:], y3], 1), expected)
    assert state.real.all() and state.k.shape[2] == WINDOW


def test_a_padded_batch_equals_its_rows_alone_step_by_step():
    mixer, lengths = build(), (9, 4, 1)
    rows = [tokens(1, n + 6, seed=n) for n in lengths]
    batch = torch.cat([torch.cat([torch.ones(1, 9 - n, D), x[:, :n]], 1) for x, n in zip(rows, lengths, strict=True)])
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in lengths])
    y, state = mixer(batch, mask=mask)
    outputs = [y]
    for step in range(6):
        y, state = mixer(torch.cat([x[:, n + step, None] for x, n in zip(rows, lengths, strict=True)]), state)
        outputs.append(y)
    y = torch.cat(outputs, 1)
    for i, x in enumerate(rows):
        assert_close(y[i : i + 1, 9 - lengths[i] :], mixer(x)[0])


def test_rows_of_the_state_may_be_chosen_and_repeated():
    mixer, x = build(), tokens(2, 8)
    _, state = mixer(x)
    more, rows = tokens(3, 3, seed=2), torch.tensor([1, 0, 1])
    assert_close(mixer(more, select(state, rows))[0], mixer(torch.cat([x[rows], more], 1))[0][:, 8:])


def test_a_layer_that_came_with_a_narrower_window_keeps_it():
    x = tokens(1, 12)
    assert_close(build(8, own_window=3)(x)[0], build(3)(x)[0])
    assert build(8, own_window=3).state_bytes(20) == build(3).state_bytes(20)


@pytest.mark.parametrize("window", [0, -1, 2.5])
def test_a_window_without_a_token_is_refused(window):
    with pytest.raises(ValueError, match=rf"window must be a whole number ≥ 1, .* got {window}; use kind 'attention'"):
        build(window)


@pytest.mark.parametrize("window", [None, WINDOW])
def test_packed_documents_see_themselves_alone_from_position_0(window):
    mixer, x, ends = build(window), tokens(2, 12), [0, 1, 8, 12, 24]  # over both rows laid end to end
    y, state = mixer(x, cu_seqlens=torch.tensor(ends))
    line = x.view(1, 24, D)
    alone = torch.cat([mixer(line[:, a:b])[0] for a, b in pairwise(ends)], dim=1)
    assert_close(y, alone.view_as(y))
    assert state is None


def test_packed_documents_take_neither_state_nor_padding():
    mixer, x, ends = build(None), tokens(1, 4), torch.tensor([0, 2, 4])
    with pytest.raises(ValueError, match="packed documents carry no state and hold no padding"):
        mixer(x, mask=torch.ones(1, 4), cu_seqlens=ends)
    with pytest.raises(ValueError, match="packed documents carry no state and hold no padding"):
        mixer(x, mixer(x)[1], cu_seqlens=ends)
