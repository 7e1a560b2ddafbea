"""Time in chunks: the layout that all chunked forms share, and sums of decays that keep their digits.

[B,T,H,X] becomes [b,C,X] with b = B·H·N: N chunks of C tokens for every row and head, zeros behind the last token. A
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


def default_chunk_size(head_dim: int, head_dim_v: int) -> int:
    """16 at width 16, 32 at 32 and 64, 64 at 128: of 8, 16, 32, 64 the fastest on one CPU thread, or within noise of it.

    Forward and backward of each recurrence, medians of 7 to 15 calls, which spread by about 10 %.
    """
    widest = max(head_dim, head_dim_v)
    return 16 if widest <= 16 else 32 if widest <= 64 else 64


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def to_chunks(x: Tensor, C: int, dtype: torch.dtype) -> Tensor:
    """[B,T,H,X] to [b,C,X], zeros behind the last token."""
    B, T, H, X = x.shape
    N = -(-T // C)
    x = x if T == N * C else F.pad(x, (0, 0, 0, 0, 0, N * C - T))
    return x.reshape(B, N, C, H, X).permute(0, 3, 1, 2, 4).to(dtype).reshape(B * H * N, C, X)


def from_chunks(x: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """[b,C,X] to [B,T,H,X] for `shape` (B, T, H, N)."""
    B, T, H, N = shape
    return x.reshape(B, H, N * x.shape[1], x.shape[2])[:, :, :T].transpose(1, 2)


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
