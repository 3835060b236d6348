"""What the target reads of a prompt that a draft has scored (SpecPC): C tokens, in columns that end with each row."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from specpass.dialect.define import SPEC
from specpass.interpret.rows import Packing
from specpass.methods.specpc import SpecPC


@dataclasses.dataclass(frozen=True)
class Part:
    """The tokens that the target reads.

    Args:
        positions: [B, C] of the caller's packed prompt, ascending, -1 unused.
        shift: [B] what generate counts less what the target is told.
        ids: [B, T], padded in front; T <= C, where rows are shorter.
        mask: [B, T], None where every row has T tokens.
        told: [B, T] position ids.
    """

    positions: Tensor
    shift: Tensor
    ids: Tensor
    mask: Tensor | None
    told: Tensor

    @property
    def packing(self) -> Packing:
        return Packing.of(self.ids, self.mask)


def compressed(how: SpecPC, scores: Tensor, ids: Tensor, lengths: Tensor) -> Part:
    """Args: scores [B, S] and ids [B, S] packed, lengths [B]."""
    settings = (how.budget, how.window, how.kernel, how.neighbours, how.pool)
    positions = SPEC.select_prompt(scores, lengths, *settings)
    kept = SPEC.count_kept(positions)
    original = how.positions == "original"
    numbers = positions if original else SPEC.number_anew(positions)
    shift = torch.zeros_like(lengths) if original else lengths - kept
    width = int(kept.max())  # no column that is padding in every row
    taken, numbers = SPEC.take_ids(ids, positions)[:, :width], numbers[:, :width]
    column = torch.arange(width, device=ids.device) - (width - kept)[:, None]  # packed -> aligned at the end
    real = column >= 0
    if bool(real.all()):
        return Part(positions, shift, taken, None, numbers)
    source = column.clamp(min=0)
    told = numbers.gather(1, source).masked_fill(~real, 0)
    return Part(positions, shift, taken.gather(1, source), real.to(torch.int64), told)
