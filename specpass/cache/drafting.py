"""A draft that goes on behind its lookahead: its caches, and what it has read of the answer."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache


@dataclasses.dataclass
class Drafting:
    """One batch of the draft's.

    Attributes:
        caches: of each layer keys [B, K * P, D], values [B, K * P, Dv] and lengths [B, K]; all of the prompt is kept,
            and of the answer all but the first `gone` tokens.
        prompt: [B] tokens of each row's prompt. columns: the longest, padding included.
        told: [B, 1 + n] the prompt's last token, and the n tokens of the answer so far.
        read: [B, m] the answer as the draft has read it, which may have gone another way; None: the lookahead.
        sure: so many tokens of the answer are what it has read, without a look at the device.
        rows: [B] of `caches` that the batch goes on from; None: its own.
    """

    caches: list[Tensor]
    prompt: Tensor
    columns: int
    told: Tensor
    read: Tensor | None = None
    sure: int = 0
    rows: Tensor | None = None
    gone: int = 0

    @property
    def slots(self) -> int:
        """P."""
        return self.caches[0].shape[1] // self.caches[2].shape[1]

    def tell(self, tokens: Tensor, before: int) -> None:
        """Tokens [B, q] of the answer, behind `before` of them (others may have been taken back)."""
        self.told = torch.cat([self.told[:, : 1 + before], tokens], 1)
        self.sure = min(self.sure, before)

    def unread(self, lookahead_ids: Tensor) -> int:
        """How many of the told tokens the draft has to read, two at least: reading one again changes nothing."""
        answer, read = self.told[:, 1:], lookahead_ids[:, :-1] if self.read is None else self.read
        both = min(answer.shape[1], read.shape[1])
        alike = int((answer[:, :both] == read[:, :both]).all(0).long().cumprod(0).sum())
        return max(2, answer.shape[1] - alike)

    def unread_surely(self) -> int:
        """As `unread`, and no fewer: the lookahead counts as unread, and nothing is looked at."""
        return max(2, self.told.shape[1] - 1 - self.sure)

    def stand(self, tokens: int, further: int) -> Tensor:
        """Let the caches end in front of the last `tokens` told, with room for them and `further` ones: [B, tokens].

        Returns: their positions.
        """
        if self.rows is not None:
            self.caches = [states.index_select(0, self.rows) for states in self.caches]
            self.rows = None
        start = self.told.shape[1] - 1 - tokens  # of the answer; -1: the prompt's last token is read again
        needed = self.columns + start - self.gone + tokens + further
        if needed > self.slots:
            self._grow(needed + needed // 4 - self.slots)
        for lengths in self.caches[2::3]:
            lengths.copy_((self.prompt + start - self.gone)[:, None])
        return self.prompt[:, None] + start + torch.arange(tokens, device=self.prompt.device)

    def let_go(self, most: int) -> None:
        """Where more than twice `most` tokens of the answer are held, let the newest `most` alone stay."""
        excess = self.sure - self.gone - most
        if excess <= most:
            return
        self.gone += excess
        slot = torch.arange(self.slots, device=self.prompt.device)
        source = torch.where(slot < self.prompt[:, None], slot, (slot + excess).clamp(max=self.slots - 1))
        for index in range(0, len(self.caches), 3):
            heads = self.caches[index + 2].shape[1]
            for place in (index, index + 1):
                own = self.caches[place].unflatten(1, (heads, -1))
                self.caches[place] = own.gather(2, source[:, None, :, None].expand_as(own)).flatten(1, 2)

    def mapped(self, change: Callable[[Tensor], Tensor]) -> Drafting:
        """That of another batch, which `change` makes of tensors [B, ...]; caches are moved once they are read."""
        rows = torch.arange(len(self.told), device=self.told.device) if self.rows is None else self.rows
        read = None if self.read is None else change(self.read)
        return dataclasses.replace(
            self, prompt=change(self.prompt), told=change(self.told), read=read, rows=change(rows)
        )

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
