"""A draft that goes on behind its lookahead: its caches, and what it has read of the answer."""

from __future__ import annotations

import dataclasses
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specpass.cache.rows import repeat_rows

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache


@dataclasses.dataclass
class Drafting:
    """One batch of the draft's.

    Attributes:
        caches: of each layer keys [B, K * P, D], values [B, K * P, Dv] and lengths [B, K]; all of the prompt is kept.
        prompt: [B] tokens of each row's prompt. columns: the longest, padding included.
        told: [B, 1 + n] the prompt's last token, and the n tokens of the answer so far.
        read: [B, m] the answer as the draft has read it, which may have gone another way; None: the lookahead.
    """

    caches: list[Tensor]
    prompt: Tensor
    columns: int
    told: Tensor
    read: Tensor | None = None

    @property
    def slots(self) -> int:
        """P."""
        return self.caches[0].shape[1] // self.caches[2].shape[1]

    def tell(self, tokens: Tensor, before: int) -> None:
        """Tokens [B, q] of the answer, behind `before` of them (others may have been taken back)."""
        self.told = torch.cat([self.told[:, : 1 + before], tokens], 1)

    def unread(self, lookahead_ids: Tensor) -> int:
        """How many of the told tokens the draft has to read, two at least: reading one again changes nothing."""
        answer, read = self.told[:, 1:], lookahead_ids[:, :-1] if self.read is None else self.read
        both = min(answer.shape[1], read.shape[1])
        alike = int((answer[:, :both] == read[:, :both]).all(0).long().cumprod(0).sum())
        return max(2, answer.shape[1] - alike)

    def stand(self, tokens: int, further: int) -> Tensor:
        """Let the caches end in front of the last `tokens` told, with room for them and `further` ones: [B, tokens].

        Returns: their positions.
        """
        start = self.told.shape[1] - 1 - tokens  # of the answer; -1: the prompt's last token is read again
        needed = self.columns + start + tokens + further
        if needed > self.slots:
            self._grow(needed + needed // 4 - self.slots)
        for lengths in self.caches[2::3]:
            lengths.copy_((self.prompt + start)[:, None])
        return self.prompt[:, None] + start + torch.arange(tokens, device=self.prompt.device)

    def repeated(self, count: int) -> Drafting:
        """`count` sequences that go on from each row, side by side."""
        told, read = (None if own is None else repeat_rows(own, count) for own in (self.told, self.read))
        assert told is not None
        caches = [repeat_rows(states, count) for states in self.caches]
        return Drafting(caches, repeat_rows(self.prompt, count), self.columns, told, read)

    def _grow(self, slots: int) -> None:
        """So many slots more for each KV head."""
        for index in range(0, len(self.caches), 3):
            heads = self.caches[index + 2].shape[1]
            for place in (index, index + 1):
                own = self.caches[place].unflatten(1, (heads, -1))
                self.caches[place] = torch.nn.functional.pad(own, (0, 0, 0, slots)).flatten(1, 2)


# Beside the caches of the target: a draft's memory is its own.
DRAFTS: weakref.WeakKeyDictionary[BudgetCache, Drafting] = weakref.WeakKeyDictionary()


def start_draft(cache: BudgetCache, caches: list[Tensor], ids: Tensor, lookahead: int) -> None:
    """A prompt [B, S] was read, and the draft has written L tokens and read all but the last of them."""
    prompt = caches[2][:, 0] - (lookahead - 1)
    DRAFTS[cache] = Drafting(list(caches), prompt, ids.shape[1], ids[:, -1:].clone())
