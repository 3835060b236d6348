"""Prompts of a case, and what of them a target read."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


class WrongError(Exception):
    """The compiled model's answer, or what it kept, is not what it should be."""


@dataclasses.dataclass
class Prompts:
    """Prompts [B, S] padded on the left, and what the target read of them."""

    ids: Tensor
    mask: Tensor
    read: list[Tensor]  # of each row: prompt positions, ascending

    @property
    def size(self) -> int:
        """S, padding included."""
        return self.ids.shape[1]

    @property
    def lengths(self) -> list[int]:
        return self.mask.sum(1).tolist()

    def row(self, index: int) -> Tensor:
        """One prompt alone [1, S_i]."""
        return self.ids[[index], self.size - self.lengths[index] :]

    def as_read(self) -> Prompts:
        """The prompts that the target saw, as ones that were read whole."""
        rows = [self.row(index)[0, read] for index, read in enumerate(self.read)]
        return padded(rows)


def padded(rows: list[Tensor]) -> Prompts:
    """Prompts [S_i]; the padding is an ordinary token."""
    size = max(map(len, rows))
    ids, mask = torch.full((len(rows), size), 9), torch.zeros(len(rows), size, dtype=torch.int64)
    for index, row in enumerate(rows):
        ids[index, size - len(row) :], mask[index, size - len(row) :] = row, 1
    return Prompts(ids, mask, [torch.arange(len(row)) for row in rows])
