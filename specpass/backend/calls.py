"""What runs around a compiled graph on each call: checks before it, bookkeeping of the cache after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from specpass.cache.budget import BudgetCache
from specpass.cache.choose import Candidates, Kept, choose, shrink
from specpass.cache.drafting import start_draft
from specpass.cache.prompt import check_gradients, check_ids, check_prompt
from specpass.cache.replay import REPLAYS, Replay, follow, hold, put_back
from specpass.cache.widest import tell_widest
from specpass.cache.worth import Readers
from specpass.errors import CacheStateError, DroppedError, PositionsError
from specpass.observe import progress
from specpass.parallel.agree import mean_of_ranks
from specpass.parallel.shards import Ranks
from specpass.rewrite.base import PROMPTS
from specpass.rewrite.sites import Rotation
from specpass.sizes import Span

STATIC_SIZES = 8
# Left on what a compiled layer returns (by 2.12 and older, with which the GPU checks ran, and by 2.13): which of its
# sizes were symbols. Dynamo would make each a symbol of its own, two a layer in a step's graph, where all are one
# number: that takes a minute for 30 layers.
DYNAMIC_MARKS = ("_dynamo_weak_dynamic_indices", "_dynamo_propagated_dynamic_indices")


@dataclasses.dataclass
class Call:
    """One compiled graph with what is needed to call it.

    Attributes:
        run: takes Dynamo's inputs and the lifted draft tensors.
        kind: prefill, short, decode or append; exact graphs (refused ones) are named the same.
        places: index of the inputs handle, input_ids, attention_mask, position_ids among Dynamo's inputs.
        static: output index -> the axis of the cache's storage whose size is a constant of decode graphs.
        alike: whether all layers have the same number of slots, which then can be a constant as well.
        sizes: the numbers of slots that are, of all graphs of a backend.
        context: positions that the draft can read, or None.
        vocab: tokens that the draft knows where the target knows more, or None.
        ahead: EOS ids, where the last result of `run` are the logits behind the lookahead; else None.
        replays: whether logits are the only result, so that known ones can stand for a step.
        came_free: told how many tokens a step did not compute, and whether a speculator had proposed them.
        work: of a call's compiled layers, for who watches a prompt.
        ranks: whose heads choose a budget together.
        candidates: of each layer whose budget is chosen behind the prompt, its outputs by name (see cache/choose.py).
        chose: told what was chosen.
        drafts: how many results behind the model's own are the draft's caches, from which it goes on.
    """

    run: Callable[..., Any]
    kind: str
    places: dict[str, int]
    lifted: tuple[Tensor, ...] = ()
    static: dict[int, int | tuple[int, ...]] = dataclasses.field(default_factory=dict)
    alike: bool = True
    sizes: set[int] = dataclasses.field(default_factory=set)
    context: int | None = None
    vocab: int | None = None
    lookahead: int = 0
    packed: bool = False
    spans: Mapping[int, Span] = dataclasses.field(default_factory=dict)  # of a prompt's graph, by the cache's layer
    biased: frozenset[int] = frozenset()  # those of its layers whose attention adds a bias of the keys
    unquantized: Mapping[int, str] = dataclasses.field(default_factory=dict)  # why, of those whose prompt is not
    readers: Mapping[int, Readers] = dataclasses.field(default_factory=dict)  # of a prompt's graph, by the layer
    rotations: Mapping[int, Rotation | str] = dataclasses.field(default_factory=dict)  # where evictions ask, or why not
    counts: bool = True  # whether a step takes its positions from the cache's length, where no position_ids are given
    ahead: tuple[int, ...] | None = None
    replays: bool = False
    came_free: Callable[[int, bool], None] = lambda tokens, proposed: None
    candidates: Sequence[Mapping[str, int]] = ()
    chose: Callable[[Kept], None] = lambda kept: None
    drafts: int = 0
    work: int = 0
    ranks: Ranks | None = None
    refusal: str = ""  # why this graph runs exactly; "" where it was rewritten

    def __call__(self, *args: Any) -> Any:
        cache = owner_of(args[self.places["handle"]])
        self.check(cache, args)
        cache.pruned_by, cache.served = self, True
        try:
            out = self._run(cache, args)
        finally:
            cache.pruned_by = None
        if self.candidates:
            out = list(out)
            self._choose(cache, out)
        self._mark_sizes(out)
        if self.kind in ("prefill", "short"):
            cache.padded, cache.exact = self.packed, bool(self.refusal)
            for layer in cache.budgeted if cache.exact else ():
                layer.starts = None  # what is kept whole is as long in every head
                layer.unquantized = "the model runs exactly"
            for index, reason in self.unquantized.items():
                cache.layers[index].unquantized = reason
            for index, span in self.spans.items():
                cache.layers[index].found, cache.layers[index].biased = span, index in self.biased
            for index, readers in self.readers.items():
                cache.layers[index].readers = readers
            cache.hear(args[self.places["input_ids" if "input_ids" in self.places else "inputs_embeds"]])
            tell_widest(cache.budgeted)
        else:
            for index, rotation in self.rotations.items():
                if isinstance(rotation, Rotation):
                    cache.layers[index].turn(rotation)
            cache.appended += self._query_length(args)
            if "attention_mask" in self.places and not cache.exact and self._hides_tokens(cache, args):
                cache.padded, cache.uneven = True, cache.appended
            cache.reserve(1)  # so that the next token finds its slot; a full cache grows by a block
        return out

    def _run(self, cache: BudgetCache, args: tuple[Any, ...]) -> Any:
        """The graph's results; those of a step that follows the lookahead are known already."""
        if self.kind in PROMPTS:
            with progress.task(progress.READING, self.work or None):
                out = self.run(*args, *self.lifted)
            if self.ahead is not None:
                *out, logits = out
                REPLAYS[cache] = Replay(logits, self.ahead)
            if self.drafts:
                own, caches = out[: -self.drafts], out[-self.drafts :]
                start_draft(cache, caches, args[self.places["input_ids"]], self.lookahead)
                return own
            return out
        replay = REPLAYS.pop(cache, None)
        tokens = args[self.places["input_ids"]] if "input_ids" in self.places else None
        if replay is None or tokens is None or not replay.fits(cache, tokens):
            return self.run(*args, *self.lifted)
        rows = replay.take(tokens) if self.kind == "decode" and self.replays else []
        if not rows:  # what leaves the lookahead may be taken back (assisted decoding)
            replay.held = hold(cache, range(len(tokens)), tokens.shape[1])
            REPLAYS[cache] = replay
            return self.run(*args, *self.lifted)
        if not replay.over:
            REPLAYS[cache] = replay
        self.came_free(replay.free(), replay.proposed)
        if len(rows) == len(tokens):
            follow(cache)
            return [replay.known(rows)]
        held = hold(cache, rows)
        out = self.run(*args, *self.lifted)
        put_back(cache, held)
        out[0][rows] = replay.known(rows)
        return out

    def _choose(self, cache: BudgetCache, out: list[Any]) -> None:
        """Move each layer's candidates among the results into the budget that the prompt gets, one after the other."""
        share = cache.method.share
        assert share is not None, "a share of the attention chooses"
        every = mean_of_ranks([out[each["shares"]] for each in self.candidates], self.ranks)
        for each, shares in zip(self.candidates, every, strict=True):
            out[each["shares"]] = shares
        index, cache.kept = choose(every, cache.rungs, share)
        self.chose(cache.kept)
        for each in self.candidates:
            chosen = shrink(Candidates(**{name: out[at] for name, at in each.items()}), index, cache.rungs[index])
            for name, at in each.items():
                out[at] = getattr(chosen, name)

    def _mark_sizes(self, out: Any) -> None:
        """On CUDA constants make better kernels, and a decode graph each: from the ninth size on one serves the rest.

        On a CPU a step is as fast without (30 layers, 1,088 slots: 90 ms with symbols, 92 with constants), so one graph
        serves every size.
        """
        for index, axis in self.static.items():  # of K and D: as symbols they could be taken for a batch of that size
            torch._dynamo.mark_static(out[index], axis)
            for mark in DYNAMIC_MARKS:
                out[index].__dict__.pop(mark, None)
        mark_slots([out[index] for index in self.static if self.alike and out[index].dim() == 3], self.sizes)

    def _hides_tokens(self, cache: BudgetCache, args: tuple[Any, ...]) -> bool:
        """Whether a step's mask hides some of its tokens: what a bias is made of may hide none (see prepare_bias)."""
        mask, count = args[self.places["attention_mask"]], self._query_length(args)
        if not cache.biased or mask.shape[1] == count:
            return True
        return count > 1 and not bool(mask[:, -count:].all())

    def _query_length(self, args: tuple[Any, ...]) -> int:
        place = self.places.get("input_ids", self.places.get("inputs_embeds"))
        return 1 if place is None else args[place].shape[1]

    def check(self, cache: BudgetCache, args: tuple[Any, ...]) -> None:
        check_gradients(args)
        if self.kind in ("prefill", "short"):
            if cache.dropped is not None:  # our own door reads such prompts by the model's forward
                raise DroppedError(
                    f"dropped={cache.dropped!r} through the plain door, whose graphs keep no more than the budget: use "
                    "specpass.compile(model, ...), or leave dropped out."
                )
            if not self.refusal:
                self._check_prompt(cache, args)
            return
        if self.refusal and not cache.exact:
            raise CacheStateError(
                f"the prompt was pruned, and the graph that goes on from it cannot be rewritten ({self.refusal}): the "
                "answer would be wrong. Call specpass.restore(model), or a model whose decode step is one graph."
            )
        if cache.padded and self.counts and "position_ids" not in self.places:
            raise PositionsError(
                "a padded batch is decoded without position_ids, so each row's next position is unknown: pass "
                "position_ids [B, 1] (generate() does)."
            )
        if cache.bound is not None and cache.bound.turns and not cache.exact:  # another policy's graph may serve it
            cache.bound.check_turns(cache.config.model_type, {f"layer {i}": own for i, own in self.rotations.items()})
        needed, free = self._query_length(args), cache.free
        if needed > free:
            raise CacheStateError(
                f"{needed} tokens are appended and the cache has {free} free slots: call cache.reserve({needed}) first."
            )

    def _check_prompt(self, cache: BudgetCache, args: tuple[Any, ...]) -> None:
        prompt = "input_ids" if "input_ids" in self.places else "inputs_embeds"
        batch, size = args[self.places[prompt]].shape[:2]
        mask = args[self.places["attention_mask"]] if "attention_mask" in self.places else None
        lookahead = 0 if self.kind == "short" else self.lookahead
        check_prompt(cache, (batch, size), mask, lookahead, self.context)
        if lookahead and prompt == "input_ids":
            check_ids(args[self.places[prompt]], self.vocab)


def mark_slots(storages: list[Tensor], sizes: set[int]) -> None:
    """Slots of storages [B, K * P, D] on a GPU become constants of decode's graphs, unless there are many `sizes`."""
    storages = [storage for storage in storages if storage.is_cuda]
    slots = {storage.shape[1] for storage in storages}
    if slots <= sizes or len(sizes) < STATIC_SIZES:
        sizes |= slots
        for storage in storages:
            torch._dynamo.mark_static(storage, 1)


def owner_of(handle: Tensor) -> BudgetCache:
    """The cache that a graph input `handle` belongs to."""
    cache = handle._specpass_cache()
    if cache is None:
        raise CacheStateError("the BudgetCache of this call no longer exists")
    return cache
