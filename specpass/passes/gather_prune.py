"""gather_prune: each layer's K/V is compacted in that layer's place, as soon as attention has used it.

before: keys, values, lengths, positions = fill(k, v, ...)                      all S
after:  positions = select(scores, lengths, C, W, kernel, pool)                 [B, K, C], ascending, -1 unused
        keys, values, lengths = gather_kv(k, v, positions, N)                   [B, K * (C + N), D]
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.passes.base import Pass, Site, State
from specpass.passes.graph import SPEC, Editor, is_op, items_of


@dataclasses.dataclass(frozen=True)
class GatherPrune(Pass):
    name: ClassVar[str] = "gather_prune"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "short")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        editor = Editor(gm)
        for site in state.sites:
            if not is_op(site.cache, SPEC.fill):
                continue
            before = (site.scores or site.attention).next
            site.positions = self._positions(editor, state, site, before)
            key, value, _, _, room = site.cache.args[:5]
            kept = editor.call(SPEC.gather_kv, key, value, site.positions, room, before=before, like=site.attention)
            numbered = site.positions  # by the caller's prompt, where the target read a part of it
            if state.prompt_positions is not None:
                numbered = editor.call(SPEC.map_positions, site.positions, state.prompt_positions, before=before,
                                       like=site.attention)
            for index, users in items_of(site.cache).items():
                new = numbered if index == 3 else editor.item(kept, index, before)
                for user in users:
                    editor.replace(user, new)
            gm.graph.erase_node(site.cache)
            site.cache = kept

    @staticmethod
    def _positions(editor: Editor, state: State, site: Site, before: fx.Node) -> fx.Node:
        method, like = state.method, site.attention
        if state.kind == "short" or (state.prompt_positions is not None and not method.scored):
            return editor.call(SPEC.keep_all, state.lengths, site.kv_heads, site.budget, before=before, like=like)
        if site.scores is None:
            return editor.call(SPEC.select_recent, state.lengths, site.kv_heads, site.budget, method.sinks,
                               before=before, like=like)
        return editor.call(SPEC.select, site.scores, state.lengths, site.budget, method.window,
                           method.kernel, method.pool, before=before, like=like)  # type: ignore[attr-defined]
