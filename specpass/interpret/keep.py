"""Compact one layer: scores by the operators that graphs hold, positions, storage. What graphs do in gather_prune."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

from specpass.bits import why_unserved
from specpass.cache.budget import BudgetCache
from specpass.cache.protocol import BudgetLayer
from specpass.dialect.define import SPEC
from specpass.errors import MethodHookError
from specpass.interpret.rows import Packing
from specpass.interpret.spread import Shared, Unspread, store_ragged
from specpass.methods.base import Method
from specpass.parallel.agree import all_of_ranks
from specpass.parallel.shards import Ranks
from specpass.passes.attend_slots import UNSPREAD

MADE = "attention reads what is made of cached keys"


@dataclasses.dataclass(frozen=True)
class Keeper:
    """How the layers of one prompt are compacted.

    Args:
        cache: whose layers.
        packing: the rows that the target reads.
        short: the prompt fits the budget and is kept whole.
        rows: [B, W + L] packed positions of the query rows, None where nothing is scored.
        read: [B, C1] prompt tokens that the target reads, None: all.
        ahead: lookahead tokens L behind each row, whose keys and values lie in the first free slots (see gather_prune).
        shared: what layers that share a storage have kept so far.
        how: the method that scores and selects, where it is not the cache's.
        ranks: whose KV heads share budgets with these.
    """

    cache: BudgetCache
    packing: Packing
    short: bool
    rows: Tensor | None = None
    read: Tensor | None = None
    ahead: int = 0
    shared: Shared = dataclasses.field(default_factory=Shared)
    how: Method | None = None
    ranks: Ranks | None = None
    copies: dict[torch.device, Keeper] = dataclasses.field(default_factory=dict, init=False, repr=False, compare=False)

    def on(self, device: torch.device) -> Keeper:
        """For layers on another device: rows, lengths and what is read of the prompt are copied once."""
        packing = self.packing.on(device)
        if packing is self.packing:
            return self
        if device not in self.copies:
            rows, read = (part if part is None else part.to(device) for part in (self.rows, self.read))
            self.copies[device] = dataclasses.replace(self, packing=packing, rows=rows, read=read)
        return self.copies[device]

    @property
    def method(self) -> Method:
        return self.cache.method if self.how is None else self.how

    def compact(
        self, layer: BudgetLayer, key: Tensor, value: Tensor, scores: Tensor | None, attention: Tensor | None = None
    ) -> None:
        """Store what layer keeps of packed key [B, K, T, D] and value [B, K, T, Dv].

        Args: scores [B, K, T]; attention [B, K, T]: by which a budget is chosen behind the last layer.

        Raises: Unspread: its heads cannot share budgets.
        """
        if layer.ragged:
            self._spread(layer, key, value, scores)
            return
        if attention is None:
            positions = self.positions(layer, key.shape[1], scores)
        else:
            method, rungs = self.method, list(self.cache.rungs)
            settings = (layer.budget, method.window, method.kernel, method.pool, rungs)
            found = SPEC.select_rungs(scores, attention, self.packing.lengths, *settings)
            positions, layer.rung, layer.shares = found
        if self._unlike(layer) and self.packing.order is not None:  # of a padded batch, rows that fit keep all
            positions = SPEC.keep_short_rows(positions, self.packing.lengths, self.cache.whole)
        stored, room = self._with_ahead(positions), self.cache.room - self.ahead
        layer.key_buffer, layer.value_buffer, used = SPEC.gather_kv(key, value, stored, room)
        layer.lengths = used - self.ahead if self.ahead else used
        layer.kept_positions = positions if self.read is None else SPEC.map_positions(positions, self.read)
        layer.is_initialized = True
        if layer.bits:
            dtype = str(key.dtype).removeprefix("torch.")
            layer.unquantized = MADE if layer.made else why_unserved(key.shape[3], value.shape[3], dtype)
            if not layer.unquantized:
                layer.quantize(positions.shape[2])

    def _unlike(self, layer: BudgetLayer) -> bool:
        """Whether full layers have budgets of their own, as graphs ask it too: quantised ones as well."""
        return layer.is_full and len({own.budget for own in self.cache.budgeted if own.is_full}) > 1

    def _with_ahead(self, positions: Tensor) -> Tensor:
        """Positions [B, K, C] and the lookahead's columns, where these are to wait in the free slots."""
        if not self.ahead:
            return positions
        return SPEC.add_lookahead(positions, SPEC.ahead_index(self.packing.lengths, self.ahead))

    def _spread(self, layer: BudgetLayer, key: Tensor, value: Tensor, scores: Tensor | None) -> None:
        """Of a layer whose heads share budgets, among themselves or with those of all layers."""
        if layer.made:
            raise Unspread(UNSPREAD)
        method, lengths, budget, most = self.method, self.packing.lengths, layer.budget, layer.budget
        settings, worth = (method.window, method.kernel, method.pool, method.floor(budget)), None
        ranks = self.ranks
        if scores is None:
            positions = SPEC.keep_all(lengths, key.shape[1], budget)
        elif layer.sharers:
            most = method.candidates(budget)
            positions, worth = SPEC.select_candidates(scores, lengths, most, *settings, method.floor(budget))
        elif ranks is None:
            positions = SPEC.select_heads(scores, lengths, budget, *settings)
        else:
            most = method.most(budget, ranks.size)
            positions, worth = SPEC.select_candidates(scores, lengths, most, *settings, method.floor(budget))
            every, total = all_of_ranks(worth, ranks).flatten(0, 1), ranks.size * key.shape[1] * budget
            positions = SPEC.choose_heads(positions, every, total, ranks.rank)
        taken = self._with_ahead(positions)
        if layer.sharers:
            self.shared.add(layer, key, value, positions, taken, most, worth)
        else:
            store_ragged(layer, key, value, positions, taken, most, self.cache.room)

    def finish(self) -> None:
        """Behind the last layer: those whose heads share one storage choose."""
        assert isinstance(self.method.budget, int)
        self.shared.finish(self.method, self.method.budget, self.cache.room, self.ranks)

    def positions(self, layer: BudgetLayer, kv_heads: int, scores: Tensor | None) -> Tensor:
        """[B, K, C] of the tokens that the target reads, ascending; unused slots -1."""
        method, lengths, budget = self.method, self.packing.lengths, layer.budget
        if layer.span is not None and layer.span.sliding:
            return SPEC.select_recent(lengths, kv_heads, budget, 0)
        if layer.span is not None and layer.span.chunk:
            return SPEC.select_chunk(lengths, kv_heads, budget)
        if self.short:
            return SPEC.keep_all(lengths, kv_heads, self.cache.whole)
        if self.read is not None and not method.scored:
            return SPEC.keep_all(lengths, kv_heads, budget)
        if scores is None:
            return SPEC.select_recent(lengths, kv_heads, budget, method.sinks)
        if method.select is None:
            return SPEC.select(scores, lengths, budget, method.window, method.kernel, method.pool)
        positions = method.select(scores, lengths, budget=budget)
        shape = (*scores.shape[:2], budget)
        return check_result(positions, shape, torch.int64, f"{method.name}.select", "positions [B, K, C]")

    def score(self, query: Tensor, key: Tensor, value: Tensor, scale: float, lse: Tensor | None = None) -> Tensor:
        """[B, K, T] float32 of query rows [B, H, R, D], which stand at `rows`.

        Args: lse: [B, H, R] of these rows' logits, where they do not see all columns up to their own.
        """
        method, lengths = self.method, self.packing.lengths
        if method.reconstruction:
            assert self.rows is not None, "something is scored"
            length = 0 if lse is None else (self.rows.shape[1] - method.window) // method.futures
            operands = (query, key, value, self.rows, lengths, method.window, scale, method.reduce)
            return SPEC.reconstruction(*operands, length)
        if method.score is None:
            scores = self._importance(query, key, scale, method.reduce, lse)
            return SPEC.weigh_values(scores, value) if method.value_norms else scores
        scores = method.score(query, key, value, self.rows, lengths, scale=scale)
        return check_result(scores, tuple(key.shape[:3]), torch.float32, f"{method.name}.score", "scores [B, K, T]")

    def attention(self, query: Tensor, key: Tensor, scale: float, lse: Tensor | None = None) -> Tensor:
        """[B, K, T] float32: the mean of what these rows read of each column. Args: as `score`."""
        return self._importance(query, key, scale, "mean", lse)

    def _importance(self, query: Tensor, key: Tensor, scale: float, reduce: str, lse: Tensor | None) -> Tensor:
        lengths, window = self.packing.lengths, self.method.window
        return SPEC.importance(query, key, self.rows, lengths, window, scale, reduce, None, lse)

    @staticmethod
    def one_choice(scores: Tensor, kv_heads: int, reduce: str) -> Tensor:
        """[B, H, T] of heads that are made of the same columns -> [B, K, T] of what is cached, all alike."""
        one = scores.amax(1, True) if reduce == "max" else scores.mean(1, True)
        return one.repeat(1, kv_heads, 1)


def keep_whole(layer: BudgetLayer, key: Tensor, value: Tensor) -> None:
    """Store everything, in the model's own columns: the site is exact."""
    batch, kv_heads, size = key.shape[:3]
    layer.exact = True
    layer.key_buffer, layer.value_buffer = key.flatten(1, 2), value.flatten(1, 2)
    layer.lengths = torch.full((batch, kv_heads), size, dtype=torch.int64, device=key.device)
    layer.kept_positions = torch.arange(size, device=key.device).expand(batch, kv_heads, -1).contiguous()
    layer.is_initialized = True


def check_result(found: Any, shape: tuple[int, ...], dtype: torch.dtype, name: str, meaning: str) -> Tensor:
    """Raises: MethodHookError: a user's own hook returned something else."""
    if not isinstance(found, Tensor) or found.dtype != dtype or tuple(found.shape) != shape:
        got = f"{found.dtype} {tuple(found.shape)}" if isinstance(found, Tensor) else repr(found)
        raise MethodHookError(f"{name} returned {got}, expected {meaning}: {dtype} {shape}.")
    return found
