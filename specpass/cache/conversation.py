"""What a conversation is made of (`dropped="host"`): all of its tokens, and keys and values of those that were read.

They lie in host memory, beside the cache and not in it: what a cache holds on the device is its budget. A turn reads
them a layer at a time, scores all of them anew, and adds its own; the answer's tokens are read by the turn behind it.

Symbols: B batch, T tokens, K KV heads, D head dimension.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specpass.cache.identity import Identity
from specpass.cache.prefix import Pair
from specpass.errors import DroppedError

if TYPE_CHECKING:
    from specpass.cache.budget import BudgetCache

PLACES = ("host",)
STEP = 64  # tokens: a store has room for a multiple of this many
HOST = torch.device("cpu")


def check_place(dropped: object) -> None:
    """Raises: DroppedError: what is dropped cannot be kept there."""
    if dropped is not None and dropped not in PLACES:
        raise DroppedError(
            f"dropped={dropped!r}: expected 'host' (keys and values that are dropped stay in host memory, for the next "
            "turn), or None."
        )


class Store:
    """Keys, or values, of one layer [T, B, K, D] in host memory: tokens to come lie behind those that are there.

    Where they come from a GPU the memory is pinned, so that copies do not wait.
    """

    def __init__(self) -> None:
        self.states: Tensor | None = None

    def write(self, states: Tensor, start: int) -> None:
        """Put states [B, K, n, D] at tokens `start` and behind."""
        end = start + states.shape[2]
        if self.states is None or self.states.shape[0] < end:
            self._grow(end, states)
        assert self.states is not None
        self.states[start:end].copy_(states.permute(2, 0, 1, 3), non_blocking=states.is_cuda)

    def _grow(self, tokens: int, like: Tensor) -> None:
        old, (batch, heads, _, width) = self.states, like.shape
        room = -(-max(tokens, 0 if old is None else len(old) * 5 // 4) // STEP) * STEP
        self.states = torch.empty(room, batch, heads, width, dtype=like.dtype, device=HOST, pin_memory=like.is_cuda)
        if old is not None:
            self.states[: len(old)] = old

    def read(self, tokens: int) -> Tensor:
        """[B, K, tokens, D], a view."""
        assert self.states is not None, "something was written"
        return self.states[:tokens].permute(1, 2, 0, 3)

    def take_rows(self, rows: Tensor) -> None:
        """Row b is to be what row rows[b] is."""
        assert self.states is not None, "something was written"
        own = self.states.index_select(1, rows)
        self.states = own.pin_memory() if self.states.is_pinned() else own

    @property
    def nbytes(self) -> int:
        return 0 if self.states is None else self.states.nbytes


@dataclasses.dataclass
class Held:
    """Keys and values that one model has of each row's first tokens, by the number of the layer.

    Attributes: lengths: [B] tokens of each row, on the host; None: nothing is held.
    """

    layers: dict[int, tuple[Store, Store]] = dataclasses.field(default_factory=dict)
    lengths: Tensor | None = None

    def write(self, layer: int, key: Tensor, value: Tensor, start: int) -> None:
        """Keys [B, K, n, D] and values of packed tokens `start` and behind."""
        stores = self.layers.setdefault(layer, (Store(), Store()))
        for store, states in zip(stores, (key, value), strict=True):
            store.write(states, start)

    def pairs(self) -> dict[int, Pair]:
        """Keys [B, K, T, D] and values by layer, each row's tokens first."""
        if self.lengths is None:
            return {}
        tokens = int(self.lengths.max())
        return {layer: (keys.read(tokens), values.read(tokens)) for layer, (keys, values) in self.layers.items()}

    @property
    def first(self) -> int:
        """Tokens that are held of every row."""
        return 0 if self.lengths is None else int(self.lengths.min())

    def unread(self, lengths: Tensor) -> int:
        """Tokens that are not held, of the row of which most are not; lengths [B]: of all of each."""
        return int((lengths if self.lengths is None else lengths - self.lengths).max())

    def take_rows(self, rows: Tensor) -> None:
        if self.lengths is None or torch.equal(rows, torch.arange(len(self.lengths))):
            return
        self.lengths = self.lengths[rows]
        for store in self.stores:
            store.take_rows(rows)

    @property
    def stores(self) -> Iterable[Store]:
        return (store for pair in self.layers.values() for store in pair)

    @property
    def nbytes(self) -> int:
        return sum(store.nbytes for store in self.stores)


@dataclasses.dataclass(eq=False)
class Conversation:
    """One batch of conversations.

    Attributes:
        ids, mask: [B, T] columns that a turn has read, padding included, as the caller counts them.
        answer: [B, n] tokens that were fed one by one behind them; some may have been taken back since.
        target, draft: what either has read of it.
        order: [B] of each row of the batch the row of what is held (beams are reordered); None: its own.
        reader, drafter: which models have read it.
        behind, hidden: key and tokens of the prefix that it stands behind, which the caller does not count.
    """

    ids: Tensor
    mask: Tensor
    answer: Tensor
    target: Held = dataclasses.field(default_factory=Held)
    draft: Held = dataclasses.field(default_factory=Held)
    order: Tensor | None = None
    reader: Identity | None = None
    drafter: Identity | None = None
    behind: str = ""
    hidden: int = 0

    @classmethod
    def of(cls, ids: Tensor) -> Conversation:
        """An empty one, of as many rows as ids [B, S] have."""
        none = ids.new_empty(len(ids), 0, dtype=torch.int64)
        return cls(none, none.clone(), none.clone())

    def tell(self, tokens: Tensor, before: int) -> None:
        """A step feeds tokens [B, 1], behind `before` others of the answer."""
        self.answer = torch.cat([self.answer[:, :before], tokens], 1)

    def so_far(self, appended: int) -> tuple[Tensor, Tensor]:
        """Ids [B, T + n] and their mask, with the first n = `appended` tokens of the answer."""
        answer = self.answer[:, :appended]
        return torch.cat([self.ids, answer], 1), torch.cat([self.mask, torch.ones_like(answer)], 1)

    def map_rows(self, change: Callable[[Tensor], Tensor]) -> None:
        """The batch is another one; what is held is moved when it is read."""
        self.order = change(torch.arange(len(self.ids), device=self.ids.device) if self.order is None else self.order)
        self.ids, self.mask, self.answer = (change(own) for own in (self.ids, self.mask, self.answer))

    def settle(self) -> None:
        """Let what is held be in the order of the batch."""
        if self.order is not None:
            order, self.order = self.order.to(HOST), None
            self.target.take_rows(order)
            self.draft.take_rows(order)

    def check_reader(self, target: Identity, draft: Identity | None) -> None:
        """What another draft has read is left out: this one reads it anew.

        Raises: DroppedError: another target has read the conversation, or this one with other weights.
        """
        if self.reader is not None and (self.reader.config, self.reader.weights) != (target.config, target.weights):
            raise DroppedError(
                f"what is held was read by {self.reader.name}, and the target is {target.name} with another config or "
                "other weights (adapters count): go on with the model that read it, or call cache.reset()."
            )
        if draft is None or self.drafter != draft:
            self.draft = Held()
        self.reader, self.drafter = target, draft

    @property
    def nbytes(self) -> int:
        """Bytes in host memory."""
        return self.target.nbytes + self.draft.nbytes


# Beside the caches, as what a cache holds on the device is its budget.
CONVERSATIONS: weakref.WeakKeyDictionary[BudgetCache, Conversation] = weakref.WeakKeyDictionary()
