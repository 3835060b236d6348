"""share_layers: what gather_prune does where the KV heads of all layers share their budgets.

A layer's full K/V go as soon as it has used them, as ever: its candidates stay, three times its even share at most, and
the choice among those of all layers is made behind the last of them.

before: keys, values, lengths, positions = fill(k, v, ...); offsets, counts = head_offsets(lengths, N)
after:  positions, worth = select_candidates(scores, lengths, 3 C - 2 W, W, kernel, pool, floor, floor)  in each layer
        keys, values, used = gather_ragged(k, v, add_lookahead(positions, index), K (3 C - 2 W + L), 0)
        keys, values, positions, lengths, offsets, counts = share_layers(...)                            behind the last

keys are then one storage [B, n K (C + N), D] of all n layers, and so are values and positions.

Where each of P ranks has K heads of every layer, all know the candidates' worth, and each keeps its own of the best:

        worth = all_gather(stack(worth of each layer))                                                   [P n, B, K X]
        positions = choose_shared(positions of each layer, worth, P n K C, rank)
        keys, ... = share_layers(..., positions, no scores, most slots of a rank's heads in the mean, ...)

One rank may keep more than its share: the storage is made for the most, and cut to what is kept behind the graph.
"""

from __future__ import annotations

import dataclasses
import functools

from torch import fx

from specpass.dialect.cache import Fill, HeadOffsets
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.operands import items_of
from specpass.graph.walk import ATEN, output_of
from specpass.parallel.shards import Ranks, choosing
from specpass.passes.exchange import of_all_ranks
from specpass.passes.facts import Ahead, ReadPositions, Rows
from specpass.rewrite import Facts, Refusal, Request
from specpass.rewrite.sites import Site

UNLIKE = "its KV heads are unlike those of other layers, with which they cannot share a storage: use spread='heads'"


@dataclasses.dataclass(frozen=True)
class Candidates:
    """What one layer hands over: nodes of keys, values, lengths [B, K], and of positions and their worth [B, K * X]."""

    site: Site
    keys: fx.Node
    values: fx.Node
    lengths: fx.Node
    positions: fx.Node
    worth: fx.Node | None


class Shared:
    """The layers of one graph that share a storage."""

    def __init__(self, editor: Editor, request: Request, facts: Facts) -> None:
        self.editor, self.request, self.facts = editor, request, facts
        self.ahead = facts[Ahead].tokens if Ahead in facts else 0
        self.layers: list[Candidates] = []

    def add(self, site: Site, scores: fx.Node | None, before: fx.Node) -> Site:
        """Let a layer keep its candidates; its `fill` is read until `finish`.

        Raises: Refusal: its heads are unlike those of the layers before.
        """
        if self.layers and site.kv_shape != self.layers[0].site.kv_shape:
            raise Refusal(UNLIKE, site.module)
        editor, how, fill, like = self.editor, self.request.pruning, Fill.of(site.cache), site.attention
        call = functools.partial(editor.call, before=before, like=like)
        lengths = editor.beside(self.facts[Rows].lengths, site.key, before)
        if scores is None:  # the prompt is kept whole
            most, worth = site.budget, None
            positions = call(SPEC.keep_all, lengths, site.kv_heads, most)
        else:
            most, floor = how.candidates(site.budget), how.floor(site.budget)
            settings = (most, how.window, how.kernel, how.pool, floor, floor)
            found = call(SPEC.select_candidates, scores, lengths, *settings)
            positions, worth = (editor.item(found, index, before) for index in (0, 1))
            worth = call(SPEC.pack_heads, worth, site.kv_heads * most)
        taken = positions
        if self.ahead:
            taken = call(SPEC.add_lookahead, positions, call(SPEC.ahead_index, lengths, self.ahead))
        slots = site.kv_heads * (most + self.ahead)
        kept = call(SPEC.gather_ragged, fill.key, fill.value, taken, slots, 0)
        keys, values, used = (editor.item(kept, index, before) for index in range(3))
        if self.ahead:
            used = call(ATEN.sub.Tensor, used, self.ahead)
        packed = call(
            SPEC.pack_heads, in_prompt(editor, self.facts, site, positions, before, like), site.kv_heads * most
        )
        self.layers.append(Candidates(site, keys, values, used, packed, worth))
        return dataclasses.replace(site, cache=kept)

    def finish(self) -> None:
        """Choose among the candidates, and put the result in the place of every layer's `fill`."""
        if not self.layers:
            return
        editor, output, first = self.editor, output_of(self.editor.graph), self.layers[0].site
        lists = [[getattr(layer, name) for layer in self.layers] for name in ("keys", "values", "lengths", "positions")]
        worth = [layer.worth for layer in self.layers if layer.worth is not None]
        room = Fill.of(first.cache).room
        budget = first.budget
        ranks = choosing(self.facts.get(Ranks))
        if worth and ranks is not None:
            lists[3], budget = self._agreed(lists[3], worth, first, ranks, output), self._most(first, ranks)
            worth = []
        all_of = editor.call(SPEC.share_layers, *lists, worth, budget, self.ahead, room, before=output)
        keys, values, positions, *each = (editor.item(all_of, index, output) for index in range(6))
        for index, layer in enumerate(self.layers):
            lengths, *about = (editor.item(own, index, output) for own in each)
            for asked in offsets_of(layer.site):
                put(editor, asked.node, about)
            put(editor, layer.site.cache, [keys, values, lengths, positions])

    def _agreed(
        self, positions: list[fx.Node], worth: list[fx.Node], site: Site, ranks: Ranks, before: fx.Node
    ) -> list[fx.Node]:
        """Of each layer's positions those that all ranks choose together, all of which are kept; else -1."""
        editor = self.editor
        total = ranks.size * len(worth) * site.kv_heads * site.budget
        own = editor.call(ATEN.stack.default, worth, before=before)
        every = of_all_ranks(editor, own, ranks, before)
        chosen = editor.call(SPEC.choose_shared, positions, every, total, ranks.rank, before=before)
        return [editor.item(chosen, index, before) for index in range(len(positions))]

    def _most(self, site: Site, ranks: Ranks) -> int:
        """Slots of a head, in the mean, of a rank whose heads keep all that the other ranks' floors leave."""
        how = self.request.pruning
        return min(how.candidates(site.budget), how.most(site.budget, ranks.size))


def put(editor: Editor, node: fx.Node, results: list[fx.Node]) -> None:
    """Nodes in the place of the results of one node."""
    for index, users in items_of(node).items():
        for user in users:
            editor.replace(user, results[index])
    editor.graph.erase_node(node)


def in_prompt(
    editor: Editor, facts: Facts, site: Site, positions: fx.Node, before: fx.Node, like: fx.Node | None
) -> fx.Node:
    """Positions numbered by the caller's prompt, of which the target may have read a part."""
    read = facts.get(ReadPositions)
    if read is None:
        return positions
    prompt = editor.beside(read.positions, site.key, before)
    return editor.call(SPEC.map_positions, positions, prompt, before=before, like=like)


def offsets_of(site: Site) -> list[HeadOffsets]:
    """Where the site's cache asks where each KV head begins: once, where these have budgets of their own."""
    users = [user for lengths in items_of(site.cache).get(2, []) for user in lengths.users]
    return [view for user in users if (view := HeadOffsets.match(user)) is not None]
