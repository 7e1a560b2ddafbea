"""Dynamic convolution of the JetBlock (arXiv:2508.15884, Sec. 2.4) together with the product that makes its kernels.

    kappa[t,c,j] = Σ_r hidden[t,r] · weight[c·W+j,r] + bias[c·W+j]
    y[t,c] = SiLU(Σ_j kappa[t,c,j] · x[t-W+1+j,c])

Reference: jetlab.ops.conv.generated_conv on backend "reference". Tap W-1 meets the current token.

The kernels are W times as large as the values and are read once, so they are never written. A program makes those of BM
tokens and BC channels, one product a tap, weighs the inputs with them while they are in registers and stores the sum. Going
back, inner = dy · SiLU'(what went into it) is made first, by PyTorch. `_values` makes kappa again and with it the gradient
of x: a token's share in an earlier input is moved up by whole rows, so a tile of BM rows settles BM - W + 1 of them and the
tiles overlap. `_hidden` and `_weight` are products with dkappa[t,c,j] = inner[t,c] · x[t-W+1+j,c], made as they go. What
inputs of before the sequences have to do with the first W-1 tokens of each is left to plain PyTorch there.

Shapes: B batch, T time, C channels, W taps, R width of the generator's bottleneck; a token counts through all rows, its
place from the first of its sequence.
x, y, inner [B,T,C] · hidden [B,T,R] · weight [C·W,R] · bias [C·W] · history [S,C,W-1], inputs before each of S sequences
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from jetlab_kernels import MAX_TAPS
from jetlab_kernels.launch import check_device, check_format, dot_format, walkable

# Tiles: tokens, channels, units of the bottleneck; warps; depth of prefetching; parts into which the tokens are split. From
# records/h100/kernels/tuning.csv, ms of the whole call at 4 × 4096 tokens, 3,072 channels, R = 384, four taps.
FORWARD = {"BM": 128, "BC": 64, "BR": 64, "num_warps": 8, "STAGES": 3}  # 0.505; BC 32, 4 warps 0.531; two stages 0.572
VALUES = {"BM": 128, "BC": 64, "BR": 64, "num_warps": 8, "STAGES": 3}  # and back 2.202; BC 32, 4 warps 2.262
HIDDEN = {"BM": 128, "BC": 32, "BR": 128, "num_warps": 8, "STAGES": 3}  # 2.211; BC 64, two stages 2.237
# WEIGHT: 2.209; SPLIT 8 2.195, for twice the memory.
WEIGHT = {"BM": 64, "BC": 64, "BR": 128, "num_warps": 8, "STAGES": 3, "SPLIT": 4}
PROGRAMS = 264  # two for each multiprocessor of an H100: narrow weights are split further, until so many run


@triton.jit
def _place(token, T, place_ptr, n_tokens):
    """Tokens of the same sequence that stand before `token`; negative at padding in front."""
    if place_ptr is None:  # noqa: SIM108 (decided when the kernel is built)
        place = token % T
    else:
        place = tl.load(place_ptr + token, mask=token < n_tokens, other=-1)
    return place


@triton.jit
def _inputs(x_ptr, token, place, channel, back: tl.constexpr, x_t, n_tokens, C: tl.constexpr):
    """The inputs `back` tokens earlier, zeros before the sequence."""
    inside = ((token < n_tokens) & (place >= back))[:, None] & (channel < C)[None, :]
    return tl.load(x_ptr + (token.to(tl.int64) - back)[:, None] * x_t + channel[None, :], mask=inside, other=0.0)


@triton.jit
def _kernels(
    hidden_ptr, weight_ptr, bias_ptr, token, channel, h_t, n_tokens, C: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """kappa in fp32, a tile [BM,BC] for each tap."""
    taps = ()
    for j in tl.static_range(W):
        bias = tl.load(bias_ptr + channel * W + j, mask=channel < C, other=0.0).to(tl.float32)
        taps += (tl.zeros([BM, BC], dtype=tl.float32) + bias[None, :],)
    for i_r in tl.range(0, R, BR, num_stages=STAGES):
        r = i_r + tl.arange(0, BR)
        at = token.to(tl.int64)[:, None] * h_t + r[None, :]
        hidden = tl.load(hidden_ptr + at, mask=(token < n_tokens)[:, None] & (r < R)[None, :], other=0.0).to(DOT)
        sums = ()
        for j in tl.static_range(W):
            at = (channel * W + j)[None, :] * R + r[:, None]
            weight = tl.load(weight_ptr + at, mask=(r < R)[:, None] & (channel < C)[None, :], other=0.0).to(DOT)
            sums += (tl.dot(hidden, weight, taps[j], input_precision=PRECISION),)
        taps = sums
    return taps


@triton.jit
def _forward(
    x_ptr, hidden_ptr, weight_ptr, bias_ptr, history_ptr, place_ptr, row_ptr, y_ptr, sum_ptr, T, n_tokens, x_t, h_t,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr, SILU: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """y, and if wanted what went into SiLU.  Grid (cdiv(C, BC), cdiv(tokens, BM)): one program owns BC channels of BM
    tokens."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    kappa = _kernels(
        hidden_ptr, weight_ptr, bias_ptr, token, channel, h_t, n_tokens, C, R, W, BM, BC, BR, DOT, PRECISION, STAGES
    )  # fmt: skip
    place = _place(token, T, place_ptr, n_tokens)
    y = tl.zeros([BM, BC], dtype=tl.float32)
    for j in tl.static_range(W):
        y += kappa[j] * _inputs(x_ptr, token, place, channel, W - 1 - j, x_t, n_tokens, C).to(tl.float32)
    inside = (token < n_tokens)[:, None] & (channel < C)[None, :]
    if history_ptr is not None:
        early = (place >= 0) & (place < W - 1)
        if tl.sum(early.to(tl.int32), 0) > 0:  # few tiles have a sequence begin in them
            if row_ptr is None:  # noqa: SIM108
                row = token // T
            else:
                row = tl.load(row_ptr + token, mask=token < n_tokens, other=0)
            at = (row.to(tl.int64) * C)[:, None] * (W - 1) + channel[None, :] * (W - 1) + place[:, None]
            for j in tl.static_range(W - 1):
                before = (early & (place < W - 1 - j))[:, None] & inside
                y += kappa[j] * tl.load(history_ptr + at + j, mask=before, other=0.0).to(tl.float32)
    at = token.to(tl.int64)[:, None] * C + channel[None, :]
    if sum_ptr is not None:
        tl.store(sum_ptr + at, y.to(sum_ptr.dtype.element_ty), mask=inside)
    if SILU:
        y *= tl.sigmoid(y)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _values(
    hidden_ptr, weight_ptr, bias_ptr, place_ptr, inner_ptr, dx_ptr, T, n_tokens, h_t,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dx[t,c] = Σ_j inner[t+W-1-j,c] · kappa[t+W-1-j,c,j].  Grid (cdiv(C, BC), cdiv(tokens, BM - W + 1)): one program owns
    BC channels of as many tokens as its rows settle, the first ones of its tile."""
    channel = tl.program_id(0) * BC + tl.arange(0, BC)
    r = tl.arange(0, BM)
    token = tl.program_id(1) * (BM - W + 1) + r
    kappa = _kernels(
        hidden_ptr, weight_ptr, bias_ptr, token, channel, h_t, n_tokens, C, R, W, BM, BC, BR, DOT, PRECISION, STAGES
    )  # fmt: skip
    place = _place(token, T, place_ptr, n_tokens)
    inside = (token < n_tokens)[:, None] & (channel < C)[None, :]
    at = token.to(tl.int64)[:, None] * C + channel[None, :]
    inner = tl.load(inner_ptr + at, mask=inside, other=0.0).to(tl.float32)
    next_row = tl.broadcast_to(tl.minimum(r + 1, BM - 1)[:, None], [BM, BC])
    dx = tl.zeros([BM, BC], dtype=tl.float32)
    for j in tl.static_range(W):  # the earliest tap's share moves up with every tap behind it
        if j > 0:
            dx = tl.gather(dx, next_row, 0)
        dx += tl.where((place >= W - 1 - j)[:, None], inner * kappa[j], 0.0)
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside & (r < BM - W + 1)[:, None])


@triton.jit
def _hidden(
    x_ptr, weight_ptr, place_ptr, inner_ptr, dhidden_ptr, T, n_tokens, x_t,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dhidden[t,r] = Σ_cj dkappa[t,c,j] · weight[c·W+j,r].  Grid (cdiv(R, BR), cdiv(tokens, BM)): one program owns BR units
    of BM tokens."""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    token = tl.program_id(1) * BM + tl.arange(0, BM)
    place = _place(token, T, place_ptr, n_tokens)
    dhidden = tl.zeros([BM, BR], dtype=tl.float32)
    for i_c in tl.range(0, C, BC, num_stages=STAGES):
        channel = i_c + tl.arange(0, BC)
        at = token.to(tl.int64)[:, None] * C + channel[None, :]
        inside = (token < n_tokens)[:, None] & (channel < C)[None, :]
        inner = tl.load(inner_ptr + at, mask=inside, other=0.0).to(DOT)
        for j in tl.static_range(W):
            dkappa = inner * _inputs(x_ptr, token, place, channel, W - 1 - j, x_t, n_tokens, C).to(DOT)
            at = (channel * W + j)[:, None] * R + r[None, :]
            weight = tl.load(weight_ptr + at, mask=(channel < C)[:, None] & (r < R)[None, :], other=0.0).to(DOT)
            dhidden = tl.dot(dkappa, weight, dhidden, input_precision=PRECISION)
    at = token.to(tl.int64)[:, None] * R + r[None, :]
    inside = (token < n_tokens)[:, None] & (r < R)[None, :]
    tl.store(dhidden_ptr + at, dhidden.to(dhidden_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _weight(
    x_ptr, hidden_ptr, place_ptr, inner_ptr, dweight_ptr, dbias_ptr, T, n_tokens, x_t, h_t, SPLIT,
    C: tl.constexpr, R: tl.constexpr, W: tl.constexpr,
    BM: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """dweight[c·W+j,r] = Σ_t dkappa[t,c,j] · hidden[t,r] and dbias, of every SPLIT-th step of BM tokens.  Grid (cdiv(R, BR),
    cdiv(C, BC), SPLIT): one program owns BR units of BC channels; the SPLIT sums are added afterwards."""
    i_r, i_split = tl.program_id(0), tl.program_id(2)
    r = i_r * BR + tl.arange(0, BR)
    channel = tl.program_id(1) * BC + tl.arange(0, BC)
    dweight, dbias = (), ()
    for _ in tl.static_range(W):
        dweight += (tl.zeros([BR, BC], dtype=tl.float32),)
        dbias += (tl.zeros([BM, BC], dtype=tl.float32),)
    for i_t in tl.range(i_split * BM, n_tokens, SPLIT * BM, num_stages=STAGES):
        token = i_t + tl.arange(0, BM)
        place = _place(token, T, place_ptr, n_tokens)
        at = token.to(tl.int64)[:, None]
        real = (token < n_tokens)[:, None]
        inner = tl.load(inner_ptr + at * C + channel[None, :], mask=real & (channel < C)[None, :], other=0.0).to(DOT)
        hidden = tl.load(hidden_ptr + at * h_t + r[None, :], mask=real & (r < R)[None, :], other=0.0).to(DOT)
        sums, biases = (), ()
        for j in tl.static_range(W):
            dkappa = inner * _inputs(x_ptr, token, place, channel, W - 1 - j, x_t, n_tokens, C).to(DOT)
            sums += (tl.dot(tl.trans(hidden), dkappa, dweight[j], input_precision=PRECISION),)
            biases += (dbias[j] + dkappa.to(tl.float32),)
        dweight, dbias = sums, biases
    for j in tl.static_range(W):
        at = (i_split * C * W + channel * W + j).to(tl.int64)
        tl.store(dweight_ptr + at[None, :] * R + r[:, None], dweight[j], mask=(r < R)[:, None] & (channel < C)[None, :])
        tl.store(dbias_ptr + at, tl.sum(dbias[j], 0), mask=(channel < C) & (i_r == 0))


def _tiles(tiles: dict, C: int, R: int, W: int, dtype: torch.dtype) -> dict:
    """`tiles` cut to what C channels, R units and W taps fill; fp32 and more than four taps take half the channels."""
    halves = (dtype == torch.float32) + (W > 4)
    return tiles | {
        "BC": min(max(16, tiles["BC"] >> halves), _power_of_two(C)),
        "BR": min(tiles["BR"], _power_of_two(R)),
        "STAGES": 2 if dtype == torch.float32 else tiles["STAGES"],
    }


def _power_of_two(width: int) -> int:
    """The smallest width of a tile that holds `width` columns; a product takes at least 16."""
    return max(16, triton.next_power_of_2(width))


class _DynamicConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, hidden, weight, bias, history, begin, silu, trains):
        (x, x_t), (hidden, h_t) = walkable(x), walkable(hidden)
        weight, bias = weight.contiguous(), bias.contiguous()
        history = None if history is None else history.contiguous()
        (B, T, C), R = x.shape, hidden.shape[-1]
        W, n_tokens = weight.shape[0] // C, B * T
        place, row = None, None
        if begin is not None:
            token, begin = torch.arange(n_tokens, device=x.device), begin.long()
            row = torch.searchsorted(begin, token, right=True).sub_(1).clamp_min_(0)
            # Padding in front of a row stands behind the sequence of the row above, and is none of its tokens.
            place = torch.where(token // T == begin[row] // T, token - begin[row], -1).to(torch.int32)
            row = row.to(torch.int32)
        y = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        total = torch.empty_like(y) if silu and trains else None
        tiles = _tiles(FORWARD, C, R, W, x.dtype)
        _forward[(triton.cdiv(C, tiles["BC"]), triton.cdiv(n_tokens, tiles["BM"]))](
            x, hidden, weight, bias, history, place, row, y, total, T, n_tokens, x_t, h_t,
            C=C, R=R, W=W, SILU=silu, **tiles, **dot_format(x.dtype),
        )  # fmt: skip
        ctx.save_for_backward(x, hidden, weight, bias, history, begin, place, total)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, hidden, weight, bias, history, begin, place, total = ctx.saved_tensors
        (x, x_t), (hidden, h_t) = walkable(x), walkable(hidden)
        (B, T, C), R = x.shape, hidden.shape[-1]
        W, n_tokens, dots = weight.shape[0] // C, B * T, dot_format(x.dtype)
        sizes = {"C": C, "R": R, "W": W}
        dy = dy.contiguous()
        inner = dy if total is None else torch.ops.aten.silu_backward(dy, total)

        dx = torch.empty(B, T, C, dtype=x.dtype, device=x.device)
        tiles = _tiles(VALUES, C, R, W, x.dtype)
        _values[(triton.cdiv(C, tiles["BC"]), triton.cdiv(n_tokens, tiles["BM"] - W + 1))](
            hidden, weight, bias, place, inner, dx, T, n_tokens, h_t, **sizes, **tiles, **dots
        )

        dhidden = torch.empty(B, T, R, dtype=hidden.dtype, device=x.device)
        tiles = _tiles(HIDDEN, C, R, W, x.dtype)
        _hidden[(triton.cdiv(R, tiles["BR"]), triton.cdiv(n_tokens, tiles["BM"]))](
            x, weight, place, inner, dhidden, T, n_tokens, x_t, **sizes, **tiles, **dots
        )

        tiles = _tiles(WEIGHT, C, R, W, x.dtype)
        n_programs = triton.cdiv(R, tiles["BR"]) * triton.cdiv(C, tiles["BC"])
        split = min(max(tiles["SPLIT"], PROGRAMS // n_programs), triton.cdiv(n_tokens, tiles["BM"]))
        tiles["SPLIT"] = split
        dweight = torch.empty(split, C * W, R, dtype=torch.float32, device=x.device)
        dbias = torch.empty(split, C * W, dtype=torch.float32, device=x.device)
        _weight[(triton.cdiv(R, tiles["BR"]), triton.cdiv(C, tiles["BC"]), split)](
            x, hidden, place, inner, dweight, dbias, T, n_tokens, x_t, h_t, **sizes, **tiles, **dots
        )
        dweight, dbias = dweight.sum(0), dbias.sum(0)
        dhistory = None
        if history is not None:
            if begin is None:
                begin = torch.arange(0, n_tokens, T, device=x.device)
                place = torch.arange(n_tokens, device=x.device) % T
            rows = hidden.flatten(0, 1), inner.flatten(0, 1), dhidden.flatten(0, 1)
            dhistory = _history_gradients(*rows, weight, bias, history, begin, place, dweight, dbias)
        return dx, dhidden, dweight.to(weight.dtype), dbias.to(bias.dtype), dhistory, None, None, None


def _history_gradients(hidden, inner, dhidden, weight, bias, history, begin, place, dweight, dbias) -> Tensor:
    """dhistory[s,c,i] = Σ_p inner[p,c] · kappa[p,c,i-p] over the first W-1 tokens p of sequence s; adds what the history
    gives to the gradients of their `dhidden`, of `dweight` and of `dbias`, in place."""
    (S, C, past), n_tokens = history.shape, len(hidden)
    weight, bias = weight.float().view(C, past + 1, -1), bias.float().view(C, past + 1)
    dweight, dbias = dweight.view(weight.shape), dbias.view(bias.shape)
    dhistory = torch.zeros(S, C, past, dtype=torch.float32, device=hidden.device)
    for p in range(past):
        token, taps = (begin + p).clamp_max(n_tokens - 1), past - p
        mine = ((begin + p < n_tokens) & (place[token] == p))[:, None]
        units, out = hidden[token].float(), inner[token].float() * mine
        kappa = torch.einsum("sr,cjr->scj", units, weight[:, :taps]) + bias[:, :taps]
        dhistory[..., p:] += out[..., None] * kappa
        dkappa = out[..., None] * history[..., p:].float()
        dhidden.index_add_(0, token, torch.einsum("scj,cjr->sr", dkappa, weight[:, :taps]).to(dhidden.dtype))
        dweight[:, :taps] += torch.einsum("scj,sr->cjr", dkappa, units)
        dbias[:, :taps] += dkappa.sum(0)
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
    given = (x, hidden, weight, bias, history)
    trains = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in given)
    with torch.cuda.device_of(x):
        return _DynamicConv.apply(x, hidden, weight, bias, history, begin, activation == "silu", trains)
