"""Attention of one token over a preallocated cache: PyTorch's form and the definition beside plain attention."""

import pytest
import torch
from torch.nn import functional as F

from jetlab.ops import decode_attention
from jetlab.ops.decode_attention import slot_positions


def inputs(B=2, H=6, HKV=2, C=20, D=8):
    rng = torch.Generator().manual_seed(0)
    return [
        torch.randn(*shape, generator=rng, dtype=torch.float64) for shape in ((B, H, D), (B, HKV, C, D), (B, HKV, C, D))
    ]


def test_slots_of_a_ring_hold_its_last_tokens():
    assert slot_positions(4, torch.tensor(2)).tolist() == [0, 1, -2, -1]
    assert slot_positions(4, torch.tensor(4)).tolist() == [0, 1, 2, 3]
    assert slot_positions(4, torch.tensor(6)).tolist() == [4, 5, 2, 3]


@pytest.mark.parametrize("backend", ["reference", "chunked"])
def test_sees_the_filled_slots_alone(backend):
    q, k, v = inputs()
    expected = F.scaled_dot_product_attention(q[:, :, None], k[:, :, :7], v[:, :, :7], scale=0.3, enable_gqa=True)
    k[:, :, 7:], v[:, :, 7:] = 1e3, 1e3
    y = decode_attention(q, k, v, end=torch.tensor(7), scale=0.3, backend=backend)
    torch.testing.assert_close(y, expected[:, :, 0])


@pytest.mark.parametrize("backend", ["reference", "chunked"])
@pytest.mark.parametrize("end", [15, 20, 33])
def test_rows_begin_where_their_start_says(backend, end):
    q, k, v = inputs()
    start = torch.tensor([0, end - 4])
    y = decode_attention(q, k, v, end=torch.tensor(end), start=start, backend=backend)
    slots = [(end - 1 - i) % 20 for i in range(4)]
    last = F.scaled_dot_product_attention(q[1:, :, None], k[1:, :, slots], v[1:, :, slots], enable_gqa=True)
    torch.testing.assert_close(y[1:], last[:, :, 0])
    torch.testing.assert_close(y[:1], decode_attention(q, k, v, end=torch.tensor(end), backend=backend)[:1])
