"""A prompt read by the model's own forward: each layer is scored and compacted as soon as attention has used it.

Attention itself is the model's, with its own mask, and so exact. Where lookahead rows are still to come, keys and
values stay whole, and the window's queries with them, until lookahead.py sends the rows through.
"""

from __future__ import annotations

import dataclasses
import weakref

import torch
from torch import Tensor

from specpass.cache.budget import BudgetCache
from specpass.cache.worth import Readers
from specpass.interpret.keep import Keeper, keep_whole
from specpass.interpret.masks import Masks
from specpass.interpret.watch import Attention, Listener, Watch
from specpass.rewrite import Refusal
from specpass.sizes import FULL

UNSEEN = "no scaled_dot_product_attention was seen that reads its keys and values"
CHANGED = "keys and values change between the cache and attention"
HEADS, LENGTH = 1, 2  # axes of [B, K, T, D]


@dataclasses.dataclass
class Waiting:
    """A layer whose lookahead rows are to come: packed key and value, the window's queries [B, H, W, D],
    None where nothing is scored, the scale, and whether heads have a choice of their own."""

    key: Tensor
    value: Tensor
    raw: tuple[Tensor, Tensor]  # in the model's columns, for its attention
    window: Tensor | None
    scale: float
    apart: bool = True
    ahead: list[tuple[Tensor, Tensor, Tensor]] = dataclasses.field(default_factory=list)  # query, key, value


class ReadPrompt(Listener):
    """The first phase: the target reads the prompt; `blocks`: of masks, see Masks.

    Attributes:
        waiting: layers that are not compacted yet, where `ahead` says that lookahead rows follow.
        exact: layer -> why it is kept whole.
        pruned: layers that are compacted, or will be.
        readers: for each attention that read another layer's keys and values, in order, that layer.
    """

    watch: Watch

    def __init__(self, cache: BudgetCache, keeper: Keeper, ahead: bool, *, blocks: bool = False) -> None:
        self.cache, self.keeper, self.ahead = cache, keeper, ahead
        self.watch = Watch(self, records=True)
        self.masks = Masks(keeper.packing.real, blocks=blocks)
        self.open: dict[int, tuple[Tensor, Tensor]] = {}
        self.waiting: dict[int, Waiting] = {}
        self.exact: dict[int, str] = {}
        self.pruned: list[int] = []
        self.readers: list[int] = []
        self.raw: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor], int]] = {}  # key, value, query heads
        self.places: dict[int, torch.device] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self._close()
        self.open[layer] = (key, value)
        self.watch.follow(layer, key, value)
        return key, value

    def attend(self, layer: int, call: Attention, made: bool) -> Tensor:
        out = call.run()
        if layer not in self.open:
            self._read_again(layer, call, made)
            return out
        key, value = self.open.pop(layer)
        call = call.unfolded(self._rows(key))
        self.places[layer] = key.device
        self.raw[layer] = (weakref.ref(key), weakref.ref(value), call.query.shape[1])
        reason = self._masked(layer, call) or (self._changed(layer, call) if made else repeats(call, key))
        if reason:
            self.keep_whole(layer, key, value, reason)
        else:
            self.cache.layers[layer].made = made
            self.cache.layers[layer].readers = Readers(call.query.shape[1], key.shape[3], key.dtype)
            if self.cache.bound is not None and made:
                self.cache.bound.check_asks([f"layer {layer}"])
            self._prune(layer, key, value, call, not made or self._heads_apart(call))
        return out

    def _rows(self, key: Tensor) -> int:
        """Queries of a call whose attention reads `key` [B, K, T, D]."""
        return key.shape[2]

    def _window(self, query: Tensor) -> Tensor:
        """[B, H, W, D] of the queries that score, of those of a call."""
        keeper = self.keeper.on(query.device)
        assert keeper.rows is not None, "something is scored"
        return keeper.packing.take(query, keeper.rows[:, : keeper.method.window])

    def _masked(self, layer: int, call: Attention) -> str:
        return self.masks.meaning(call, self.watch.source(call.mask), self.cache.layers[layer].span or FULL)

    def _changed(self, layer: int, call: Attention) -> str:
        """Why attention does not read what is made of cached columns, one by one; "" where it does."""
        recipe = self.watch.recipe
        if (
            self.watch.reads(call.query, layer)
            or recipe is None
            or not recipe.keeps_apart(LENGTH, call.key, call.value)
        ):
            return CHANGED
        if self.keeper.method.score is not None and not self._heads_apart(call):
            return f"{self.keeper.method.name}.score scores KV heads, and these keys are made of one latent"
        return ""

    def _heads_apart(self, call: Attention) -> bool:
        assert self.watch.recipe is not None, "what is made is recorded"
        return self.watch.recipe.keeps_apart(HEADS, call.key, call.value)

    def _read_again(self, layer: int, call: Attention, made: bool) -> None:
        """Another layer's attention reads this one's keys and values: it is to read what was kept of them.

        What is kept was chosen by the layer's own queries: some models compute no rows but the last of the others.
        """
        self.readers.append(layer)
        if layer in self.exact:
            return
        *refs, heads = self.raw[layer]
        if call.query.device != self.places[layer]:
            raise Refusal(f"a layer on another device reads layer {layer}'s keys and values")
        key, value = (ref() for ref in refs)
        if made or key is None or value is None:
            raise Refusal(f"another layer's attention reads what is made of layer {layer}'s keys and values")
        call = call.of_heads(heads)
        reason = self._masked(layer, call) or repeats(call, key)
        if reason:
            self.waiting.pop(layer, None)
            self.keep_whole(layer, key, value, f"{reason} (in a layer that reads layer {layer}'s keys and values)")

    def finish(self) -> None:
        self._close()

    def _close(self) -> None:
        """Layers that no attention call claimed before the next one wrote stay whole."""
        for layer, (key, value) in self.open.items():
            self.keep_whole(layer, key, value, UNSEEN)
        self.open.clear()

    def keep_whole(self, layer: int, key: Tensor, value: Tensor, reason: str) -> None:
        """The site is exact, and why."""
        self.exact[layer] = reason
        self.pruned = [pruned for pruned in self.pruned if pruned != layer]
        keep_whole(self.cache.layers[layer], key, value)

    def _prune(self, layer: int, key: Tensor, value: Tensor, call: Attention, apart: bool) -> None:
        keeper = self.keeper.on(key.device)
        packing = keeper.packing
        self.pruned.append(layer)
        packed = packing.states(key), packing.states(value)
        own = self.cache.layers[layer]
        if self.ahead and own.is_sliding:  # the lookahead's attention is to read what is in front of the window's end
            self.waiting[layer] = Waiting(*packed, (key, value), None, call.scale)
            return
        if keeper.rows is None or own.is_sliding:
            keeper.compact(own, *packed, None)
            return
        window = self._window(call.query)
        if self.ahead:
            self.waiting[layer] = Waiting(*packed, (key, value), window, call.scale, apart)
            return
        read = (packing.states(call.key), packing.states(call.value)) if own.made else packed
        sums, how = self._sums(call, window), keeper.method
        scores = keeper.score(window, *read, call.scale, sums)
        attention = keeper.attention(window, read[0], call.scale, sums) if how.rungs else None
        if not apart:
            scores = keeper.one_choice(scores, key.shape[1], how.reduce)
            attention = None if attention is None else keeper.one_choice(attention, key.shape[1], "mean")
        keeper.compact(own, *packed, scores, attention)

    def _sums(self, call: Attention, query: Tensor) -> Tensor | None:
        """[B, H, R]: the log-sum-exp of the rows that score, where they do not see all columns up to their own."""
        return None


class ReadWhole(Listener):
    """A prompt of which everything is kept: the model runs exactly, and goes on so."""

    def __init__(self, cache: BudgetCache) -> None:
        self.cache, self.watch = cache, None

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        keep_whole(self.cache.layers[layer], key, value)
        return key, value


def repeats(call: Attention, key: Tensor) -> str:
    """ "" where attention's heads are the cache's KV heads, each repeated for its group; else why not.

    Views say who is read and not in which order heads were repeated; the last column's values say it.
    """
    heads, kv_heads = call.query.shape[1], key.shape[1]
    if heads % kv_heads:
        return f"{heads} query heads are no multiple of {kv_heads} KV heads"
    read = call.key
    if read.dim() != 4 or read.shape[2:] != key.shape[2:] or read.shape[1] not in (heads, kv_heads):
        return f"attention reads keys of shape {tuple(read.shape)}, the cache holds {tuple(key.shape)}"
    last = key[:, :, -1].repeat_interleave(read.shape[1] // kv_heads, 1)
    return "" if torch.equal(read[:, :, -1], last) else "its query groups do not lie side by side"
