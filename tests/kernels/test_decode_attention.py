"""Specification of a token's attention over a preallocated cache: any length, rings, rows that begin at different tokens."""

import itertools

import pytest
import torch
from compare import relative_error

from jetlab.ops import decode_attention


def inputs(B, H, HKV, C, D, *, device, dtype=torch.float32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    q, keys, values = (
        torch.randn(*shape, generator=rng).to(device, dtype) for shape in ((B, H, D), (B, HKV, C, D), (B, HKV, C, D))
    )
    return {"q": q, "keys": keys, "values": values}


def counted(*numbers, device):
    return torch.tensor(numbers[0] if len(numbers) == 1 else numbers, device=device)


def error_of(tensors, end, start=None, *, poison=True):
    """Against the definition in fp64; slots that hold no token yet are NaN for the kernel, which must not read them."""
    exact = {name: x.double() for name, x in tensors.items()}
    expected = decode_attention(**exact, end=end, start=start, backend="reference")
    C, n = tensors["keys"].shape[2], int(end)
    if poison and n < C:
        for name in ("keys", "values"):
            tensors[name][:, :, n:] = torch.nan
    return relative_error(decode_attention(**tensors, end=end, start=start, backend="triton"), expected)


@pytest.mark.parametrize(
    "shape",
    [
        pytest.param((1, 1, 1, 40, 16), id="one-head"),
        pytest.param((2, 6, 2, 300, 32), id="groups-of-three"),
        pytest.param((1, 4, 4, 70, 24), id="no-groups-width-no-power-of-two"),
        pytest.param((1, 20, 1, 33, 8), id="group-beyond-a-tile"),
    ],
)
@pytest.mark.parametrize("filled", [1, 0.5, 1.0])
def test_equals_the_definition_at_any_length(shape, filled, device):
    tensors = inputs(*shape, device=device)
    end = 1 if filled == 1 and isinstance(filled, int) else int(filled * shape[3])
    assert error_of(tensors, counted(end, device=device)) < 1e-5


def test_a_ring_shows_its_last_tokens_wherever_they_lie(device):
    tensors = inputs(2, 4, 2, 40, 16, device=device)
    for end in (41, 57, 80, 163):
        assert error_of(tensors, counted(end, device=device)) < 1e-5


def test_rows_begin_at_different_tokens(device):
    tensors = inputs(3, 4, 2, 600, 16, device=device)
    start = counted(0, 31, 598, device=device)
    assert error_of(tensors, counted(599, device=device), start) < 1e-5
    ring = inputs(3, 4, 2, 40, 16, device=device)
    assert error_of(ring, counted(50, device=device), counted(0, 12, 49, device=device)) < 1e-5


def test_a_row_of_a_larger_cache_is_read_in_place(device):
    whole = inputs(4, 4, 2, 64, 16, device=device)
    part = {"q": whole["q"][1:3]} | {name: whole[name][1:3] for name in ("keys", "values")}
    assert error_of(part, counted(64, device=device)) < 1e-5


def test_refuses_what_it_cannot_read(device):
    tensors = inputs(2, 4, 2, 16, 8, device=device)
    end = counted(3, device=device)
    with pytest.raises(ValueError, match=r"keys and values must be \[2, Hkv, C, 8\]"):
        decode_attention(**tensors | {"keys": tensors["keys"][:1]}, end=end, backend="triton")
    turned = tensors["keys"].transpose(2, 3).contiguous().transpose(2, 3)
    with pytest.raises(ValueError, match="must lie alike"):
        decode_attention(**tensors | {"keys": turned}, end=end, backend="triton")
    with pytest.raises(ValueError, match="multiple of key-value heads, got 3 and 2"):
        decode_attention(**tensors | {"q": tensors["q"][:, :3]}, end=end)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="published widths take minutes under the interpreter")
@pytest.mark.parametrize(
    ("shape", "dtypes"),
    [
        ((8, 12, 2, 9000, 128), (torch.bfloat16, torch.float16, torch.float32)),
        ((3, 16, 8, 4096, 128), (torch.bfloat16, torch.float16, torch.float32)),
        ((2, 32, 8, 4096, 64), (torch.bfloat16, torch.float16, torch.float32)),
        ((2, 4, 1, 512, 256), (torch.bfloat16, torch.float16)),  # auto leaves so wide keys in fp32 to PyTorch
    ],
)
def test_equals_the_definition_at_published_widths(shape, dtypes, device):
    for dtype, seed in itertools.product(dtypes, range(3)):
        tensors = inputs(*shape, device=device, dtype=dtype, seed=seed)
        start = torch.randint(0, 400, (shape[0],), device=device)
        for end in (401, shape[3] - 5, shape[3], 2 * shape[3] + 77):
            error = error_of(tensors, counted(end, device=device), start, poison=False)
            assert error < (1e-5 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a graph is captured on a GPU")
def test_a_captured_graph_serves_every_length(device):
    tensors = inputs(4, 12, 2, 3000, 128, device=device, dtype=torch.bfloat16)
    end = torch.tensor(1, device=device)
    decode_attention(**tensors, end=end, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = decode_attention(**tensors, end=end, backend="triton")
    for n in (1, 64, 65, 1999, 3000):
        end.fill_(n)
        graph.replay()
        assert relative_error(y, decode_attention(**tensors, end=end, backend="reference")) < 1e-2
