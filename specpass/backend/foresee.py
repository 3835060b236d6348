"""What goes of a bounded answer is asked of tokens still to come, as the draft writes them: evict="lookahead".

Where the slots are full, the draft reads what it has not read of the answer and goes on. The target takes the tokens of
the call, and the draft's behind them, L in all, in a call of their own, against all that lies in slots; its queries
score these slots as SpecKV's lookahead scores a prompt's (cache/worth.py). Then these tokens are none of the answer's,
the block of the lowest scores goes, and the step is what it is without. Nothing is looked at on the device: what the
draft has surely read is counted.

The draft keeps its keys and values of the prompt, and of the answer's newest M tokens to 2 M.

Where no draft goes on, the newest tokens are asked, as evict="attention" does, and the report says so.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specpass.backend.compile import Backend
from specpass.backend.speculate import Proposals
from specpass.cache.budget import BudgetCache
from specpass.cache.drafting import DRAFTS, Drafting
from specpass.cache.prompt import tokens_of
from specpass.cache.replay import REPLAYS

ALONE = ("past_key_values", "use_cache", "return_dict")  # what the lookahead's call takes of its step's


@dataclasses.dataclass
class Foresight:
    """Evictions of one backend's target."""

    backend: Backend
    proposals: dict[int, Proposals] = dataclasses.field(default_factory=dict)  # by L - 1

    def make_room(self, cache: BudgetCache, kwargs: dict[str, Any], call: Callable[..., Any]) -> None:
        """Room for the tokens of a call, in a cache that lets a draft say what goes.

        Args: call: the target's compiled call, of any number of tokens.
        """
        tokens = tokens_of(kwargs)
        if cache.exact or not isinstance(tokens, Tensor):
            return
        count = tokens.shape[1]
        drafting = self._told(cache, kwargs, count)
        if not cache.lacks(count):
            return
        ahead = None if drafting is None else self._ahead(cache, drafting, kwargs["input_ids"])
        if ahead is None:
            self.backend.report.note("evict='lookahead': where no draft goes on, the newest queries say what stays")
            cache.evict(count)
            return
        REPLAYS.pop(cache, None)  # what waits in slots is used up by now, or was left (see BudgetCache.evict)
        size = cache.look_on()
        call(**alone(kwargs, ahead))
        cache.look_back(size)
        cache.evict(count)
        for layer in cache.budgeted:
            layer.forget(size)

    def _told(self, cache: BudgetCache, kwargs: dict[str, Any], count: int) -> Drafting | None:
        """The draft, told of a call's tokens; None where none can be, from now on."""
        drafting, ids, mask = DRAFTS.get(cache), kwargs.get("input_ids"), kwargs.get("attention_mask")
        if drafting is None:
            return None
        hidden = count > 1 and isinstance(mask, Tensor) and not bool(mask[:, -count:].all())
        if not isinstance(ids, Tensor) or hidden:
            del DRAFTS[cache]
            return None
        drafting.tell(ids, cache.appended)
        return drafting

    def _ahead(self, cache: BudgetCache, drafting: Drafting, ids: Tensor) -> Tensor | None:
        """[B, L] tokens behind those in the cache: the call's [B, q] and what the draft writes behind them.

        None where it is at its end.
        """
        assert cache.bound is not None
        size = cache.bound.ahead
        if ids.shape[1] >= size:
            return first(ids, size)
        proposals = self.proposals.setdefault(size - 1, Proposals(self.backend, size - 1, "evict='lookahead' ends"))
        if not proposals.reach(drafting):
            del DRAFTS[cache]
            return None
        written = proposals.write(cache, drafting, drafting.unread_surely())
        drafting.sure = drafting.told.shape[1] - 1
        drafting.let_go(cache.bound.slots)
        return first(torch.cat([ids, written], 1), size)


def alone(kwargs: dict[str, Any], ahead: Tensor) -> dict[str, Any]:
    """A step's call with tokens [B, L] in the place of its own, which they begin with, for their queries alone."""
    own = {name: kwargs[name] for name in ALONE if name in kwargs} | {"input_ids": ahead}
    if "logits_to_keep" in kwargs:
        own["logits_to_keep"] = 1
    positions = kwargs.get("position_ids")
    if isinstance(positions, Tensor):
        behind = torch.arange(1, ahead.shape[1] + 1, device=positions.device, dtype=positions.dtype)
        own["position_ids"] = first(torch.cat([positions, positions[:, -1:] + behind], 1), ahead.shape[1])
    return own


def first(columns: Tensor, count: int) -> Tensor:
    """[B, count] of columns [B, n]; no view: a graph would ask for its base."""
    return columns[:, :count].clone(memory_format=torch.contiguous_format)
