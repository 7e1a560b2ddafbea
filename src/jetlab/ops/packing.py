"""Packed documents: several sequences behind one another in a single row, cut at `cu_seqlens`.

    cu_seqlens = [0, n_1, n_1 + n_2, …, T]      document i is the slice cu_seqlens[i] : cu_seqlens[i + 1]

The operations spread the documents over a padded batch, one document a row, and gather the tokens back afterwards.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import TypeVar

import torch
from torch import Tensor

Made = TypeVar("Made")


def once(cu_seqlens: Tensor, what: tuple, make: Callable[[], Made]) -> Made:
    """`make()`, kept on the tensor for as long as its contents stay: every layer asks the same of the same documents.

    To read a number off a GPU is to wait for all that it has been given to do.
    """
    if (
        torch.compiler.is_compiling() or cu_seqlens.is_inference()
    ):  # the one keeps nothing, the other no count of changes
        return make()
    kept = vars(cu_seqlens).setdefault("_documents", {})
    key = (*what, cu_seqlens._version)
    if key not in kept:
        kept[key] = make()
    return kept[key]


def check_documents(cu_seqlens: Tensor, n_batch: int, n_tokens: int, *, row: int | None = None) -> None:
    """Raises ValueError if the batch is not 1, or `cu_seqlens` is not a tensor of whole numbers that rise from 0 to T.

    `row`: so too if a document reaches over the end of one of the rows of so many tokens that were laid end to end.
    """
    if n_batch != 1:
        raise ValueError(
            f"packed documents lie in one row: cu_seqlens needs batch size 1, got {n_batch}; "
            "concatenate the rows along time and give the ends of all documents"
        )
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.is_floating_point() or cu_seqlens.ndim != 1:
        raise ValueError(
            f"cu_seqlens must be a tensor of whole numbers [N+1], got {cu_seqlens!r}; use torch.tensor([0, …, T])"
        )
    ends = once(cu_seqlens, ("ends",), cu_seqlens.tolist)
    if len(ends) < 2 or ends[0] != 0 or ends[-1] != n_tokens or any(a >= b for a, b in pairwise(ends)):
        raise ValueError(
            f"cu_seqlens must rise strictly from 0 to the number of tokens, {n_tokens}, got {ends}; "
            "drop empty documents and end with the total length"
        )
    if row is not None and not set(range(0, n_tokens, row)) <= set(ends):
        raise ValueError(
            f"a document must end where its row does, every {row} tokens, got {ends}; cut it there into two"
        )


def document_positions(cu_seqlens: Tensor, n_batch: int, n_tokens: int) -> tuple[Tensor, Tensor]:
    """Place of every token after spreading, and which places hold a token; errors as in `check_documents`.

    Returns `index` [T] into the flattened [N, L] (N documents, L the longest) and `mask` [N, L], True at tokens.
    """
    check_documents(cu_seqlens, n_batch, n_tokens)

    def positions() -> tuple[Tensor, Tensor]:
        lengths = cu_seqlens.long().diff()
        mask = torch.arange(int(lengths.max()), device=cu_seqlens.device) < lengths[:, None]
        return mask.flatten().nonzero().squeeze(1), mask

    return once(cu_seqlens, ("positions",), positions)


def spread(x: Tensor, index: Tensor, mask: Tensor) -> Tensor:
    """Packed [1, T, …] to padded [N, L, …], zero where there is no token."""
    padded = x.new_zeros(mask.numel(), *x.shape[2:]).index_copy(0, index, x[0])
    return padded.view(*mask.shape, *x.shape[2:])


def gather(x: Tensor, index: Tensor) -> Tensor:
    """Padded [N, L, …] back to packed [1, T, …]."""
    return x.flatten(0, 1).index_select(0, index)[None]
