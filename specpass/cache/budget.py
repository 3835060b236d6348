"""BudgetCache: how much each layer keeps of a prompt, and how much room the answer gets."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import torch
from torch import Tensor

import specpass.ops  # noqa: F401  (binds the operators that update() traces to)
from specpass.cache.bits import check_bits
from specpass.cache.choose import Kept
from specpass.cache.conversation import CONVERSATIONS, check_place
from specpass.cache.drafting import DRAFTS
from specpass.cache.evict import Bound, evict
from specpass.cache.layer import first_room, grown_room, round_room
from specpass.cache.protocol import BudgetLayer, CacheProtocol, is_traced
from specpass.cache.replay import REPLAYS
from specpass.cache.states import make_layers, tell_sharers, why_unheld
from specpass.dialect.define import SPEC
from specpass.errors import (
    BudgetError,
    CacheStateError,
    FuturesError,
    GeneratedError,
    LookaheadError,
    UncompiledCacheError,
    UnsupportedCallError,
)
from specpass.methods.base import Method
from specpass.methods.speckv import as_id_rows
from specpass.observe.kept import kept_html


class BudgetCache(CacheProtocol):
    """KV cache of fixed budget; prompts are pruned into it by a graph compiled with specpass.

    Args:
        config: the target's config (its text config is used).
        method: the same method as the backend's.
        max_new_tokens: tokens to be generated; sets the room N (rounded up to a multiple of 64, at first 512 at most:
            then it grows with what is generated, by half of itself) and, for methods with `lookahead=None`, the
            lookahead L = min(32, max_new_tokens), 32 if left out. Generation beyond max_new_tokens grows the cache too.
        prompt_length: S in tokens, needed when the method's budget is a ratio; with budget="auto", a short prompt's
            candidates take less memory where it is known.
        lookahead_ids: [B, L] token ids in place of the draft's.
        generated: slots M of each KV head for tokens behind the prompt, 8 at least: where they are full, older tokens
            are evicted, a block at a time, and the cache grows no further. None: it grows.
        evict: which of these tokens stay beside the newest: "recent" ones; those that got the most "attention" of the
            newest, or of a draft's "lookahead" behind them, which stands in as many slots more while it is asked; those
            whose keys are least "redundant"; "rkv", which weighs both; "triattention": those that queries
            to come are expected to attend to; or "random" ones (see cache/worth.py).
        share_budget: an eviction chooses among the prompt's slots too: prompt and answer have C + M together.
        dropped: "host": keys and values of all tokens stay in host memory, beside the cache, and a later turn (several
            tokens behind a prompt) scores all of them anew, with its own question. None: what is dropped is gone.
        cache_bits: 8, 4 or 2: the prompt's slots are quantised in groups once they were gathered, with GEAR's low rank
            and outliers for 2 (see specpass/bits.py); what follows the prompt is not. None: the model's dtype.
        early_exit: False sends prompts that fit the budget through selection and gather too (layers whose budget is C
            keep everything); so does evict="lookahead", whose draft reads every prompt.

    Raises:
        BudgetError: a ratio without prompt_length. LookaheadError: lookahead_ids with a method that cannot use them.
        GeneratedError: M or `evict` is none, the lookahead that an answer follows does not fit in M, or the budget that
            is to be shared is spread or in fewer bits.
        DroppedError: another word for `dropped`.
        CacheBitsError: no such bits, or the method's budgets cannot be quantised.
        UnsupportedCallError: the model's layers hold no keys, or in another form.
    """

    def __init__(
        self,
        config: Any,
        method: Method,
        max_new_tokens: int | None = None,
        *,
        prompt_length: int | None = None,
        lookahead_ids: Any = None,
        early_exit: bool = True,
        generated: int | None = None,
        evict: str = "recent",
        share_budget: bool = False,
        dropped: str | None = None,
        cache_bits: int | None = None,
    ) -> None:
        if max_new_tokens is not None and max_new_tokens < 1:
            raise BudgetError(f"max_new_tokens={max_new_tokens}: expected at least 1.")
        config = config.get_text_config(decoder=True)
        self.config = config
        unheld = why_unheld(config)
        if unheld:
            raise UnsupportedCallError(f"{unheld}: leave past_key_values out, or pass transformers' own cache.")
        self.method = method.resolve(prompt_length)
        self.bound = Bound.of(generated, evict, share_budget)
        check_place(dropped)
        self.dropped = dropped
        self.bits = check_bits(cache_bits, self.method)
        if self.bound is not None:
            self.bound.check(self.method, self.bits)
        self.foresees = self.bound is not None and self.bound.foresees
        self.early_exit = early_exit = early_exit and not self.foresees
        self.max_new_tokens = max_new_tokens
        self.made_with = lookahead_ids
        self.look_ahead()
        self.compresses = method.prompt is not None
        self.rungs = self.method.rungs  # budgets of which each prompt gets one; (): they all get the same
        # A prompt of so many tokens is kept whole.
        self.whole: int = (*self.rungs, self.method.budget)[0]  # type: ignore[assignment]
        # A number, so that graphs of longer prompts do not depend on early_exit, nor those without it on the budget.
        self.longest_short = self.whole if early_exit else -1
        super().__init__(layers=make_layers(self, config))
        self.budgeted = [layer for layer in self.layers if isinstance(layer, BudgetLayer)]
        self.in_slots = False  # whether graphs are told the slots as the length (see asks_for_length)
        self.listener: Any = None  # who answers `update` while the model's own forward runs uncompiled
        # The compiled graph gets tensors only; this one leads the runtime back to its cache.
        self.handle = torch.zeros((), dtype=torch.int64)
        self.handle._specpass_cache = weakref.ref(self)
        self.pruned_by: Any = None  # the compiled graph that is running
        self._clear()

    def look_ahead(self, lookahead_ids: Any = None) -> None:
        """Take [B, L] token ids in the draft's place for the next prompt; None: those that the cache was made with.

        Raises: LookaheadError: the method cannot use them.
        """
        rows = next(
            (ids for ids in (lookahead_ids, self.made_with, self.method.lookahead_ids) if ids is not None), None
        )
        self.given_ids: Tensor | None = None
        self.given_scores: Tensor | None = None
        self.lookahead = self.method.look_ahead(self.max_new_tokens)
        if rows is not None:
            self._take_ids(rows)
        self.room = first_room(self.max_new_tokens or 1)
        if self.bound is not None:
            self._bound_room(self.bound)
        elif self.method.verify:  # the lookahead's keys and values wait in the free slots
            self.room = max(self.room, round_room(self.lookahead))
        self.free_at_prefill = self.room

    def _bound_room(self, bound: Bound) -> None:
        """All of M from the start where it can be filled: one size, one decode graph."""
        self.room = min(bound.room, round_room((self.max_new_tokens or bound.slots) + bound.ahead))
        if not self.method.verify:
            return
        if self.lookahead > bound.most:  # its keys and values wait in the free slots, which none evicts from
            raise GeneratedError(
                f"generated={bound.slots} and a lookahead of {self.lookahead} tokens, which answers follow by the "
                f"target's own logits: raise generated, lower lookahead below {bound.most + 1}, or pass verify=False."
            )
        self.room = max(self.room, min(bound.slots, round_room(self.lookahead)))

    def _take_ids(self, rows: Any) -> None:
        if self.method.prompt is not None or not self.method.drafts:
            why = "needs the draft's attention" if self.method.prompt is not None else "looks at the prompt alone"
            raise LookaheadError(
                f"lookahead_ids were given, but {self.method.name} {why}: leave them out, or use SpecKV."
            )
        if self.method.futures > 1:
            raise FuturesError(
                f"lookahead_ids were given, which are one future, and futures={self.method.futures}: leave one of them "
                "out."
            )
        self.take(torch.tensor(as_id_rows(rows)))

    def take(self, lookahead_ids: Tensor, scores: Tensor | None = None) -> None:
        """[B, L] token ids in the draft's place for the next prompt, and scores [B, S] of its packed tokens."""
        self.given_ids, self.given_scores = lookahead_ids, scores
        torch._dynamo.mark_static(self.given_ids)  # L is a constant of a graph, also where it happens to be S
        self.lookahead = self.given_ids.shape[1]

    def _scores(self) -> tuple[Tensor, ...]:
        return () if self.given_scores is None else (self.given_scores,)

    def _clear(self) -> None:
        REPLAYS.pop(self, None)
        DRAFTS.pop(self, None)
        CONVERSATIONS.pop(self, None)
        self.seen: Any = 0  # a 0-d tensor after the prefill; logical length: tokens that generate counts
        self.lookahead_ids: Tensor | None = None
        self.prompt_positions: Tensor | None = None
        self.shift: Tensor | None = None  # [B] what generate counts less what the target was told (SpecPC)
        self.behind = ""  # the key of the prefix that its prompt stands behind
        self.served = False  # whether a graph of ours has read its prompt
        self.padded = False
        self.kept: Kept | None = None  # what was chosen for it, where a share of the attention chose
        self.exact = False  # whether the prefill was refused and kept everything
        self.columns: int | None = None  # read by a target that runs uncompiled, padding included; None: by graphs
        self.read_mask: Tensor | None = None  # [B, S] of a padded prompt that was read uncompiled
        self.assisted = False  # whether generate has an assistant, whose candidates come several at a time
        self.asked = 1  # sequences of each prompt that generate is about to hand over, which come side by side
        self.awaited: int | None = None  # columns of the prompt that generate is about to hand over
        self.held: list[Tensor] = []  # those of its tokens that have come so far, where they come in chunks
        self.evictions = 0  # upper bound of those that were evicted, and what stands in slots no longer
        self.settled = 0  # so many were appended that crop may not go below, as older ones were evicted
        self.appended = 0  # upper bound of tokens written behind the prompt, kept on the host
        self.uneven = 0  # so many of these were written when some of them were last masked

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store a layer's new K/V [B, K, q, D]; only inside a graph compiled with specpass.

        Raises:
            UncompiledCacheError: called uncompiled, where nothing would prune.
        """
        if not is_traced():
            if self.listener is not None:
                return self.listener.update(key_states, value_states, layer_idx)
            raise UncompiledCacheError(
                "BudgetCache.update was called uncompiled. Compile the model first: specpass.compile(model, draft=..., "
                "method=...) or model.compile(backend=specpass.Backend(...), dynamic=True)."
            )
        first = not self.layers[layer_idx].is_initialized
        if first and self.layers[layer_idx] is self.budgeted[0]:
            if self.lookahead > 0 and not self.fits(key_states):
                if self.foresees:  # Dynamo sees it, and makes such prompts a graph of their own, with a draft's caches
                    assert self.bound is not None
                self.lookahead_ids = SPEC.lookahead(key_states, self.given_ids, self.lookahead)
            if self.compresses:
                self.prompt_positions, self.shift = SPEC.read_prompt(key_states, *self._scores())
        keys, values = self.layers[layer_idx].update(key_states, value_states)
        if self.layers[layer_idx] is self.budgeted[-1]:
            if first:
                self.seen = SPEC.size(key_states, 2)
            else:
                SPEC.advance(self.seen, self.shift, key_states.shape[2])
        return keys, values

    def fits(self, key_states: Tensor) -> bool:
        """Whether a prompt's keys [B, K, S, D] are kept whole, without draft or scores."""
        return bool(key_states.shape[2] <= self.longest_short)

    def reset(self) -> None:
        """Forget everything; the next prompt is pruned anew."""
        super().reset()
        tell_sharers(self, self.layers)
        self._clear()
        self.free_at_prefill = self.room

    def reserve(self, tokens: int) -> None:
        """Make room for `tokens` more tokens (see layer.grown_room); nothing happens if there is room.

        Where a draft is asked what goes, only a compiled call can evict: see backend/foresee.py.
        """
        if not self.filled or self.exact:
            return
        if self.lacks(tokens) and not self.foresees:
            self.evict(tokens)
        needed = self.appended - self.evictions + tokens
        if needed > self.free_at_prefill:
            room = grown_room(self.free_at_prefill, needed)
            if self.bound is not None:
                room = min(room, self.bound.room)
            if room > self.free_at_prefill:
                self._grow(room)

    def lacks(self, tokens: int) -> bool:
        """Whether `tokens` more tokens are more than a bounded answer has slots for."""
        return self.bound is not None and self.appended - self.evictions + tokens > self.bound.slots

    def look_on(self) -> int:
        """Make room for the tokens that a draft writes behind the answer: so many."""
        assert self.bound is not None
        if self.free_at_prefill < self.bound.room:
            self._grow(self.bound.room)
        return self.bound.ahead

    def look_back(self, tokens: int) -> None:
        """Let the last `tokens` written be none of the answer's; their queries stay, until `forget`."""
        for layer in self.budgeted:
            layer.lengths.sub_(tokens)
        self.seen.sub_(tokens)
        self.appended -= tokens

    def _grow(self, room: int) -> None:
        """Widen the layers' storage to `room` slots behind the prompt."""
        for layer in self.budgeted:
            if not layer.exact:
                layer.grow(room - self.free_at_prefill)
        self.free_at_prefill = room

    def tighten(self) -> None:
        """Cut the storage of heads that chose together with other processes' to what was kept of the prompt.

        All layers get what one of them needs most, so that steps know one number of slots.
        """
        wide = [layer for layer in self.budgeted if layer.ragged and layer.slots > layer.budget + layer.room]
        used = {layer: own for layer in wide if (own := layer.used) is not None}
        if not used:
            return
        kept = max(torch.stack(list(used.values())).tolist())  # the only look at the device
        for layer in used:
            layer.tighten(kept)

    def hear(self, like: Tensor) -> None:
        """Let layers have room for the newest queries of rows `like` [B, ...], where evictions ask by them."""
        for layer in self.budgeted:
            if not (layer.exact or self.exact):
                layer.hear(like)

    @property
    def host_bytes(self) -> int:
        """Bytes of keys and values that are held in host memory for later turns (`dropped="host"`)."""
        return CONVERSATIONS[self].nbytes if self in CONVERSATIONS else 0

    @property
    def free(self) -> int:
        """Slots of each KV head that a token surely finds free."""
        return self.free_at_prefill - (self.appended - self.evictions)

    def evict(self, tokens: int) -> None:
        """Make room for `tokens` more tokens of a bounded answer without growing.

        Raises: CacheStateError: there are not so many slots.
        """
        bound = self.bound
        assert bound is not None
        if tokens > bound.most:
            raise CacheStateError(
                f"{tokens} tokens are appended at once and generated={bound.slots} has room for {bound.most} beside "
                "the newest: append them in parts (generate() and calls of a model from specpass.compile do), or raise "
                "generated."
            )
        if self.free_at_prefill < bound.room:
            self._grow(bound.room)
        kept = bound.kept(tokens)
        for layer in self.budgeted:
            if not layer.exact:
                evict(layer, bound, kept, self.appended)
        self.evictions = max(self.evictions, self.appended - kept)
        self.settled = max(self.settled, self.appended - bound.window)
        REPLAYS.pop(self, None)  # what waits in slots is used up by now, or was left (see _bound_room)

    def _repr_html_(self) -> str:
        """For notebooks: what was kept of the prompt, as a picture."""
        return kept_html(self)

    def __deepcopy__(self, memo: dict) -> BudgetCache:
        twin = object.__new__(type(self))
        memo[id(self)] = twin
        for name, value in self.__dict__.items():
            if name not in ("handle", "listener"):
                setattr(twin, name, copy.deepcopy(value, memo))
        twin.listener = None
        twin.handle = torch.zeros((), dtype=torch.int64)
        twin.handle._specpass_cache = weakref.ref(twin)
        if self in REPLAYS:
            REPLAYS[twin] = REPLAYS[self].copy()
        if self in DRAFTS and self.foresees:
            DRAFTS[twin] = copy.deepcopy(DRAFTS[self], memo)
        if self in CONVERSATIONS:
            CONVERSATIONS[twin] = copy.deepcopy(CONVERSATIONS[self], memo)
        return twin
