"""Dynamic convolution of the JetBlock (arXiv:2508.15884, Sec. 2.4) together with the product that makes its kernels.

    kappa[t,c,j] = Σ_r hidden[t,r] · weight[c·W+j,r] + bias[c·W+j]
    y[t,c] = SiLU(Σ_j kappa[t,c,j] · x[t-W+1+j,c])

Reference: jetlab.ops.conv.generated_conv on backend "reference". Tap W-1 meets the current token.

The kernels are W times as large as the values and are read once, so they are never written. A tile of them is one product
whose columns are BC channels at tap 0, the same channels at tap 1, and so on; x is read once for each tap into a tile of
the same columns, the two are multiplied number by number, and the sum over taps is stored. Three kernels go back.
`_values` makes kappa again, and with it the gradient before the activation ("inner"), which it stores for the other two,
and that of x: a token's share in an earlier input is moved up by whole rows, so a tile of BM rows settles BM - W + 1 of
them and the tiles overlap. `_hidden` and `_weight` are products with dkappa[t,c,j] = inner[t,c] · x[t-W+1+j,c], which they
make as they go.

Shapes: B batch, T time, C channels, W taps, R width of the generator's bottleneck; a token's place counts through all rows.
x, y [B,T,C] · hidden [B,T,R] · weight [C·W,R] · bias [C·W] · history [S,C,W-1], inputs before each of S sequences
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from jetlab_kernels import MAX_TAPS
from jetlab_kernels.launch import check_device, check_format, dot_format, walkable

# Tiles: tokens, channels, bottleneck or tokens of a step; warps; steps in flight.
FORWARD = {"BM": 128, "BC": 64, "BR": 64, "num_warps": 8, "STAGES": 3}
VALUES = {"BM": 128, "BC": 32, "BR": 64, "num_warps": 8, "STAGES": 3}
HIDDEN = {"BM": 128, "BC": 32, "BR": 128, "num_warps": 8, "STAGES": 2}
WEIGHT = {"BM": 64, "BC": 64, "BR": 128, "num_warps": 8, "STAGES": 2, "SPLIT": 4}


@triton.jit
def _place(token, T, begin_ptr, row_ptr, n_tokens):
    """Tokens of the same sequence that stand before `token`, and which sequence it is."""
    if begin_ptr is None:
        row = token // T
        place = token % T
    else:
        row = tl.load(row_ptr + token, mask=token < n_tokens, other=0)
        place = token - tl.load(begin_ptr + row)
    return place, row


@triton.jit
def _columns(i_c, C: tl.constexpr, W: tl.constexpr, BC: tl.constexpr, TAPS: tl.constexpr):
    """Channel, tap and existence of each column of a tile: the BC channels at tap 0, the same at tap 1, and so on."""
    n = tl.arange(0, TAPS * BC)
    channel, tap = i_c + n % BC, n // BC
    return channel, tap, (channel < C) & (tap < W)


@triton.jit
def _inputs(x_ptr, history_ptr, token, place, row, channel, back, inside, x_t, C: tl.constexpr, W: tl.constexpr):
    """The inputs `back` tokens before each of `token`: of the sequence, of its history, or zeros."""
    at = token.to(tl.int64)[:, None] * x_t + (channel - back * x_t)[None, :]
    x = tl.load(x_ptr + at, mask=inside & (place[:, None] >= back[None, :]), other=0.0)
    if history_ptr is not None:
        before = (place >= 0)[:, None] & (place[:, None] < back[None, :])  # padding in front has no place
        at = (row * C).to(tl.int64)[:, None] * (W - 1) + (channel * (W - 1) + W - 1 - back)[None, :] + place[:, None]
        past = tl.load(history_ptr + at, mask=inside & before, other=0.0)
        x = tl.where(before, past.to(x.dtype), x)
    return x.to(tl.float32)


@triton.jit
def _kernels(
    hidden_ptr, weight_ptr, bias_ptr, token, channel, tap, real, h_t, n_tokens, R: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, TAPS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """kappa [BM, TAPS · BC] in fp32."""
    kappa = tl.zeros([BM, TAPS * BC], dtype=tl.float32)
    for i_r in tl.range(0, R, BR, num_stages=STAGES):
        r = i_r + tl.arange(0, BR)
        at = token.to(tl.int64)[:, None] * h_t + r[None, :]
        hidden = tl.load(hidden_ptr + at, mask=(token < n_tokens)[:, None] & (r < R)[None, :], other=0.0).to(DOT)
        at = (channel * W + tap)[None, :] * R + r[:, None]
        weight = tl.load(weight_ptr + at, mask=(r < R)[:, None] & real[None, :], other=0.0).to(DOT)
        kappa = tl.dot(hidden, weight, kappa, input_precision=PRECISION)
    return kappa + tl.load(bias_ptr + channel * W + tap, mask=real, other=0.0).to(tl.float32)[None, :]


@triton.jit
def _over_taps(x, BM: tl.constexpr, BC: tl.constexpr, TAPS: tl.constexpr):
    """Sum over taps, [BM, TAPS · BC] to [BM, BC]."""
    return tl.sum(tl.reshape(x, [BM, TAPS, BC]), 1)


@triton.jit
def _forward(
    x_ptr, hidden_ptr, weight_ptr, bias_ptr, history_ptr, begin_ptr, row_ptr, y_ptr, T, n_tokens, x_t, h_t,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, TAPS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y.  Grid (cdiv(C, BC), cdiv(tokens, BM)): one program owns BC channels of BM tokens."""
    i_c = tl.program_id(0) * BC
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    channel, tap, real = _columns(i_c, C, W, BC, TAPS)
    kappa = _kernels(
        hidden_ptr, weight_ptr, bias_ptr, token, channel, tap, real, h_t, n_tokens, R, W,
        BM, BC, BR, TAPS, DOT, PRECISION, STAGES,
    )  # fmt: skip
    place, row = _place(token, T, begin_ptr, row_ptr, n_tokens)
    inside = (token < n_tokens)[:, None] & real[None, :]
    x = _inputs(x_ptr, history_ptr, token, place, row, channel, W - 1 - tap, inside, x_t, C, W)
    y = _over_taps(kappa * x, BM, BC, TAPS)
    if SILU:
        y *= tl.sigmoid(y)
    c = i_c + tl.arange(0, BC)
    inside = (token < n_tokens)[:, None] & (c < C)[None, :]
    tl.store(y_ptr + token.to(tl.int64)[:, None] * C + c[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _values(
    x_ptr, hidden_ptr, weight_ptr, bias_ptr, history_ptr, begin_ptr, row_ptr, dy_ptr, inner_ptr, dx_ptr,
    T, n_tokens, x_t, h_t, dy_t,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, TAPS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """inner = dy · SiLU'(…) and dx.  Grid (cdiv(C, BC), cdiv(tokens, BM - W + 1)): one program owns BC channels of as
    many tokens as its rows settle, the first ones of its tile."""
    i_c, r = tl.program_id(0) * BC, tl.arange(0, BM)
    token = tl.program_id(1) * (BM - W + 1) + r
    channel, tap, real = _columns(i_c, C, W, BC, TAPS)
    kappa = _kernels(
        hidden_ptr, weight_ptr, bias_ptr, token, channel, tap, real, h_t, n_tokens, R, W,
        BM, BC, BR, TAPS, DOT, PRECISION, STAGES,
    )  # fmt: skip
    place, row = _place(token, T, begin_ptr, row_ptr, n_tokens)
    back = W - 1 - tap
    c = i_c + tl.arange(0, BC)
    inside = (token < n_tokens)[:, None] & (c < C)[None, :]
    dy = tl.load(dy_ptr + token.to(tl.int64)[:, None] * dy_t + c[None, :], mask=inside, other=0.0)
    inner = dy.to(tl.float32)
    if SILU:
        columns = (token < n_tokens)[:, None] & real[None, :]
        x = _inputs(x_ptr, history_ptr, token, place, row, channel, back, columns, x_t, C, W)
        y = _over_taps(kappa * x, BM, BC, TAPS)
        open_ = tl.sigmoid(y)
        inner *= open_ * (1 + y * (1 - open_))
    share = kappa * tl.reshape(tl.broadcast_to(inner[:, None, :], [BM, TAPS, BC]), [BM, TAPS * BC])
    share = tl.where((place[:, None] >= back[None, :]) & real[None, :], share, 0.0)
    dx = _over_taps(tl.gather(share, tl.minimum(r[:, None] + tl.maximum(back, 0)[None, :], BM - 1), 0), BM, BC, TAPS)
    settled = inside & (r < BM - W + 1)[:, None]
    at = token.to(tl.int64)[:, None] * C + c[None, :]
    tl.store(inner_ptr + at, inner.to(inner_ptr.dtype.element_ty), mask=settled)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=settled)


@triton.jit
def _dkappa(
    x_ptr, inner_ptr, history_ptr, token, place, row, channel, tap, inside, x_t, C: tl.constexpr, W: tl.constexpr
):
    """Gradient of kappa: inner · x, [tokens, TAPS · BC]."""
    at = token.to(tl.int64)[:, None] * C + channel[None, :]
    inner = tl.load(inner_ptr + at, mask=inside, other=0.0).to(tl.float32)
    return inner * _inputs(x_ptr, history_ptr, token, place, row, channel, W - 1 - tap, inside, x_t, C, W)


@triton.jit
def _hidden(
    x_ptr, weight_ptr, history_ptr, begin_ptr, row_ptr, inner_ptr, dhidden_ptr, T, n_tokens, x_t,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, TAPS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dhidden[t,r] = Σ_cj dkappa[t,c,j] · weight[c·W+j,r].  Grid (cdiv(R, BR), cdiv(tokens, BM)): one program owns BR units
    of BM tokens."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    place, row = _place(token, T, begin_ptr, row_ptr, n_tokens)
    dhidden = tl.zeros([BM, BR], dtype=tl.float32)
    for i_c in tl.range(0, C, BC, num_stages=STAGES):
        channel, tap, real = _columns(i_c, C, W, BC, TAPS)
        inside = (token < n_tokens)[:, None] & real[None, :]
        dkappa = _dkappa(x_ptr, inner_ptr, history_ptr, token, place, row, channel, tap, inside, x_t, C, W)
        at = (channel * W + tap)[:, None] * R + r[None, :]
        weight = tl.load(weight_ptr + at, mask=real[:, None] & (r < R)[None, :], other=0.0).to(DOT)
        dhidden = tl.dot(dkappa.to(DOT), weight, dhidden, input_precision=PRECISION)
    at = token.to(tl.int64)[:, None] * R + r[None, :]
    inside = (token < n_tokens)[:, None] & (r < R)[None, :]
    tl.store(dhidden_ptr + at, dhidden.to(dhidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight(
    x_ptr, hidden_ptr, history_ptr, begin_ptr, row_ptr, inner_ptr, dweight_ptr, dbias_ptr, T, n_tokens, x_t, h_t,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, SPLIT: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, TAPS: tl.constexpr,
    DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dweight[c·W+j,r] = Σ_t dkappa[t,c,j] · hidden[t,r] and dbias, of every SPLIT-th step of BM tokens.  Grid (cdiv(R, BR),
    cdiv(C, BC), SPLIT): one program owns BR units of BC channels; the SPLIT sums are added afterwards."""
    i_split = tl.program_id(2)
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    channel, tap, real = _columns(tl.program_id(1) * BC, C, W, BC, TAPS)
    dweight = tl.zeros([BR, TAPS * BC], dtype=tl.float32)
    dbias = tl.zeros([TAPS * BC], dtype=tl.float32)
    for i_t in tl.range(i_split * BM, n_tokens, SPLIT * BM, num_stages=STAGES):
        token = i_t + tl.arange(0, BM)
        real_t = token < n_tokens
        place, row = _place(token, T, begin_ptr, row_ptr, n_tokens)
        inside = real_t[:, None] & real[None, :]
        dkappa = _dkappa(x_ptr, inner_ptr, history_ptr, token, place, row, channel, tap, inside, x_t, C, W)
        at = token.to(tl.int64)[:, None] * h_t + r[None, :]
        hidden = tl.load(hidden_ptr + at, mask=real_t[:, None] & (r < R)[None, :], other=0.0).to(DOT)
        dweight = tl.dot(tl.trans(hidden), dkappa.to(DOT), dweight, input_precision=PRECISION)
        dbias += tl.sum(dkappa, 0)
    at = (i_split * C * W + channel * W + tap).to(tl.int64)
    tl.store(dweight_ptr + at[None, :] * R + r[:, None], dweight, mask=(r < R)[:, None] & real[None, :])
    tl.store(dbias_ptr + at, dbias, mask=real & (tl.program_id(0) == 0))


def _tiles(tiles: dict, C: int, R: int, W: int, dtype: torch.dtype) -> dict:
    """`tiles` cut to what C channels, R units and W taps fill; fp32 and more than four taps take half the channels."""
    halves = (dtype == torch.float32) + (W > 4)
    return tiles | {
        "BC": min(tiles["BC"] >> halves, _power_of_two(C)),
        "BR": min(tiles["BR"], _power_of_two(R)),
        "TAPS": triton.next_power_of_2(W),
        "STAGES": 1 if dtype == torch.float32 else tiles["STAGES"],
    }


def _power_of_two(width: int) -> int:
    """The smallest width of a tile that holds `width` columns; a product takes at least 16."""
    return max(16, triton.next_power_of_2(width))


class _DynamicConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, weight, bias, history, begin, silu):
        (x, x_t), (hidden, h_t) = walkable(x), walkable(hidden)
        weight, bias = weight.contiguous(), bias.contiguous()
        history = None if history is None else history.contiguous()
        (B, T, C), R = x.shape, hidden.shape[-1]
        W, n_tokens = weight.shape[0] // C, B * T
        row = None
        if begin is not None:
            begin = begin.to(torch.int32)
            # Padding before the first sequence belongs to it, in front of its first token.
            row = torch.searchsorted(begin, torch.arange(n_tokens, dtype=torch.int32, device=x.device), right=True)
            row = row.sub_(1).clamp_min_(0).to(torch.int32)
        y = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        tiles = _tiles(FORWARD, C, R, W, x.dtype)
        _forward[(triton.cdiv(C, tiles["BC"]), triton.cdiv(n_tokens, tiles["BM"]))](
            x, hidden, weight, bias, history, begin, row, y, T, n_tokens, x_t, h_t,
            C=C, R=R, W=W, SILU=silu, **tiles, **dot_format(x.dtype),
        )  # fmt: skip
        ctx.save_for_backward(x, hidden, weight, bias, history, begin, row)
        ctx.silu = silu
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, hidden, weight, bias, history, begin, row = ctx.saved_tensors
        (x, x_t), (hidden, h_t), (dy, dy_t) = walkable(x), walkable(hidden), walkable(dy)
        (B, T, C), R = x.shape, hidden.shape[-1]
        W, n_tokens, dots = weight.shape[0] // C, B * T, dot_format(x.dtype)
        sizes = {"C": C, "R": R, "W": W}
        inner, dx = (torch.empty(B, T, C, dtype=x.dtype, device=x.device) for _ in range(2))
        tiles = _tiles(VALUES, C, R, W, x.dtype)
        _values[(triton.cdiv(C, tiles["BC"]), triton.cdiv(n_tokens, tiles["BM"] - W + 1))](
            x, hidden, weight, bias, history, begin, row, dy, inner, dx,
            T, n_tokens, x_t, h_t, dy_t, SILU=ctx.silu, **sizes, **tiles, **dots,
        )  # fmt: skip

        dhidden = torch.empty(B, T, R, dtype=hidden.dtype, device=x.device)
        tiles = _tiles(HIDDEN, C, R, W, x.dtype)
        _hidden[(triton.cdiv(R, tiles["BR"]), triton.cdiv(n_tokens, tiles["BM"]))](
            x, weight, history, begin, row, inner, dhidden, T, n_tokens, x_t, **sizes, **tiles, **dots
        )

        tiles = _tiles(WEIGHT, C, R, W, x.dtype)
        split = tiles["SPLIT"]
        dweight = torch.empty(split, C * W, R, dtype=torch.float32, device=x.device)
        dbias = torch.empty(split, C * W, dtype=torch.float32, device=x.device)
        _weight[(triton.cdiv(R, tiles["BR"]), triton.cdiv(C, tiles["BC"]), split)](
            x, hidden, history, begin, row, inner, dweight, dbias,
            T, n_tokens, x_t, h_t, **sizes, **tiles, **dots,
        )  # fmt: skip
        dhistory = None
        if history is not None and ctx.needs_input_grad[4]:
            dhistory = _history_gradient(hidden, weight, bias, history, begin, row, inner)
        return dx, dhidden, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(bias.dtype), dhistory, None, None


def _history_gradient(hidden, weight, bias, history, begin, row, inner):
    """dhistory[s,c,i] = Σ_p inner[p,c] · kappa[p,c,i-p] over the first W-1 tokens p of sequence s, in plain PyTorch."""
    S, C, past = history.shape
    B, T, _ = hidden.shape
    if begin is None:
        begin = torch.arange(0, B * T, T, device=hidden.device)
        row = torch.arange(B, device=hidden.device).repeat_interleave(T)
    hidden, inner = hidden.flatten(0, 1), inner.flatten(0, 1).float()
    dhistory = torch.zeros(S, C, past, dtype=torch.float32, device=hidden.device)
    sequences = torch.arange(S, device=hidden.device)
    for p in range(past):
        token = (begin + p).clamp_max(B * T - 1)
        mine = (begin + p < B * T) & (row[token] == sequences)
        kappa = torch.nn.functional.linear(hidden[token].float(), weight.float(), bias.float()).view(S, C, past + 1)
        share = (inner[token] * mine[:, None])[..., None] * kappa
        dhistory[..., p:] += share[..., : past - p]
    return dhistory.to(history.dtype)


def dynamic_conv(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    history: Tensor | None = None,
    begin: Tensor | None = None,
    activation: str | None = "silu",
) -> Tensor:
    """y [B,T,C] in x's dtype; what the kernels are is said above, W = weight.shape[0] / C.

    `begin` [S], rising, is the place of each sequence's first token, by default the start of every row; `history` the
    inputs before those, by default zeros. The gradient can be taken once. The caller has checked that shapes fit.
    Raises ValueError for a dtype other than bf16, fp16 and fp32, another device than a GPU's, or more than 8 taps.
    """
    check_device(x, hidden, weight, bias, history, begin)
    check_format(x)
    W = weight.shape[0] // x.shape[-1]
    if W > MAX_TAPS:
        raise ValueError(f"the Triton kernels take at most {MAX_TAPS} taps, got {W}; use backend='chunked' for more")
    with torch.cuda.device_of(x):
        return _DynamicConv.apply(x, hidden, weight, bias, history, begin, activation == "silu")
