"""gather_prune: each layer's K/V is compacted in that layer's place, as soon as attention has used it.

before: keys, values, lengths, positions = fill(k, v, ...)                      all S
after:  positions = select(scores, lengths, C, W, kernel, pool)                 [B, K, C], ascending, -1 unused
        keys, values, lengths = gather_kv(k, v, positions, N)                   [B, K * (C + N), D]
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.cache import Fill
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import is_op, items_of
from specpass.passes.base import Pass, Site, State
from specpass.passes.inline import Inline, check_result


@dataclasses.dataclass(frozen=True)
class GatherPrune(Pass):
    name: ClassVar[str] = "gather_prune"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "short")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        editor = Editor(gm)
        alike = len({site.budget for site in state.sites}) == 1
        for site in state.sites:
            if not is_op(site.cache, SPEC.fill):
                continue
            before = (site.scores or site.attention).next
            # A layer's own budget would make its region unlike the others': these nodes then stand outside of it.
            like = site.attention if alike else None
            site.positions = self._positions(editor, state, site, before, like)
            if not alike and state.order is not None:  # of a padded batch, rows that fit C keep everything
                site.positions = editor.call(
                    SPEC.keep_short_rows, site.positions, state.lengths, state.method.budget, before=before
                )
            fill = Fill.of(site.cache)
            kept = editor.call(
                SPEC.gather_kv, fill.key, fill.value, site.positions, fill.room, before=before, like=like
            )
            numbered = site.positions  # by the caller's prompt, where the target read a part of it
            if state.prompt_positions is not None:
                numbered = editor.call(
                    SPEC.map_positions, site.positions, state.prompt_positions, before=before, like=like
                )
            for index, users in items_of(site.cache).items():
                new = numbered if index == 3 else editor.item(kept, index, before)
                for user in users:
                    editor.replace(user, new)
            gm.graph.erase_node(site.cache)
            site.cache = kept

    @staticmethod
    def _positions(editor: Editor, state: State, site: Site, before: fx.Node, like: fx.Node | None) -> fx.Node:
        method: Any = state.method
        if state.kind == "short" or (state.prompt_positions is not None and not method.scored):
            return editor.call(SPEC.keep_all, state.lengths, site.kv_heads, site.budget, before=before, like=like)
        if site.scores is None:
            return editor.call(
                SPEC.select_recent, state.lengths, site.kv_heads, site.budget, method.sinks, before=before, like=like
            )
        if method.select is None:
            return editor.call(
                SPEC.select,
                site.scores,
                state.lengths,
                site.budget,
                method.window,
                method.kernel,
                method.pool,
                before=before,
                like=like,
            )
        name = f"{method.name}.select"
        inline = Inline(editor, functools.partial(method.select, budget=site.budget), name)
        positions = inline(site.scores, state.lengths, before=before, like=like)
        shape = (*site.scores.meta["val"].shape[:2], site.budget)
        return check_result(positions, shape, torch.int64, name, "positions [B, K, C]")
