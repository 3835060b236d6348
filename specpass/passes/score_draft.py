"""score_draft_prefill, score_draft_step: the draft scores the prompt's tokens inside its own layers (SpecPC).

prefill: the last W rows of each layer from `first_layer` on, weighted by linspace(0, 1, W)      -> scores [B, S]
step:    the new token's row in the same layers, weight 1; its softmax includes the generated keys -> scores [B, P]

Applied to the captured draft's graphs, with the operator that scores the target's keys.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.operands import add_result
from specpass.graph.walk import first_call
from specpass.methods.specpc import SpecPC
from specpass.passes.facts import Inputs, Rows
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.sites import Site, Sites


@dataclasses.dataclass(frozen=True)
class StepRows:
    """What a scoring step is told.

    Args:
        rows: [B, 1] its position, -1 where the sequence had ended.
        lengths: [B] of the prompt.
        storage: [B, K * P, D] keys of its first layer.
    """

    rows: fx.Node
    lengths: fx.Node
    storage: fx.Node


@dataclasses.dataclass(frozen=True)
class ScoreDraftPrefill(Pass):
    """prefill(ids, lengths, room, ...) also returns scores [B, S] float32."""

    how: SpecPC

    name: ClassVar[str] = "score_draft_prefill"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Sites, Inputs, Rows)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, first, lengths = Editor(gm), first_call(gm.graph), facts[Rows].lengths
        rows = editor.call(SPEC.score_rows, lengths, None, self.how.window, [], before=first)
        weights = editor.call(SPEC.row_weights, lengths, self.how.window, before=first)
        total = editor.call(SPEC.no_scores, facts[Inputs].tokens, 1, before=first)

        def queries(site: Site, before: fx.Node) -> tuple[fx.Node, fx.Node | None]:
            return editor.call(SPEC.take_rows, site.query, rows, before=before, like=site.attention), weights

        reduce_layers(editor, facts, self.how, total, rows, lengths, queries)


@dataclasses.dataclass(frozen=True)
class ScoreDraftStep(Pass):
    """step(ids, position, rows, lengths, *caches, ...) also returns scores [B, P] float32."""

    how: SpecPC

    name: ClassVar[str] = "score_draft_step"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = ("decode",)
    requires: ClassVar[tuple[type, ...]] = (Sites, StepRows)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, told, sites = Editor(gm), facts[StepRows], facts[Sites].sites
        total = editor.call(SPEC.no_scores, told.storage, sites[0].kv_heads, before=first_call(gm.graph))
        reduce_layers(editor, facts, self.how, total, told.rows, told.lengths, lambda site, before: (site.query, None))


def reduce_layers(
    editor: Editor,
    facts: Facts,
    how: SpecPC,
    total: fx.Node,
    rows: fx.Node,
    lengths: fx.Node,
    queries: Callable[[Site, fx.Node], tuple[fx.Node, fx.Node | None]],
) -> None:
    """Score each layer that reads the whole prompt, reduce over heads and rows, then over layers.

    The result is the graph's last output.

    Args: queries: (site, place) -> the query rows that score there, and their weights.
    """
    reduce, sites = "max" if how.reduce == "max" else "sum", facts[Sites].sites
    scoring = [sites[index] for index in how.scoring_layers(len(sites)) if sites[index].is_full]
    if not scoring:
        raise Refusal("no layer that scores reads the whole prompt: all of them have windows")
    for site in scoring:
        before, like = site.attention.next, site.attention
        query, weights = queries(site, before)
        operands = (query, site.key, rows, lengths, 0, site.scale, reduce, weights, None, *site.changes)
        scores = editor.call(SPEC.importance, *operands, before=before, like=like)
        total = editor.call(SPEC.merge_layer, total, scores, reduce, before=before, like=like)
    add_result(editor.graph, total)
