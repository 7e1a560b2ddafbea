"""The rows of tokens on which importance is measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from jetlab.data.packing import Mixture
from jetlab.seeding import derive, generator


@dataclass(frozen=True)
class Calibration:
    """`ids` [n, T] and `real` [n, T], False where a row is padded on the right; only real positions count.

    Raises ValueError if there is no row, the two differ in shape, or a row has no real position.
    """

    ids: Tensor
    real: Tensor

    def __post_init__(self):
        if self.ids.ndim != 2 or not self.ids.numel() or self.real.shape != self.ids.shape:
            raise ValueError(
                f"calibration needs ids and a mask of one shape [rows, tokens], got {list(self.ids.shape)} and "
                f"{list(self.real.shape)}; `rows_of` makes both of lists of ids"
            )
        if not bool(self.real.any(1).all()):
            raise ValueError("each row of a calibration needs a real position, got one that is all padding; drop it")

    @property
    def n_tokens(self) -> int:
        return int(self.real.sum())

    def batches(self, rows_at_once: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
        """(ids, real) of a few rows at a time, on the device."""
        for ids, real in zip(self.ids.split(rows_at_once), self.real.split(rows_at_once), strict=True):
            yield ids.to(device), real.to(device)


def rows_of(rows: Sequence[Sequence[int]]) -> Calibration:
    """Rows of ids of any lengths. Raises ValueError if there is none or one is empty."""
    if not rows or not all(map(len, rows)):
        raise ValueError("calibration needs rows with at least one token each; give some, or leave calibration out")
    ids = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
    real = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row)], real[i, : len(row)] = torch.as_tensor(row), True
    return Calibration(ids, real)


def calibration(mixture: Mixture, n_batches: int) -> Calibration:
    """`n_batches` batches of a mixture's tasks, drawn from a seed of their own: a row of training comes up by chance alone."""
    apart = Mixture(
        mixture.tasks, mixture.rows, mixture.tokenizer, mixture.seq_len, derive(mixture.seed, "calibration")
    )
    ids = torch.cat([apart.batch(step).ids for step in range(n_batches)])
    return Calibration(ids, ids != mixture.tokenizer.pad_token_id)


def random_rows(vocab_size: int, n_rows: int, seq_len: int, seed: int) -> Calibration:
    """Ids drawn evenly from the vocabulary: for a model whose text is not at hand."""
    ids = torch.randint(vocab_size, (n_rows, seq_len), generator=generator(seed, "calibration"))
    return Calibration(ids, torch.ones_like(ids, dtype=torch.bool))
