"""A question behind what was read before: its rows alone run, and each layer is pruned as a prompt's is.

The target reads the last R tokens of each row, question and lookahead, against the document's keys and values:

    columns of row b     [ padding | document, in front of its last R tokens | R - L tokens | L lookahead tokens ]

Rows of a batch end in the same column, so padding stands in front, where masks and windows expect it. R is what the
longest question has, and a method's window at least: whose question is shorter reads the document's last tokens again,
whose queries score too. The lookahead goes through in the same call, as it does in a graph. Several futures stand side
by side there, L M tokens in all (see branches.py).
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from specpass.cache.budget import BudgetCache
from specpass.cache.prefix import Pair
from specpass.dialect.define import SPEC
from specpass.errors import PrefixDtypeError, SpecpassError
from specpass.interpret.branches import Branches
from specpass.interpret.keep import Keeper
from specpass.interpret.prompt import ReadPrompt
from specpass.interpret.rows import Packing
from specpass.interpret.run import Call
from specpass.interpret.watch import Attention
from specpass.methods.base import Method
from specpass.observe.layers import reading_by_layers
from specpass.parallel.shards import Ranks
from specpass.reports.record import PromptRecord
from specpass.sizes import FULL


@dataclasses.dataclass(frozen=True)
class Rows:
    """Questions behind a document, packed.

    Args:
        ids: [B, S] document and question, row b's tokens first.
        lengths: [B].
        own: columns of the longest question, padding included.
    """

    ids: Tensor
    lengths: Tensor
    own: int

    @classmethod
    def of(cls, document: Tensor, questions: Tensor, mask: Tensor | None) -> Rows:
        """Of document [P], questions [B, Q] and their mask [B, Q] or None."""
        before = document.to(questions.device).expand(questions.shape[0], -1)
        whole = None if mask is None else torch.cat([mask.new_ones(before.shape), mask], 1)
        return cls.packed(torch.cat([before, questions], 1), whole, questions.shape[1])

    @classmethod
    def packed(cls, ids: Tensor, mask: Tensor | None, own: int) -> Rows:
        """Of ids [B, S] and their mask [B, S] or None, the last `own` columns of which are a call's."""
        packing = Packing.of(ids, mask)
        return cls(packing.ids(ids)[:, : int(packing.lengths.max())], packing.lengths, own)

    def on(self, device: torch.device) -> Rows:
        """The same on another device."""
        return dataclasses.replace(self, ids=self.ids.to(device), lengths=self.lengths.to(device))

    @property
    def size(self) -> int:
        """S, of the longest row."""
        return self.ids.shape[1]

    @property
    def padding(self) -> Tensor:
        """[B] columns in front of each row, where rows end together."""
        return self.size - self.lengths

    @functools.cached_property
    def even(self) -> bool:
        """Whether all rows are of one length."""
        return not bool(self.padding.any())

    def positions(self, count: int) -> Tensor:
        """[B, count] of the last `count` tokens of each row."""
        return self.lengths[:, None] - count + torch.arange(count, device=self.lengths.device)

    def last(self, count: int) -> Tensor:
        """[B, count] of each row's last tokens; of shorter rows the first one stands in front."""
        return self.ids.gather(1, self.positions(count).clamp(min=0))

    def mask(self, ahead: int = 0) -> Tensor:
        """[B, S + L] with ones where rows, which end together, have tokens."""
        column = torch.arange(self.size + ahead, device=self.lengths.device)
        return (column >= self.padding[:, None]).to(torch.int64)

    def packing(self, ahead: int) -> Packing:
        """Of the columns [B, S + L]: each row's tokens first, and its lookahead right behind them."""
        if self.even:
            return Packing(self.lengths)
        mask = self.mask(ahead)
        return Packing(self.lengths, mask != 0, SPEC.pack_order(mask, mask)[0])


@dataclasses.dataclass(frozen=True)
class Front:
    """What stands in front of the tokens that a call reads.

    Args:
        layers: by layer keys [1 or B, K, P, D] and values, each row's tokens first; a layer that is not there has none.
        hold: is handed each layer's keys [B, K, S, D] and values, with those of the call, packed.
        mismatch: the error of a call that makes keys of another dtype.
    """

    layers: Mapping[int, Pair]
    hold: Callable[[int, Tensor, Tensor], None] | None = None
    mismatch: type[SpecpassError] = PrefixDtypeError


class ReadQuestion(ReadPrompt):
    """Layers whose keys and values are those in front and those of the call's R rows, the last of them ahead."""

    def __init__(self, cache: BudgetCache, keeper: Keeper, front: Front, rows: Rows, branches: Branches) -> None:
        """Args: branches: tokens that the call reads of each row, and those behind them."""
        super().__init__(cache, keeper, False)
        self.front, self.rows, self.branches, self.count = front, rows, branches, branches.count
        self.length = branches.length * branches.futures
        self.before = rows.size - self.count  # columns in front of the call's

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """Raises: front.mismatch: autocast makes other numbers of this call than of what stands in front."""
        document, hold = self.front.layers.get(layer), self.front.hold
        if document is not None:
            if key.dtype != document[0].dtype:
                held, made = (str(dtype).removeprefix("torch.") for dtype in (document[0].dtype, key.dtype))
                raise self.front.mismatch(
                    f"{held} keys are held of what was read before, and this call makes {made}: read all of it under "
                    "the same autocast."
                )
            key = torch.cat([self._document(document[0], key.device), key], 2)
            value = torch.cat([self._document(document[1], value.device), value], 2)
        if hold is not None:
            packing, size = self.keeper.packing, self.rows.size
            hold(layer, packing.states(key)[:, :, :size], packing.states(value)[:, :, :size])
        return super().update(key, value, layer)

    def _document(self, states: Tensor, device: torch.device) -> Tensor:
        """[1 or B, K, P, D] -> [B, K, T, D] on a layer's device: what stands in front of the call's columns."""
        states, batch = states.to(device, non_blocking=True), len(self.rows.lengths)
        if self.rows.even:
            return states[:, :, : self.before].expand(batch, -1, -1, -1)
        padding = self.rows.size - self.keeper.packing.on(device).lengths
        column = (torch.arange(self.before, device=device) - padding[:, None]).clamp(min=0)
        index = column[:, None, :, None].expand(-1, states.shape[1], -1, states.shape[3])
        return states.expand(batch, -1, -1, -1).gather(2, index)

    def keep_whole(self, layer: int, key: Tensor, value: Tensor, reason: str) -> None:
        """Without the lookahead's columns."""
        super().keep_whole(layer, key[:, :, : self.rows.size], value[:, :, : self.rows.size], reason)

    def attend(self, layer: int, call: Attention, made: bool) -> Tensor:
        if self.branches.futures > 1:
            call = self.branches.attend(call, self.cache.layers[layer].span or FULL)
        return super().attend(layer, call, made)

    def _rows(self, key: Tensor) -> int:
        return self.count + self.length

    def _scored(self, device: torch.device) -> Tensor:
        """[B, R] of the call's rows: the window and the lookahead."""
        keeper = self.keeper.on(device)
        assert keeper.rows is not None, "something is scored"
        return keeper.rows - keeper.packing.lengths[:, None] + self.count

    def _window(self, query: Tensor) -> Tensor:
        return SPEC.take_rows(query, self._scored(query.device))

    def _sums(self, call: Attention, query: Tensor) -> Tensor | None:
        return None if self.branches.futures == 1 else self.branches.sums(call, query, self._scored(query.device))


@dataclasses.dataclass
class Question(Call):
    """One call behind what was read before; see Call for the other arguments."""

    front: Front = dataclasses.field(kw_only=True)
    rows: Rows = dataclasses.field(kw_only=True)
    ranks: Ranks | None = dataclasses.field(default=None, kw_only=True)

    def read(
        self, count: int, ahead: Tensor | None, short: bool, verify: bool, how: Method | None = None
    ) -> tuple[Any, Tensor, PromptRecord, dict[int, str]]:
        """The last `count` tokens of each row, and the lookahead [B, M L] of all futures behind them.

        Args: verify: the first future's keys and values are to wait in the free slots. how: see Keeper.
        Returns: the model's output for the question; logits [B, L, V] behind each token of the first future; what was
            done; and why, of layers that are kept whole.
        """
        cache, rows, length = self.cache, self.rows, 0 if ahead is None else ahead.shape[1]
        packing, method = rows.packing(length), how or cache.method
        futures = 1 if ahead is None else method.futures
        first = length // futures
        scored = None
        if method.scored and not short:
            scored = SPEC.score_rows(rows.lengths, ahead, method.window, list(self.eos_ids), futures)
        keeper = Keeper(cache, packing, short, scored, ahead=first if verify else 0, how=how, ranks=self.ranks)
        branches = Branches(packing, count, first, futures)
        reading = ReadQuestion(cache, keeper, self.front, rows, branches)
        ids = rows.last(count)
        kwargs = {
            "output_hidden_states": self.kwargs.get("output_hidden_states"),
            "input_ids": ids if ahead is None else torch.cat([ids, ahead], 1),
            "position_ids": branches.positions(rows.positions(count)[:, :1]).clamp(min=0),
            "past_key_values": cache,
            "use_cache": True,
        }
        if packing.real is not None:
            kwargs["attention_mask"] = rows.mask(length)
        wanted = min(self.kwargs.get("logits_to_keep") or rows.own, rows.own)
        if "logits_to_keep" in inspect.signature(self.target.forward).parameters:
            kwargs["logits_to_keep"] = wanted + length
        cache.columns, cache.read_mask = reading.before, None
        with reading_by_layers(self.target, "reading the question"):
            out = self._forward(reading, kwargs)
        keeper.finish()
        cache.columns = rows.size
        cache.read_mask = None if packing.real is None else rows.mask()
        logits = out.logits[:, out.logits.shape[1] - length :][:, :first]
        out.logits = part(out.logits, wanted, length)
        if out.get("hidden_states") is not None:
            out.hidden_states = tuple(part(states, rows.own, length) for states in out.hidden_states)
        return out, logits, self._record(reading, short, None), reading.exact


def part(states: Tensor, wanted: int, ahead: int) -> Tensor:
    """The last `wanted` rows of states [B, T, E] in front of `ahead` others."""
    end = states.shape[1] - ahead
    return states[:, max(0, end - wanted) : end]
