"""gather_prune: each layer's K/V is compacted in that layer's place, as soon as attention has used it.

before: keys, values, lengths, positions = fill(k, v, ...)                      all S
after:  positions = select(scores, lengths, C, W, kernel, pool)                 [B, K, C], ascending, -1 unused
        keys, values, lengths = gather_kv(k, v, positions, N)                   [B, K * (C + N), D]

Where the answer may follow the lookahead (see take_ahead), its keys and values lie in the first of the free slots, and
count once they are followed:

        keys, values, used = gather_kv(k, v, add_lookahead(positions, index [B, L]), N - L); lengths = used - L

Where KV heads have budgets of their own, the cache has asked where each begins (head_offsets), and

after:  positions = select_heads(scores, lengths, C, W, kernel, pool, floor)    [B, K, M], K C of them in use
        keys, values, lengths = gather_ragged(k, v, positions, K * C, N)        [B, K * (C + N), D]
        positions = pack_heads(positions, K * C)                                [B, K * C]

Where each of P ranks has K heads of the layer, each keeps its own of the best of all:

after:  positions, worth = select_candidates(scores, lengths, X, W, kernel, pool, floor, floor)
        positions = choose_heads(positions, all_gather(worth), P K C, rank)     [B, K, M], K X of them in use at most

X, of a head in the mean, is what the other ranks leave where they keep no more than their floors: the storage is made
for that, and cut to what is kept behind the graph.

Where those of all layers share, see share_layers.py.

Where the budget is chosen when the prompt was read, C is the largest that it may be, the cache has asked what smaller
ones keep (kept_shares), and

after:  positions, rung, shares = select_rungs(scores, attention, lengths, C, W, kernel, pool, rungs)

Where the cache holds prompts in fewer bits, it has asked for that (quantize_kv), and

after:  keys, values, lengths = gather_kv(...)
        keys, values, lengths, codes, counts, basis = quantize_kv(keys, values, lengths, C, N, bits)

A site with a sliding window or chunks keeps what it can still read, of the prompt and never of the lookahead.
"""

from __future__ import annotations

import dataclasses
import functools
import operator
from typing import ClassVar

import torch
from torch import fx

from specpass.bits import why_unserved
from specpass.dialect.cache import Fill, KeptShares, QuantizeKv
from specpass.dialect.define import SPEC
from specpass.dialect.select import SelectRungs
from specpass.graph.edit import Editor
from specpass.graph.operands import items_of
from specpass.graph.walk import ATEN, skip_full_slices, value
from specpass.parallel.shards import Ranks, choosing
from specpass.passes.attend_slots import UNSPREAD
from specpass.passes.exchange import of_all_ranks
from specpass.passes.facts import Ahead, Attention, ReadPositions, Rows, Scores
from specpass.passes.inline import Inline, check_result
from specpass.passes.share_layers import Shared, in_prompt, offsets_of, put
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.base import PROMPTS
from specpass.rewrite.sites import Site, Sites


@dataclasses.dataclass(frozen=True)
class GatherPrune(Pass):
    name: ClassVar[str] = "gather_prune"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = PROMPTS
    requires: ClassVar[tuple[type, ...]] = (Sites, Rows)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, sites, scores = Editor(gm), facts[Sites].sites, facts.get(Scores)
        means = facts.get(Attention)
        alike = len({site.budget for site in sites if site.is_full}) <= 1
        shared = Shared(editor, request, facts)
        rewritten: list[Site] = []
        for index, site in enumerate(sites):
            if site.reads:  # it has read the owner's full keys and values, and from now on reads what that kept
                owner = next(other for other in rewritten if other.module == site.reads)
                rewritten.append(dataclasses.replace(site, cache=owner.cache))
                continue
            own = None if scores is None else scores.nodes[index]
            attention = None if means is None else means.nodes[index]
            before = max(node for node in (site.attention, own, attention) if node is not None).next
            # A layer's own budget would make its region unlike the others': these nodes then stand outside of it.
            like = site.attention if alike or not site.is_full else None
            quantized = quantizations_of(site)
            if quantized:
                site = dataclasses.replace(site, unquantized=why_unquantized(site))
            offsets = offsets_of(site)
            if offsets and (site.alibi is not None or skip_full_slices(site.key) is not Fill.of(site.cache).key):
                raise Refusal(UNSPREAD, site.module)
            if offsets and request.pruning.spread == "global":
                rewritten.append(shared.add(site, own, before))
                continue
            positions = self._positions(editor, request, facts, site, own, attention, before, like)
            told: list[fx.Node] = []
            if SelectRungs.is_call(positions):
                positions, *told = (editor.item(positions, index, before) for index in range(3))
            for shares in shares_of(site):
                if not told:  # its mask says that it reads a window, and it keeps that
                    every = editor.call(SPEC.kept_shares, positions, shares.rungs, before=before, like=like)
                    told = [editor.item(every, index, before) for index in (0, 1)]
                put(editor, shares.node, told)
            # Of a padded batch, rows that fit C keep everything.
            if not alike and site.is_full and facts[Rows].order is not None:
                whole = request.pruning.budget
                lengths = editor.beside(facts[Rows].lengths, site.key, before)
                positions = editor.call(SPEC.keep_short_rows, positions, lengths, whole, before=before)
            slots = share_of(request, facts, site)
            kept, lengths = self._gather(editor, facts, site, positions, slots, before, like)
            positions = in_prompt(editor, facts, site, positions, before, like)
            results: list[fx.Node] = [*(editor.item(kept, index, before) for index in (0, 1)), lengths, positions]
            for asked in offsets:
                begin = editor.call(SPEC.head_offsets, lengths, asked.room, before=before, like=like)
                put(editor, asked.node, [editor.item(begin, index, before) for index in (0, 1)])
                results[3] = editor.call(SPEC.pack_heads, positions, site.kv_heads * slots, before=before, like=like)
            for wanted in quantized:
                held = int(value(positions).shape[2])  # the budget, or more where rows of a padded batch keep all
                quantize(editor, wanted, site, held, results[:3], before, like)
            put(editor, site.cache, results)
            rewritten.append(dataclasses.replace(site, cache=kept))
        shared.finish()
        facts.add(Sites(tuple(rewritten)))

    @staticmethod
    def _gather(
        editor: Editor, facts: Facts, site: Site, positions: fx.Node, slots: int, before: fx.Node, like: fx.Node | None
    ) -> tuple[fx.Node, fx.Node]:
        """What takes the place of the site's `fill`, and the slots in use [B, K]. Args: slots: see share_of."""
        fill = Fill.of(site.cache)
        ahead, room = facts[Ahead].tokens if Ahead in facts else 0, fill.room
        call = functools.partial(editor.call, before=before, like=like)
        if ahead:
            index = call(SPEC.ahead_index, editor.beside(facts[Rows].lengths, fill.key, before), ahead)
            positions = call(SPEC.add_lookahead, positions, index)
            room = editor.call(operator.sub, room, ahead, before=before) if isinstance(room, fx.Node) else room - ahead
        if offsets_of(site):
            kept = call(SPEC.gather_ragged, fill.key, fill.value, positions, site.kv_heads * (slots + ahead), room)
        else:
            kept = call(SPEC.gather_kv, fill.key, fill.value, positions, room)
        used = editor.item(kept, 2, before)
        return kept, call(ATEN.sub.Tensor, used, ahead) if ahead else used

    @staticmethod
    def _positions(
        editor: Editor,
        request: Request,
        facts: Facts,
        site: Site,
        scores: fx.Node | None,
        attention: fx.Node | None,
        before: fx.Node,
        like: fx.Node | None,
    ) -> fx.Node:
        """[B, K, C] positions that a site keeps, of the tokens that the target reads; or all of select_rungs."""
        method, lengths = request.pruning, editor.beside(facts[Rows].lengths, site.key, before)
        call = functools.partial(editor.call, before=before, like=like)
        if site.span.sliding:
            return call(SPEC.select_recent, lengths, site.kv_heads, site.budget, 0)
        if site.span.chunk:
            return call(SPEC.select_chunk, lengths, site.kv_heads, site.budget)
        if request.kind == "short" or (ReadPositions in facts and not method.scored):
            return call(SPEC.keep_all, lengths, site.kv_heads, site.budget)
        if scores is None:
            return call(SPEC.select_recent, lengths, site.kv_heads, site.budget, method.sinks)
        if method.rungs:
            rungs = list(method.rungs)
            plain = (site.budget, method.window, method.kernel, method.pool)
            return call(SPEC.select_rungs, scores, attention, lengths, *plain, rungs)
        if offsets_of(site):
            return choose_together(editor, request, facts, site, scores, before, like)
        if method.select is None:
            return call(SPEC.select, scores, lengths, site.budget, method.window, method.kernel, method.pool)
        name = f"{method.name}.select"
        inline = Inline(editor, functools.partial(method.select, budget=site.budget), name)
        positions = inline(scores, lengths, before=before, like=like)
        shape = (*value(scores).shape[:2], site.budget)
        return check_result(positions, shape, torch.int64, name, "positions [B, K, C]")


def share_of(request: Request, facts: Facts, site: Site) -> int:
    """Slots of a head, in the mean, that a site's heads on this rank may keep: C, or more where ranks share them."""
    ranks = choosing(facts.get(Ranks))
    if ranks is None or request.kind != "prefill" or not offsets_of(site):
        return site.budget
    return request.pruning.most(site.budget, ranks.size)


def choose_together(
    editor: Editor, request: Request, facts: Facts, site: Site, scores: fx.Node, before: fx.Node, like: fx.Node | None
) -> fx.Node:
    """[B, K, M] positions of a site whose heads share budgets, with those of other ranks where there are some."""
    how, ranks = request.pruning, choosing(facts.get(Ranks))
    call = functools.partial(editor.call, before=before, like=like)
    lengths, floor = editor.beside(facts[Rows].lengths, site.key, before), how.floor(site.budget)
    settings = (how.window, how.kernel, how.pool, floor)
    if ranks is None:
        return call(SPEC.select_heads, scores, lengths, site.budget, *settings)
    found = call(SPEC.select_candidates, scores, lengths, share_of(request, facts, site), *settings, floor)
    positions, worth = (editor.item(found, index, before) for index in (0, 1))
    every = of_all_ranks(editor, worth, ranks, before, like)
    total = ranks.size * site.kv_heads * site.budget
    return call(SPEC.choose_heads, positions, every, total, ranks.rank)


def quantizations_of(site: Site) -> list[QuantizeKv]:
    """Where the site's cache asks for fewer bits: once, or never."""
    users = [user for lengths in items_of(site.cache).get(2, []) for user in lengths.users]
    return [view for user in users if (view := QuantizeKv.match(user)) is not None]


def quantize(
    editor: Editor,
    asked: QuantizeKv,
    site: Site,
    slots: int,
    kept: list[fx.Node],
    before: fx.Node,
    like: fx.Node | None,
) -> None:
    """Let what was kept (keys, values, lengths) in so many slots be quantised, unless the site says why not."""
    if site.unquantized:
        leave_unquantized(editor, asked, kept, before)
        return
    call = (SPEC.quantize_kv, *kept, slots, asked.room, asked.bits)
    found = editor.call(*call, before=before, like=like)
    put(editor, asked.node, [editor.item(found, index, before) for index in range(6)])


def leave_unquantized(editor: Editor, asked: QuantizeKv, kept: list[fx.Node], before: fx.Node) -> None:
    """Keys, values and lengths in the place of what was to be quantised, and nothing [B, 0] where codes would be."""
    none = editor.call(ATEN.slice.Tensor, kept[2], 1, 0, 0, before=before)
    nothing = [editor.call(ATEN.clone, none, before=before) for _ in range(3)]
    put(editor, asked.node, [*kept, *nothing])


def why_unquantized(site: Site) -> str:
    """Why a site's cache stays in the model's dtype; "" where it can be quantised."""
    if not site.is_full:
        return str(site.span)
    if site.alibi is not None:
        return "attention adds a bias by the positions of its keys (ALiBi)"
    if skip_full_slices(site.key) is not Fill.of(site.cache).key:
        return "attention reads what is made of cached keys"
    key, val = value(site.key), value(site.value)
    return why_unserved(int(key.shape[3]), int(val.shape[3]), str(key.dtype).removeprefix("torch."))


def shares_of(site: Site) -> list[KeptShares]:
    """Where the site's cache asks what smaller budgets keep: once, where one of them is chosen."""
    users = [user for positions in items_of(site.cache).get(3, []) for user in positions.users]
    return [view for user in users if (view := KeptShares.match(user)) is not None]
