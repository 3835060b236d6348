"""score_importance: in each layer the last W prompt queries and the lookahead queries are scored against the keys.

before: out = prefill_attention(q, k, v, scale)
after:  the same, and scores [B, K, S + L] = importance(take_rows(q, rows), k, rows, lengths)     never [S, S]

A method with its own `score` has that function's nodes in the operator's place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.passes.base import Pass, Refusal, State
from specpass.passes.inline import Inline, check_result


@dataclasses.dataclass(frozen=True)
class ScoreImportance(Pass):
    name: ClassVar[str] = "score_importance"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill",)

    def run(self, gm: fx.GraphModule, state: State) -> None:
        method: Any = state.method
        if not method.scored or not state.sites:
            return
        editor = Editor(gm)
        sources = [node for node in (state.lookahead_ids, state.lengths) if node is not None]
        anchor = max(sources).next  # behind both
        rows = editor.call(
            SPEC.score_rows, state.lengths, state.lookahead_ids, method.window, list(state.eos_ids), before=anchor
        )
        own: dict[float, Inline] = {}  # by scale, which is a constant of the site
        for site in state.sites:
            before, like = site.attention.next, site.attention
            taken = editor.call(SPEC.take_rows, site.query, rows, before=before, like=like)
            if method.score is None:
                changes = (None, None, *site.changes) if site.changes else ()  # no weights, no log-sum-exp yet
                site.scores = editor.call(
                    SPEC.importance,
                    taken,
                    site.key,
                    rows,
                    state.lengths,
                    method.window,
                    site.scale,
                    method.reduce,
                    *changes,
                    before=before,
                    like=like,
                )
                continue
            if site.changes:
                raise Refusal(f"{method.name}.score is not told of this layer's soft cap or sinks", site.module)
            name = f"{method.name}.score"
            function = functools.partial(method.score, scale=site.scale)
            inline = own.setdefault(site.scale, Inline(editor, function, name))
            scores = inline(taken, site.key, site.value, rows, state.lengths, before=before, like=like)
            shape = tuple(site.key.meta["val"].shape[:3])
            site.scores = check_result(scores, shape, torch.float32, name, "scores [B, K, T]")
