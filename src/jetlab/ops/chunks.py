"""Time in chunks: the layout that all chunked forms share, and sums of decays that keep their digits.

[B,T,H,X] becomes [b,C,X] with b = N·B·H: N chunks of C tokens for every row and head, zeros behind the last token. The
chunk comes first, so that what a step of the scan over chunks reads and writes lies together in memory. A
token of zeros with log-decay 0 writes nothing and forgets nothing, so the state behind it is the state before it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

# exp() of this is 0 in fp32 and fp64, and its running sums keep every digit that matters in fp64; -inf itself would
# turn differences of sums into NaN.
LOWEST_LOG_DECAY = -1.0e4


def chunk_length(n_tokens: int, chunk_size: int) -> int:
    """Tokens per chunk in equal shares: 65 tokens at 64 are two chunks of 33 with one token of padding, not of 63."""
    return -(-n_tokens // -(-n_tokens // chunk_size))


def default_chunk_size(head_dim: int, head_dim_v: int, device: torch.device) -> int:
    """16 up to width 32, 32 up to 128, 64 above and on a GPU.

    On one CPU thread that is the fastest of 8, 16, 32, 64, or within 10 % of it: forward and backward of each recurrence
    at widths 16 to 256, medians of 9 calls, which spread by about 10 %. On a GPU small models wait for launches, of which
    every chunk costs the same number: 16 layers of the gated delta rule take 8,850 at 512 tokens in chunks of 16, forward
    and backward, and 5,010 in chunks of 64.
    """
    widest = max(head_dim, head_dim_v)
    if device.type == "cuda":
        return 64
    return 16 if widest <= 32 else 32 if widest <= 128 else 64


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def to_chunks(x: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """[B,T,H,X] to [b,C,X], zeros behind the last token."""
    return _by_chunk(x, C).to(dtype).flatten(0, 2)


def put_chunks(out: Tensor, x: Tensor) -> Tensor:
    """Writes [B,T,H,X] into `out` [b,C,X] of any strides, zeros behind the last token; returns `out`."""
    x = _by_chunk(x, out.shape[1])
    out.unflatten(0, x.shape[:3]).copy_(x)
    return out


def _by_chunk(x: Tensor, C: int) -> Tensor:
    """View [N,B,H,C,X] of x [B,T,H,X], of a padded copy where C does not divide T."""
    T = x.shape[1]
    N = -(-T // C)
    x = x if T == N * C else F.pad(x, (0, 0, 0, 0, 0, N * C - T))
    return x.unflatten(1, (N, C)).permute(1, 0, 3, 2, 4)


def from_chunks(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """[b,C,X] to [B,T,H,X] for `shape` (B, T, H, N)."""
    B, T, H, N = shape
    return x.unflatten(0, (N, B, H)).permute(1, 0, 3, 2, 4).flatten(1, 2)[:, :T]


def head_decay(g: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Γ [b,C,C], e^G [b,C,1] and e^{G_C - G} [b,C,1] in `dtype`, from log-decays g [b,C,1] in fp64.

    With G_t = Σ_{s≤t} g_s: Γ_ts = exp(G_t - G_s) for s ≤ t and 0 above. Summed in fp64, because after a decay of -80 an
    fp32 sum has lost five digits of every later difference.
    """
    G = g[..., 0].clamp_min(LOWEST_LOG_DECAY).cumsum(-1)
    C = G.shape[-1]
    later = torch.full((C, C), -torch.inf, dtype=dtype, device=g.device).triu_(1)
    gamma = (G[:, :, None] - G[:, None, :]).to(dtype).add_(later).exp_()
    return gamma, G.exp().to(dtype)[..., None], (G[:, -1:] - G).exp().to(dtype)[..., None]


def until_end(g: Tensor) -> Tensor:
    """Σ_{r>t} g_r up to the end of the chunk, [b,C,K]: what a token's write has faded by then, as a sum of one sign."""
    return F.pad(g[:, 1:], (0, 0, 0, 1)).flip(1).cumsum(1).flip(1)
