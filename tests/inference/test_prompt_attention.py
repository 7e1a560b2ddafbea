"""A prompt's attention: what each token sees, however the prompt is cut and padded."""

import pytest
import torch
from torch.nn import functional as F

from jetlab.inference import attention


@pytest.mark.parametrize("past", [0, 5, 40])
@pytest.mark.parametrize("window", [None, 1, 7, 100])
def test_a_prompts_attention_sees_what_it_should_however_it_is_cut(past, window, monkeypatch):
    rng = torch.Generator().manual_seed(0)
    kept = past if window is None else min(past, window - 1)
    T, S = 23, kept + 23
    q, k, v = (torch.randn(2, heads, n, 8, generator=rng, dtype=torch.float64) for heads, n in ((4, T), (2, S), (2, S)))
    position, key = torch.arange(past, past + T)[:, None], torch.arange(past - kept, past + T)
    for start in (None, torch.tensor([0, 3])):
        visible = (key <= position) & (key > position - (window or 10**6))
        visible = visible.expand(2, 1, T, S)
        if start is not None:
            visible = visible & (key >= start[:, None, None, None]) | (key == position)
        expected = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=0.3, enable_gqa=True)
        for limit in (2**28, 1):  # at once, and a query at a time
            monkeypatch.setattr(attention, "MASK_BYTES", limit)
            y = attention.prompt_attention(q, k, v, past=past, start=start, window=window, scale=0.3)
            torch.testing.assert_close(y, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN's attention is a GPU's")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 16, 8, 512, 1536, 128), (2, 12, 2, 300, 700, 128), (1, 32, 8, 256, 1024, 64)])
def test_two_parts_on_a_gpu_are_one_softmax(shape, dtype):
    B, H, HKV, T, S, D = shape
    q, k, v = (torch.randn(B, heads, n, D, device="cuda", dtype=dtype) for heads, n in ((H, T), (HKV, S), (HKV, S)))
    y = attention.prompt_attention(q, k, v, past=S - T, start=None, window=None, scale=D**-0.5)
    visible = torch.arange(S, device="cuda") <= torch.arange(S - T, S, device="cuda")[:, None]
    exact = F.scaled_dot_product_attention(*(x.double() for x in (q, k, v)), attn_mask=visible, enable_gqa=True)
    assert (y - exact).norm() < 1e-2 * exact.norm()
