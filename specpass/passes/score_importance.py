"""score_importance: in each layer the last W prompt queries and the lookahead queries are scored against the keys.

before: out = prefill_attention(q, k, v, scale)
after:  the same, and scores [B, K, S + L] = importance(take_rows(q, rows), k, rows, lengths)     never [S, S]
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.passes.base import Pass, State
from specpass.passes.graph import SPEC, Editor


@dataclasses.dataclass(frozen=True)
class ScoreImportance(Pass):
    name: ClassVar[str] = "score_importance"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill",)

    def run(self, gm: fx.GraphModule, state: State) -> None:
        if not state.method.scored or not state.sites:
            return
        editor = Editor(gm)
        window, reduce = state.method.window, state.method.reduce  # type: ignore[attr-defined]
        sources = [node for node in (state.lookahead_ids, state.lengths) if node is not None]
        anchor = max(sources).next  # behind both
        eos = list(state.eos_ids)
        rows = editor.call(SPEC.score_rows, state.lengths, state.lookahead_ids, window, eos, before=anchor)
        for site in state.sites:
            before = site.attention.next
            taken = editor.call(SPEC.take_rows, site.query, rows, before=before, like=site.attention)
            site.scores = editor.call(SPEC.importance, taken, site.key, rows, state.lengths, window, site.scale,
                                      reduce, before=before, like=site.attention)
