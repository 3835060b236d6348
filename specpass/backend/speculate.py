"""Speculative decoding with the draft that has looked ahead: it proposes k tokens, the pruned target verifies them.

A step of one token t becomes one of k + 1: the draft reads what it has not read yet and writes k tokens, the target
takes t and these behind its slots in one call, and what it says of them is known for the steps to come
(cache/replay.py). So whoever chooses tokens gets the pruned target's own logits for each: greedy answers are its own,
and samples are drawn from its distribution. Source: arXiv 2211.17192, with a draft that proposes greedily.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specpass.backend.compile import Backend
from specpass.cache.budget import BudgetCache
from specpass.cache.drafting import DRAFTS, Drafting
from specpass.cache.replay import REPLAYS, Replay
from specpass.lowering.lower import lower_draft
from specpass.parallel.agree import first_ranks
from specpass.passes.draft import DraftGraphs
from specpass.passes.pipeline import fingerprint
from specpass.passes.propose import proposal_graph
from specpass.sizes import context_length


def lower_proposals(
    backend: Backend, graphs: DraftGraphs, count: int, inputs: tuple[Tensor, ...], *, lookahead: bool = False
) -> Callable[..., Any]:
    """The draft's next `count` tokens as one compiled call.

    Args:
        inputs: of the first call.
        lookahead: see proposal_graph.
    """
    return lower_draft(
        proposal_graph(graphs, count, lookahead=lookahead),
        backend.lowering,
        inputs,
        cudagraphs=backend.cudagraphs,
        fingerprint=fingerprint(backend.skip_passes),
        skip=backend.skip_passes,
        note=backend.report.note,
    )


@dataclasses.dataclass
class Proposals:
    """What one backend's draft writes greedily behind an answer, `count` = k tokens at a time.

    Args: what: that ends where the draft's context does, for the report.
    """

    backend: Backend
    count: int
    what: str
    run: Callable[..., Any] | None = None  # compiled at the first

    def reach(self, drafting: Drafting) -> bool:
        """Whether the draft has positions for what it would write."""
        assert self.backend.draft is not None
        context = context_length(self.backend.draft.config)
        reaches = context is None or drafting.columns + drafting.told.shape[1] + self.count <= context
        if not reaches:
            self.backend.report.note(f"{self.what} where the draft's context of {context:,} tokens does")
        return reaches

    def write(self, cache: BudgetCache, drafting: Drafting, unread: int) -> Tensor:
        """[B, k] tokens behind those that were told, of which the draft has not read the last `unread`."""
        positions = drafting.stand(unread, self.count)
        graphs = self.backend.draft_graphs(cache, goes_on=True)
        inputs = (drafting.told[:, -unread:].contiguous(), positions, *drafting.caches, *graphs.params.values())
        if self.run is None:
            self.run = lower_proposals(self.backend, graphs, self.count, inputs)
        return first_ranks(self.run(*inputs), self.backend.ranks)


@dataclasses.dataclass
class Speculator:
    """Steps of one backend's target, `count` = k proposed tokens at a time."""

    backend: Backend
    count: int

    def __post_init__(self) -> None:
        self.proposals = Proposals(self.backend, self.count, "speculation ends")

    def step(self, cache: BudgetCache, kwargs: dict[str, Any], call: Callable[..., Any]) -> Any | None:
        """What the model returns for the next token, or None where that is known already, or the draft is at its end.

        Args: call: the target's compiled call, of any number of tokens.
        """
        drafting, ids = DRAFTS.get(cache), kwargs.get("input_ids")
        if drafting is None or cache.assisted or not isinstance(ids, Tensor) or not self.goes_on(kwargs):
            DRAFTS.pop(cache, None)
            return None
        drafting.tell(ids, cache.appended)
        if ids.shape[1] > 1 or self.follows(cache, ids):
            return None
        REPLAYS.pop(cache, None)
        if not self.proposals.reach(drafting):
            del DRAFTS[cache]
            return None
        proposed = self.propose(cache, drafting)
        self.backend.report.proposed += proposed.numel()
        out = call(**self.longer(kwargs, proposed))
        for layer in cache.budgeted:  # in the slots all the same, for steps that follow
            layer.lengths.sub_(self.count)
        cache.seen.sub_(self.count)
        cache.appended -= self.count
        REPLAYS[cache] = Replay(out.logits[:, 1:], start=cache.appended, proposed=True, ids=proposed.tolist())
        out.logits = out.logits[:, :1]
        return out

    @staticmethod
    def goes_on(kwargs: dict[str, Any]) -> bool:
        """Whether a call asks for logits alone: of more a step to come would know nothing."""
        return not kwargs.get("output_hidden_states") and kwargs.get("return_dict") is not False

    @staticmethod
    def follows(cache: BudgetCache, ids: Tensor) -> bool:
        """Whether the step is known: of some row by the prompt's prefill, or of all rows."""
        replay = REPLAYS.get(cache)
        if replay is None or not replay.fits(cache, ids):
            return False
        rows = replay.matching(ids)
        return all(rows) if replay.proposed else any(rows)

    def propose(self, cache: BudgetCache, drafting: Drafting) -> Tensor:
        """[B, k] tokens behind those that were told."""
        assert cache.lookahead_ids is not None
        proposed = self.proposals.write(cache, drafting, drafting.unread(cache.lookahead_ids))
        drafting.read = torch.cat([drafting.told[:, 1:], proposed[:, :-1]], 1)
        return proposed

    def longer(self, kwargs: dict[str, Any], proposed: Tensor) -> dict[str, Any]:
        """The call with the proposed tokens behind its own."""
        longer = {**kwargs, "input_ids": torch.cat([kwargs["input_ids"], proposed], 1)}
        if "logits_to_keep" in kwargs:
            longer["logits_to_keep"] = 0
        mask, positions = kwargs.get("attention_mask"), kwargs.get("position_ids")
        if isinstance(mask, Tensor):
            longer["attention_mask"] = torch.cat([mask, mask.new_ones(proposed.shape)], 1)
        if isinstance(positions, Tensor):
            offsets = torch.arange(1 + self.count, device=positions.device, dtype=positions.dtype)
            longer["position_ids"] = positions + offsets
        return longer
