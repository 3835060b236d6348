"""score_prompt: the draft scores the prompt's tokens inside its own layers (SpecPC).

prefill: the last W rows of each layer from `first_layer` on, weighted by linspace(0, 1, W)      -> scores [B, S]
step:    the new token's row in the same layers, weight 1; its softmax includes the generated keys -> scores [B, P]

Applied to the captured draft's graphs, with the operator that scores the target's keys.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import output_of
from specpass.methods.specpc import SpecPC
from specpass.passes.base import Site, State


def score_prefill(gm: fx.GraphModule, state: State, how: SpecPC) -> None:
    """prefill(ids, lengths, room, ...) also returns scores [B, S] float32."""
    editor = Editor(gm)
    ids, lengths = gm.graph.find_nodes(op="placeholder")[:2]
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    rows = editor.call(SPEC.score_rows, lengths, None, how.window, [], before=first)
    weights = editor.call(SPEC.row_weights, lengths, how.window, before=first)
    total = editor.call(SPEC.no_scores, ids, 1, before=first)

    def score(site: Site, before: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        return editor.call(SPEC.take_rows, site.query, rows, before=before, like=site.attention), weights

    _reduce(editor, state, how, total, rows, lengths, score)


def score_step(gm: fx.GraphModule, state: State, how: SpecPC) -> None:
    """step(ids, position, rows, lengths, *caches, ...) also returns scores [B, P] float32."""
    editor = Editor(gm)
    _, _, rows, lengths, storage = gm.graph.find_nodes(op="placeholder")[:5]
    first = next(node for node in gm.graph.nodes if node.op != "placeholder")
    total = editor.call(SPEC.no_scores, storage, state.sites[0].kv_heads, before=first)
    _reduce(editor, state, how, total, rows, lengths, lambda site, before: (site.query, None))


def _reduce(
    editor: Editor,
    state: State,
    how: SpecPC,
    total: fx.Node,
    rows: fx.Node,
    lengths: fx.Node,
    score: Callable[[Site, fx.Node], tuple[fx.Node, fx.Node | None]],
) -> None:
    """Score each layer, reduce over heads and rows, then over layers; the result is the graph's last output."""
    reduce = "max" if how.reduce == "max" else "sum"
    for index in how.scoring_layers(len(state.sites)):
        site = state.sites[index]
        before = site.attention.next
        query, weights = score(site, before)
        scores = editor.call(
            SPEC.importance,
            query,
            site.key,
            rows,
            lengths,
            0,
            site.scale,
            reduce,
            weights,
            None,
            *site.changes,
            before=before,
            like=site.attention,
        )
        total = editor.call(SPEC.merge_layer, total, scores, reduce, before=before, like=site.attention)
    output = output_of(editor.graph)
    result = output.args[0]
    output.args = ((*result, total) if isinstance(result, (tuple, list)) else (result, total),)
