"""Tokens behind keys and values that are held: of a document that was read once, or of a conversation's earlier turns.

The draft goes on from its own, the target's own forward reads the new tokens and the lookahead against all of it, and
each layer is pruned into an empty cache as a prompt's is (interpret/question.py). Steps then go by graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from specpass.backend.calls import mark_slots
from specpass.backend.compile import Backend
from specpass.backend.facts import quantized_axes
from specpass.backend.speculate import lower_proposals
from specpass.backend.uncompiled import Uncompiled, attention_of, why_uncompiled
from specpass.cache.budget import BudgetCache
from specpass.cache.choose import choose_budget
from specpass.cache.drafting import start_draft
from specpass.cache.prefix import Pair
from specpass.cache.prompt import check_ids, check_prompt
from specpass.cache.replay import REPLAYS, Replay
from specpass.cache.states import recurrent_layer, why_unheld
from specpass.cache.widest import tell_widest
from specpass.capture.devices import device_of
from specpass.capture.rope import following
from specpass.dialect.define import SPEC
from specpass.interpret.question import Front, Question, Rows
from specpass.methods.base import Method
from specpass.observe import progress
from specpass.parallel.agree import first_ranks
from specpass.parallel.shards import choosing
from specpass.passes.draft import DraftGraphs
from specpass.rewrite import Refusal
from specpass.sizes import context_length

LEAST = 2  # tokens that the draft's graph reads at a time: reading one again changes nothing


def why_nothing_is_held(target: nn.Module, method: Method, by_text: bool) -> str:
    """What of the target, the method or the draft cannot go on from keys and values that are held; "" where all can.

    Args: by_text: whether the draft has another tokenizer.
    """
    config: Any = target.config
    state, follows, sparse = recurrent_layer(config), following(target), method.sparse_prefill
    reasons = (
        (method.prompt is not None, f"{method.name} chooses the tokens that the target reads by each question"),
        (by_text, "the draft has another tokenizer, and the tokens that are held are the target's"),
        (sparse > 0, f"sparse_prefill={sparse} reads a prompt sparsely, and its keys and values would be others"),
        (bool(why_unheld(config)), why_unheld(config)),
        (bool(state), f"{state}, whose state cannot be taken back to where a question's rows begin"),
        (bool(follows), f"its rotary frequencies follow the length (rope_type {'/'.join(follows)})"),
        (attention_of(target).startswith("flex"), f"its attention is {attention_of(target)}"),
    )
    found = next((reason for found, reason in reasons if found), "")
    return found or without_graphs(method, why_uncompiled(target))


def without_graphs(method: Method, reason: str) -> str:
    """What of a method is had only where steps go by graphs; "" where all can be. Args: reason: why they do not."""
    asked = (
        (method.spread != "uniform", f"spread={method.spread!r}"),
        (method.futures > 1, f"futures={method.futures}"),
        (method.share is not None, f"share={method.share}"),
    )
    name = next((name for found, name in asked if found), "")
    return f"{name} needs steps by graphs, and the model's own forward goes on ({reason})" if name and reason else ""


def graphs_that_go_on(backend: Backend, cache: BudgetCache) -> DraftGraphs:
    """Raises: Refusal: the draft cannot go on from what it has read."""
    assert backend.draft is not None
    follows = following(backend.draft)
    if follows:
        raise Refusal(f"its rotary frequencies follow the length (rope_type {'/'.join(follows)})")
    return backend.draft_graphs(cache, goes_on=True)


def pairs_of(graphs: DraftGraphs, caches: Sequence[Tensor], tokens: slice) -> list[Pair]:
    """Keys [B, K, n, D] and values of some tokens, by layer, of the draft's caches (see DraftGraphs)."""
    found: list[Pair] = []
    for index in range(0, 3 * graphs.layers, 3):
        heads = caches[index + 2].shape[1]
        key, value = (states.unflatten(1, (heads, -1))[:, :, tokens] for states in caches[index : index + 2])
        found.append((key, value))
    return found


@dataclasses.dataclass
class Behind:
    """Calls of one compiled target behind what it has read."""

    target: nn.Module
    backend: Backend
    uncompiled: Uncompiled
    runs: dict[int, tuple[DraftGraphs, Callable[..., Any]]] = dataclasses.field(default_factory=dict)  # by L

    @staticmethod
    def fits(cache: BudgetCache, rows: Rows) -> bool:
        """Whether all of it is kept, without draft or scores."""
        return cache.early_exit and rows.size <= cache.whole

    def check(self, cache: BudgetCache, rows: Rows) -> bool:
        """Whether the draft is to look ahead.

        Raises: SpecpassError: see check_prompt and check_ids.
        """
        backend, method, short = self.backend, cache.method, self.fits(cache, rows)
        drafts = not short and cache.lookahead > 0 and cache.given_ids is None and method.needs_draft
        context = context_length(backend.draft.config) if drafts and backend.draft is not None else None
        check_prompt(cache, (len(rows.ids), rows.size), None, 0 if short else cache.lookahead, context)
        if drafts:
            assert backend.draft is not None, "checked when the model was compiled"
            check_ids(rows.ids, backend.smaller_vocabulary(cache))
        return drafts

    def ahead(self, cache: BudgetCache, rows: Rows, write: Callable[[], Tensor] | None) -> Tensor | None:
        """[B, M L] of M futures: the caller's tokens, those that the draft is to `write`, or the prompt's own.

        None where there are none, or where the target is to write them itself (see itself.py).
        """
        if self.fits(cache, rows) or not cache.lookahead:
            return None
        if cache.given_ids is not None:
            return cache.given_ids.to(rows.ids.device, copy=True)
        if cache.method.writes_itself:
            return None
        if write is None:
            return SPEC.prompt_lookup(rows.ids, rows.lengths, cache.lookahead)
        return first_ranks(write().to(rows.ids.device), self.backend.ranks)

    def for_draft(self, rows: Rows) -> Rows:
        """Where the draft computes."""
        assert self.backend.draft is not None, "it is to write"
        return rows.on(device_of(self.backend.draft))

    def copies(self, cache: BudgetCache, rows: Rows, pairs: Sequence[Pair], unread: int) -> list[Tensor]:
        """The draft's caches for `extend`: keys and values that it has read, and room for tokens to come."""
        device, batch, slots = rows.ids.device, len(rows.ids), rows.size + cache.lookahead
        caches: list[Tensor] = []
        for pair in pairs:
            for states in pair:
                own = torch.zeros(batch, states.shape[1], slots, states.shape[3], dtype=states.dtype, device=device)
                own[:, :, : states.shape[2]] = states.to(device, non_blocking=True)
                caches.append(own.flatten(1, 2))
            caches.append((rows.lengths - unread)[:, None].repeat(1, pair[0].shape[1]))
        return caches

    def write(self, cache: BudgetCache, graphs: DraftGraphs, rows: Rows, caches: list[Tensor], unread: int) -> Tensor:
        """[B, M L]: what the draft writes behind the last `unread` tokens of each row, which its caches get too."""
        length = cache.lookahead
        inputs = (rows.last(unread), rows.positions(unread), *caches, *graphs.params.values())
        known = self.runs.get(length)
        if known is None or known[0].extend is not graphs.extend:
            run = lower_proposals(self.backend, graphs, length, inputs, lookahead=True)
            known = self.runs[length] = (graphs, run)
        with progress.task("the draft looks ahead"):
            ahead = known[1](*inputs)
        if (self.backend.speculate or cache.foresees) and not self.uncompiled.reason:
            start_draft(cache, caches, rows.last(rows.size), length)
        return ahead

    def read(
        self, cache: BudgetCache, kwargs: dict[str, Any], rows: Rows, front: Front, count: int, ahead: Tensor | None
    ) -> Any:
        """The model's output for the call's rows; each layer is pruned into the empty cache.

        Args: count: tokens of each row that the target reads.

        Raises: Refusal: a layer cannot be pruned so.
        """
        backend, graphs, short = self.backend, not self.uncompiled.reason, self.fits(cache, rows)
        refused = without_graphs(cache.method, self.uncompiled.reason)
        if refused:
            raise Refusal(refused)
        verify = graphs and ahead is not None and cache.method.verify and not kwargs.get("output_hidden_states")
        ends, ranks = backend.eos_ids(cache), choosing(backend.ranks)
        question = Question(self.target, cache, kwargs, eos_ids=ends, front=front, rows=rows, ranks=ranks)
        out, logits, record, exact = question.read(count, ahead, short, verify)
        self.check_exact(exact)
        cache.lookahead_ids = None if ahead is None else ahead[:, : cache.lookahead].contiguous()
        if cache.rungs and not short:
            cache.kept = choose_budget(cache, backend.ranks)
            backend.report.chose(cache.kept)
        backend.report.read(record)
        if backend.ranks is not None:
            cache.tighten()
        self.go_on(cache)
        if verify:
            REPLAYS[cache] = Replay(logits, backend.eos_ids(cache))
        return out

    def check_exact(self, exact: dict[int, str]) -> None:
        """Args: exact: why, of layers that were kept whole.

        Raises: Refusal: graphs are to go on from them.
        """
        if exact and not self.uncompiled.reason:
            layer, reason = min(exact.items())
            raise Refusal(
                f"layer {layer} cannot be pruned around the model's own forward, which reads questions ({reason})"
            )

    def go_on(self, cache: BudgetCache) -> None:
        """Let the cache be what a prompt's graph leaves: steps are told slots, and constants of storage as such.

        Without graphs it stays as it is.
        """
        if self.uncompiled.reason:
            return
        cache.columns, cache.read_mask = None, None
        cache.hear(cache.budgeted[0].lengths)
        tell_widest(cache.budgeted)
        storages: list[Tensor] = []
        alike = len({layer.quantized[0].shape for layer in cache.budgeted if layer.quantized}) <= 1
        for layer in cache.budgeted:
            for tensor, axes in zip(layer.quantized or (), quantized_axes(alike), strict=False):
                torch._dynamo.mark_static(tensor, axes)
            about = [tensor for tensor in (layer.lengths, layer.starts, layer.counts) if tensor is not None]
            for tensor, axis in ((layer.key_buffer, 2), (layer.value_buffer, 2), *((tensor, 1) for tensor in about)):
                torch._dynamo.mark_static(tensor, axis)
                storages += [tensor] if axis == 2 else []
        if len({layer.slots for layer in cache.budgeted}) == 1:
            mark_slots(storages, self.backend.sizes)
