"""Verified lookahead: the answer's first tokens by logits that the prompt's prefill has computed already.

A prefill of S + L tokens holds the target's own logits at S .. S + L - 1, with all KV, each for the case that the
answer is the lookahead up to there. Its keys and values lie in the free slots behind what was kept (see gather_prune).
While the tokens that are fed follow the lookahead, a step is these logits and one slot more in use; a row that leaves
it once has left it for good. Exact for greedy decoding and sampling alike: nothing is assumed of how tokens are chosen.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache


@dataclasses.dataclass
class Replay:
    """What is known of an answer's first tokens.

    Args:
        logits: [R, L, V] behind each lookahead token, in the model's dtype, on its device.
        eos_ids: end what the draft writes.
    Attributes:
        rows: of each row of the batch, the row of `logits` that is its own (beams are reordered).
        follows: whether that row is still the lookahead.
        ids: its lookahead tokens, once they were looked at.
        used: tokens that were followed: a cache that holds another number behind its prompt has left the lookahead.
        start: tokens of the answer in front of them; proposed: they are a speculator's, verified by the pruned target.
        held: what lay in slots that appended tokens were written to, for the case that all of these are taken back.
    """

    logits: Tensor
    eos_ids: tuple[int, ...] = ()
    start: int = 0
    proposed: bool = False
    rows: list[int] = dataclasses.field(default_factory=list)
    follows: list[bool] = dataclasses.field(default_factory=list)
    ids: list[list[int]] = dataclasses.field(default_factory=list)
    used: int = 0
    held: list[Held] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.rows:
            self.rows, self.follows = list(range(len(self.logits))), [True] * len(self.logits)

    def fits(self, cache: BudgetCache, tokens: Tensor) -> bool:
        """Whether tokens [B, q] behind the cache could follow; the lookahead is looked at for the first time."""
        if not self.ids:
            assert cache.lookahead_ids is not None
            self.ids = cache.lookahead_ids.tolist()
        return cache.appended == self.start + self.used and len(tokens) == len(self.rows)

    def matching(self, tokens: Tensor) -> list[bool]:
        """Of each row of the batch, whether it has followed so far, and does with the first of its tokens [B, q]."""
        at, fed = self.used, tokens[:, 0].tolist()
        return [
            follows and at < len(row) and row[at] == token
            for follows, row, token in zip(self.follows, self.ids, fed, strict=True)
        ]

    def take(self, tokens: Tensor) -> list[int]:
        """Rows of the batch whose next token [B, 1] follows; the others have left from now on, if it is not all."""
        follows = self.matching(tokens)
        if any(follows):
            self.follows = follows
            self.used += 1
        return [index for index, follows in enumerate(follows) if follows]

    def free(self) -> int:
        """Rows that took their last token from the lookahead and had not ended before it."""
        return sum(follows and self.end(row) >= self.used for follows, row in zip(self.follows, self.ids, strict=True))

    def end(self, row: list[int]) -> int:
        """Tokens of a row that an answer can be fed: behind an EOS nothing is asked for."""
        return next((index for index, token in enumerate(row) if token in self.eos_ids), len(row))

    def known(self, rows: Sequence[int]) -> Tensor:
        """Logits [len(rows), 1, V] behind the last token taken, of rows of the batch."""
        source = [self.rows[row] for row in rows]
        last = self.logits[:, self.used - 1 : self.used]
        return last.clone() if source == list(range(len(last))) else last[source]

    @property
    def over(self) -> bool:
        """Whether no row can follow further: then the logits are of no more use."""
        return not any(
            follows and self.end(row) > self.used for follows, row in zip(self.follows, self.ids, strict=True)
        )

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The batch is another one: `change` makes it of tensors [B, ...]."""
        if self.held:  # appended tokens that a batch of other rows goes on from are not taken back
            self.held, self.follows = [], [False] * len(self.rows)
        order = change(torch.arange(len(self.rows), device=self.logits.device)).tolist()
        self.rows, self.follows = [self.rows[i] for i in order], [self.follows[i] for i in order]
        self.ids = [self.ids[i] for i in order] if self.ids else []

    def take_back(self, cache: BudgetCache) -> bool:
        """Tokens of the answer were taken back; False: what is left of it has left the lookahead."""
        left = cache.appended - self.start
        if not 0 <= left <= self.used or not all(self.follows):
            return False
        self.used = left
        put_back(cache, self.held)
        self.held = []
        return True

    def copy(self) -> Replay:
        """Another that is used up by itself; both read the same logits."""
        return dataclasses.replace(self)


# Beside the caches, not in them: what a cache holds is its budget, and this is gone after a few tokens.
REPLAYS: weakref.WeakKeyDictionary[BudgetCache, Replay] = weakref.WeakKeyDictionary()


def follow(cache: BudgetCache) -> None:
    """One token more of each row, whose keys and values lie in the next slot."""
    for layer in cache.budgeted:
        layer.lengths.add_(1)
    cache.seen.add_(1)


@dataclasses.dataclass(frozen=True)
class Held:
    """Keys [R, K * n, D] and values [R, K * n, Dv] of slots [R, K, n] of each head, in the budgeted layer `index`."""

    index: int
    rows: Tensor  # [R, 1]
    slots: Tensor
    keys: Tensor
    values: Tensor


def hold(cache: BudgetCache, rows: Sequence[int], tokens: int = 1) -> list[Held]:
    """Before a step that writes every row's next `tokens` slots: what lies there in `rows`.

    It is the lookahead's keys and values, which the prefill computed with all KV.
    """
    found = []
    for index, layer in enumerate(cache.budgeted):
        device = layer.lengths.device
        chosen = torch.tensor(rows, device=device)
        slots = layer.lengths[chosen][:, :, None] + torch.arange(tokens, device=device)
        place = chosen[:, None], layer.places(slots, chosen)
        assert layer.key_buffer is not None, "a prompt was read"
        assert layer.value_buffer is not None
        found.append(Held(index, place[0], slots, layer.key_buffer[place], layer.value_buffer[place]))
    return found


def put_back(cache: BudgetCache, held: Sequence[Held]) -> None:
    """What `hold` found, into its slots; these may have moved, where the storage grew."""
    for each in held:
        layer = cache.budgeted[each.index]
        place = each.rows, layer.places(each.slots, each.rows[:, 0])
        for buffer, states in ((layer.key_buffer, each.keys), (layer.value_buffer, each.values)):
            assert buffer is not None, "a prompt was read"
            buffer[place] = states
