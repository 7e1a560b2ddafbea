"""What every recurrence shares around its mathematics: choice of a form, checks of inputs, packed documents, precision."""

from collections.abc import Callable

import torch
from torch import Tensor

from jetlab.ops.backends import resolve_backend
from jetlab.ops.packing import check_documents, document_positions, gather, spread

L2_EPS = 1e-6


def recur(
    reference: Callable,
    chunked: Callable,
    tensors: dict[str, Tensor | None],
    *,
    kernel: Callable | None = None,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    chunk_size: int | None,
    backend: str,
    **options,
) -> tuple[Tensor, Tensor]:
    """Check the rest, spread `tensors` (q, k, v and gates by name, in the order of the op) of packed documents, run.

    `options` go to every form, `chunk_size` to the chunked one alone. `kernel` gives the Triton form, which takes packed
    documents as they are, when it is called; it is None for a recurrence that has none.
    """
    B, T, H, K = tensors["q"].shape
    if backend != "auto" or kernel is not None:
        backend = resolve_backend(backend, *tensors.values(), state, head_dim=K)
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size}; leave it out for the default")
    if backend == "triton" and kernel is None:
        raise ValueError(
            "there are Triton kernels for a decay of one number per head, with the delta rule's correction or without; "
            "got another recurrence with backend='triton'; use backend='chunked'"
        )
    if cu_seqlens is not None:
        check_documents(cu_seqlens, B, T)
        B = len(cu_seqlens) - 1
    expected = (B, H, K, tensors["v"].shape[-1])
    if state is not None:
        _check_tensor("state", state)
    if state is not None and state.shape != expected:
        raise ValueError(
            f"state must be [B, H, K, V] = {list(expected)} (with cu_seqlens B is the number of documents), "
            f"got {list(state.shape)}; pass the state that an earlier call returned, or None"
        )
    if backend == "triton":
        return kernel()(**tensors, state=state, cu_seqlens=cu_seqlens, **options)
    packed = None
    if cu_seqlens is not None:
        packed, mask = document_positions(cu_seqlens, 1, T)
        tensors = {name: x if x is None else spread(x, packed, mask) for name, x in tensors.items()}
    if backend == "reference":
        o, state = reference(*tensors.values(), state=state, **options)
    else:
        o, state = chunked(*tensors.values(), state=state, chunk_size=chunk_size, **options)
    return (o if packed is None else gather(o, packed)), state


def check_values(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raises ValueError unless q and k are [B,T,H,K] and v is [B,T,H,V], all of one floating-point dtype, with T ≥ 1."""
    for name, x in (("q", q), ("k", k), ("v", v)):
        _check_tensor(name, x)
    if q.ndim != 4 or q.shape != k.shape or 0 in q.shape[1:]:
        raise ValueError(
            f"q and k must both be [B, T, H, K] with T ≥ 1, got {list(q.shape)} and {list(k.shape)}; "
            "repeat shared query or key heads with repeat_interleave(…, dim=2)"
        )
    if v.ndim != 4 or v.shape[:3] != q.shape[:3] or not v.shape[3]:
        raise ValueError(
            f"v must be [B, T, H, V] with B, T, H = {list(q.shape[:3])} as in q, got {list(v.shape)}; "
            "reshape v to one value of any width V per head"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype} and {v.dtype}; cast them to one")


def check_gate(
    name: str,
    gate: Tensor | None,
    q: Tensor,
    *,
    needed: bool = False,
    per_head: bool = True,
    per_channel: bool = False,
    hint: str = "reshape or expand it",
) -> None:
    """Raises ValueError unless `gate` is [B,T,H] if it may be `per_head`, or [B,T,H,K] if `per_channel`.

    None passes if the gate is not `needed`.
    """
    if gate is None and not needed:
        return
    _check_tensor(name, gate)
    shapes = {"[B, T, H]": q.shape[:3]} if per_head else {}
    if per_channel:
        shapes["[B, T, H, K]"] = q.shape
    if gate.shape not in shapes.values():
        rule = " or ".join(f"{letters} = {list(shape)}" for letters, shape in shapes.items())
        per = " or ".join(["head"] * per_head + ["key channel"] * per_channel)
        raise ValueError(f"{name} must be {rule}, one number per {per}, got {list(gate.shape)}; {hint}")


def core_dtype(*tensors: Tensor | None) -> torch.dtype:
    """fp64 if one of `tensors` is, else fp32: states and sums are never kept in less."""
    return torch.float64 if any(x is not None and x.dtype == torch.float64 for x in tensors) else torch.float32


def l2_normalize(x: Tensor) -> Tensor:
    """x / sqrt(Σx² + 1e-6) over the last dimension; eps inside the root keeps the gradient of a zero vector finite."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + L2_EPS)


def _check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point():
        kind = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"{name} must be a tensor of floating-point numbers, got {kind}; convert it with torch.as_tensor"
        )
