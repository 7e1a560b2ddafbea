"""Causal depthwise convolutions over time: one kernel for all tokens, or one kernel per token (arXiv:2508.15884).

    short:      y[b,t,c] = act(Σ_j weight[c,j] · x[b,t-W+1+j,c] + bias[c])
    dynamic:    y[b,t,c] = act(Σ_j kernels[b,t,c,j] · x[b,t-W+1+j,c])
    generated:  the same with kernels[b,t,c,j] = Σ_r hidden[b,t,r] · weight[c·W+j,r] + bias[c·W+j]

Tap W-1 meets the current token. Before a sequence there are zeros, or the last W-1 inputs of an earlier call.

Shapes: B batch, T time, C channels, W taps.
x, y [B,T,C] · weight [C,W] · kernels [B,T,C,W] · mask [B,T] · state [B,C,W-1]
The state holds the last W-1 inputs, oldest first: all that a convolution of W taps needs. Implementations that keep W
columns store one more, the oldest, which no later output reads.
"""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from jetlab.ops.backends import resolve_backend
from jetlab.ops.packing import check_documents, document_positions, gather, spread

ACTIVATIONS = {None: lambda y: y, "silu": F.silu}


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Static convolution. Returns y [B,T,C] and the state after the last token.

    `mask` (1 = token, 0 = padding) may pad on the left, on the right or both: padding enters as zeros, the carried
    inputs sit directly before the first token and the new state ends at the last one. Outputs at padding are not
    defined. With `cu_seqlens` [N+1] the row (B = 1) holds N documents, each starting afresh: states are [N,C,W-1].
    Raises ValueError if shapes do not fit together or `activation` is neither None nor "silu".
    """
    if weight.ndim != 2 or weight.shape[0] != x.shape[-1]:
        raise ValueError(
            f"weight must be [C, W] with C = {x.shape[-1]} channels as in x, got {list(weight.shape)}; "
            "a Conv1d weight [C, 1, W] needs .squeeze(1)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must be [C] = [{weight.shape[0]}], got {list(bias.shape)}; use one number per channel")
    return _conv(x, weight, bias, state, activation, cu_seqlens, mask)


def dynamic_conv(
    x: Tensor,
    kernels: Tensor,
    *,
    state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Convolution with a kernel of its own for every token and channel; the kernel of token t weighs its whole window.

    Returns y [B,T,C] and the state after the last token; `mask`, `cu_seqlens` and errors as in `short_conv`.
    Any strides of `kernels` will do; [B,T,W,C] in memory, seen as [B,T,C,W], is the fastest on a CPU.
    """
    if kernels.ndim != 4 or kernels.shape[:3] != x.shape:
        raise ValueError(
            f"kernels must be [B, T, C, W] with B, T, C = {list(x.shape)} as in x, got {list(kernels.shape)}; "
            "for one kernel for all tokens use short_conv"
        )
    return _conv(x, kernels, None, state, activation, cu_seqlens, mask)


def generated_conv(
    x: Tensor,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    state: Tensor | None = None,
    activation: str | None = None,
    cu_seqlens: Tensor | None = None,
    mask: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """`dynamic_conv` whose kernels are one product of `hidden` [B,T,R] with `weight` [C·W,R], plus `bias` [C·W].

    Returns y [B,T,C] and the state after the last token; `mask`, `cu_seqlens` and errors as in `short_conv`. Backends
    "reference" and "chunked" make the kernels, W times as large as x, and call `dynamic_conv`; "triton" (bf16, fp16 and
    fp32 on a GPU, W ≤ 8) makes them as it weighs with them and writes none.
    """
    C, R = x.shape[-1], hidden.shape[-1]
    if hidden.shape[:-1] != x.shape[:-1]:
        raise ValueError(f"hidden must be [B, T, R] with B, T = {list(x.shape[:-1])} as in x, got {list(hidden.shape)}")
    if weight.ndim != 2 or weight.shape[0] % C or weight.shape[1] != R or bias.shape != weight.shape[:1]:
        raise ValueError(
            f"weight must be [C · W, R] and bias [C · W] with C = {C} and R = {R}, taps fastest, got {list(weight.shape)} and "
            f"{list(bias.shape)}; give the weight and bias of a Linear from R to C · W"
        )
    W = weight.shape[0] // C
    if resolve_backend(backend, x, hidden, weight, state, taps=W) != "triton":
        kernels = F.linear(hidden, weight, bias).unflatten(-1, (C, -1))
        return dynamic_conv(x, kernels, state=state, activation=activation, cu_seqlens=cu_seqlens, mask=mask)
    from jetlab_kernels.dynamic_conv import dynamic_conv as kernel

    n_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    _check(x, state, (n_sequences, C, W - 1), activation, cu_seqlens, mask)
    x = x if mask is None else x.masked_fill(~mask.bool()[..., None], 0)
    begin, length = _sequences(x, cu_seqlens, mask)
    last = _last_inputs(x, begin, length, x.new_zeros(n_sequences, C, W - 1) if state is None else state.to(x.dtype))
    begin = None if cu_seqlens is None and mask is None else begin  # every row from its start
    return kernel(x, hidden, weight, bias, history=state, begin=begin, activation=activation), last


def short_conv_reference(x: Tensor, weight: Tensor, *, bias=None, state=None, activation=None) -> tuple[Tensor, Tensor]:
    """Token-by-token definition."""
    kernels = weight.expand(*x.shape, weight.shape[-1])
    y, state = dynamic_conv_reference(x, kernels, state=state)
    return ACTIVATIONS[activation](y if bias is None else y + bias), state


def dynamic_conv_reference(x: Tensor, kernels: Tensor, *, state=None, activation=None) -> tuple[Tensor, Tensor]:
    """Token-by-token definition."""
    B, T, C = x.shape
    window = x.new_zeros(B, C, kernels.shape[-1] - 1) if state is None else state
    outputs = []
    for t in range(T):
        window = torch.cat([window, x[:, t, :, None]], -1)  # [B,C,W]
        outputs.append((kernels[:, t] * window).sum(-1))
        window = window[..., 1:]
    return ACTIVATIONS[activation](torch.stack(outputs, 1)), window


def _check(x, state, expected: tuple[int, int, int], activation, cu_seqlens, mask) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation must be None or 'silu', got {activation!r}; apply another function to y")
    if x.ndim != 3 or x.shape[1] < 1:
        raise ValueError(f"x must be [B, T, C] with T ≥ 1, got {list(x.shape)}; a single token is [B, 1, C]")
    if cu_seqlens is not None and mask is not None:
        raise ValueError("packed documents hold no padding, got both cu_seqlens and mask; remove the padding first")
    if mask is not None and mask.shape != x.shape[:2]:
        raise ValueError(
            f"mask must be [B, T] = {list(x.shape[:2])}, got {list(mask.shape)}; give 1 for tokens and 0 for padding"
        )
    if state is not None and state.shape != expected:
        raise ValueError(
            f"state must be [B, C, W-1] = {list(expected)} (with cu_seqlens B is the number of documents), "
            f"got {list(state.shape)}; pass the state that an earlier call returned, or None"
        )


def _conv(x, kernels, bias, state, activation, cu_seqlens, mask):
    packed, W = None, kernels.shape[-1]
    n_sequences = x.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    _check(x, state, (n_sequences, x.shape[-1], W - 1), activation, cu_seqlens, mask)
    if cu_seqlens is not None:
        packed, mask = document_positions(cu_seqlens, x.shape[0], x.shape[1])
        x = spread(x, packed, mask)
        kernels = spread(kernels, packed, mask) if kernels.ndim == 4 else kernels
    T = x.shape[1]
    history = x.new_zeros(x.shape[0], W - 1, x.shape[-1]) if state is None else state.to(x.dtype).transpose(1, 2)
    if mask is None:
        window = torch.cat([history, x], 1)  # input t is window[t + W - 1]
        last = window[:, T:].clone()  # a copy: a view would keep the whole sequence alive
    else:
        window, last = _masked_window(x, history, mask)
    y = _WindowedSum.apply(window, kernels)
    y = ACTIVATIONS[activation](y if bias is None else y + bias)
    return (y if packed is None else gather(y, packed)), last.transpose(1, 2)


def _sequences(x: Tensor, cu_seqlens: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """First token, counted through all rows of x [B,T,C], and number of tokens of each row's sequence or each document."""
    B, T, _ = x.shape
    if cu_seqlens is not None:
        check_documents(cu_seqlens, B, T)
        return cu_seqlens[:-1], cu_seqlens.diff()
    rows = torch.arange(0, B * T, T, device=x.device)
    if mask is None:
        return rows, torch.full_like(rows, T)
    first = (mask.cumsum(1) == 0).sum(1)
    behind = torch.where(mask.bool(), torch.arange(1, T + 1, device=x.device), 0).amax(1)
    return rows + first.clamp_max(T - 1), (behind - first).clamp_min(0)


def _last_inputs(x: Tensor, begin: Tensor, length: Tensor, history: Tensor) -> Tensor:
    """The W-1 inputs up to the end of each sequence, those of `history` [S,C,W-1] where it is shorter."""
    W = history.shape[-1] + 1
    place = (
        length[:, None] - (W - 1) + torch.arange(W - 1, device=x.device)
    )  # in the sequence; before it, in the history
    recent = x.flatten(0, 1)[(begin[:, None] + place).clamp_min(0)].mT
    past = history.gather(-1, (place + W - 1).clamp_max(max(0, W - 2))[:, None].expand_as(recent))
    return torch.where(place[:, None] < 0, past, recent)


def _masked_window(x: Tensor, history: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs with zeros for padding and `history` right before the first token; the W-1 inputs up to the last token."""
    T, C = x.shape[1:]
    mask = mask.bool()
    steps = torch.arange(history.shape[1], device=x.device)
    first = (mask.cumsum(1) == 0).sum(1)  # T in a row of padding alone, which then hands its history on
    behind = torch.where(mask, torch.arange(1, T + 1, device=x.device), 0).amax(1)
    behind = torch.where(first == T, T, behind)
    window = F.pad(torch.where(mask[..., None], x, 0), (0, 0, history.shape[1], 0))
    window = window.scatter(1, (first[:, None] + steps)[..., None].expand(-1, -1, C), history)
    return window, window.gather(1, (behind[:, None] + steps)[..., None].expand(-1, -1, C))


class _WindowedSum(torch.autograd.Function):
    """y[b,t,c] = Σ_j kernels[…,c,j] · window[b,t+j,c], window [B, T+W-1, C], kernels [C,W] or [B,T,C,W].

    A sum over W shifted views. Four-tap forward and backward on 1024 tokens × 192 channels takes a fraction of the
    time of a grouped conv1d on a CPU, and autograd through the same sum would fill W gradients of full size with zeros.
    """

    @staticmethod
    def forward(ctx, window, kernels):
        T, W = window.shape[1] - kernels.shape[-1] + 1, kernels.shape[-1]
        if kernels.ndim == 2:
            kernels = kernels.T.contiguous().T  # each tap a contiguous row
        ctx.save_for_backward(window, kernels)
        y = window[:, :T] * kernels[..., 0]
        for j in range(1, W):
            y.addcmul_(window[:, j : j + T], kernels[..., j])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        window, kernels = ctx.saved_tensors
        T, W = dy.shape[1], kernels.shape[-1]
        dwindow = dkernels = None
        if ctx.needs_input_grad[0]:
            dwindow = torch.zeros_like(window)
            for j in range(W):
                dwindow[:, j : j + T].addcmul_(dy, kernels[..., j])
        if ctx.needs_input_grad[1] and kernels.ndim == 2:
            dkernels = torch.stack([(dy * window[:, j : j + T]).sum((0, 1)) for j in range(W)], -1)
        elif ctx.needs_input_grad[1]:
            dkernels = (dy.unsqueeze(-2) * window.unfold(1, W, 1).transpose(-1, -2)).transpose(-1, -2)
        return dwindow, dkernels
