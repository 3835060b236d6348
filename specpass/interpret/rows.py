"""A prompt's rows: the model keeps the caller's columns; what is scored and stored is packed, real tokens first.

Packed as graphs pack: row b's tokens stand at 0 .. lengths[b] - 1, so both ways choose and number alike.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect.define import SPEC


@dataclasses.dataclass(frozen=True)
class Packing:
    """Rows [B, S] with padding in front. `real` and `order` are None where there is none.

    A model may be spread over devices: each of its layers asks for what lies on its own.

    Args:
        lengths: [B] tokens of each row.
        real: [B, S] bool.
        order: [B, S] packed column -> the caller's.
    """

    lengths: Tensor
    real: Tensor | None = None
    order: Tensor | None = None
    copies: dict[torch.device, Packing] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> Packing:
        """The same on another device, copied once."""
        if device == self.lengths.device:
            return self
        if device not in self.copies:
            own = (part if part is None else part.to(device) for part in (self.real, self.order))
            self.copies[device] = Packing(self.lengths.to(device), *own)
        return self.copies[device]

    @classmethod
    def of(cls, like: Tensor, mask: Tensor | None) -> Packing:
        """Of a prompt like [B, S, ...] and its 2-D mask; a mask without zeros is none."""
        shape = like.new_zeros(like.shape[:2], dtype=torch.int64)
        if mask is None or bool(mask.all()):
            return cls(SPEC.full_lengths(shape))
        order, lengths = SPEC.pack_order(mask, shape)
        return cls(lengths, mask != 0, order)

    def ids(self, ids: Tensor) -> Tensor:
        """[B, S] packed."""
        return ids if self.order is None else SPEC.pack_ids(ids, self.order)

    def states(self, states: Tensor) -> Tensor:
        """[B, K, S, D] packed."""
        if self.order is None:
            return states
        order = self.on(states.device).order
        assert order is not None, "a copy of what is there"
        index = order[:, None, :, None]
        return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))

    def take(self, query: Tensor, rows: Tensor) -> Tensor:
        """Queries [B, H, S, D], not packed, at packed rows [B, R] (-1: anything) -> [B, H, R, D]."""
        columns = rows.clamp(min=0)
        return SPEC.take_rows(query, columns if self.order is None else self.order.gather(1, columns))


def behind(packed: Tensor, ahead: Tensor, lengths: Tensor) -> Tensor:
    """Packed states [B, K, S, D], and each row's `ahead` [B, K, L, D] right behind its tokens: [B, K, S + L, D]."""
    count = ahead.shape[2]
    index = (lengths[:, None] + torch.arange(count, device=lengths.device))[:, None, :, None]
    return F.pad(packed, (0, 0, 0, count)).scatter(2, index.expand(ahead.shape), ahead)
