"""take_ahead: the logits behind each lookahead token are a result too (verified lookahead).

The target reads prompt + lookahead causally, so these are its own logits, with all KV, for as long as the answer is the
lookahead. What stands behind the last attention is written once more for the lookahead's rows:

before: take_positions(h, lengths - 1) -> lm_head -> logits [B, 1, V]
after:  the same, and take_positions(h, lengths + [0 .. L - 1]) -> lm_head -> [B, L, V], the last of the results

Where that cannot be written, nothing is, and the report says why: the answer then follows nothing.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import Tensor, fx

from specpass.dialect.cache import Fill
from specpass.dialect.define import SPEC
from specpass.dialect.rows import TakePositions
from specpass.graph.aten import Slice
from specpass.graph.edit import Editor
from specpass.graph.operands import GetItem, results_of
from specpass.graph.rows import last_only
from specpass.graph.walk import ancestors, behind, output_of, value
from specpass.passes.facts import Ahead, Drafted, Rows
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.sites import Sites


@dataclasses.dataclass(frozen=True)
class TakeAhead(Pass):
    name: ClassVar[str] = "take_ahead"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Sites, Rows)
    provides: ClassVar[tuple[type, ...]] = (Ahead,)

    def applies(self, request: Request) -> bool:
        return request.verify

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        drafted = facts.get(Drafted)
        if drafted is None:
            facts.add(Ahead(why="no lookahead stands behind the prompt"))
            return
        logits, why = logits_of(gm, facts[Sites].sites[-1].attention, drafted.caches)
        if logits is None:
            facts.add(Ahead(why=why))
            return
        editor, output = Editor(gm), output_of(gm.graph)
        written: list[fx.Node] = []
        try:
            found = rows_ahead(editor, facts[Rows].lengths, request.lookahead, logits, written)
        except RuntimeError:  # a fake operator's: some size behind the last attention is that of one row
            found = None
        if found is None:
            for node in reversed(written):
                gm.graph.erase_node(node)
            facts.add(Ahead(why="the model's head is written for one row of each prompt"))
            return
        output.args = ((*results_of(gm.graph), found),)
        facts.add(Ahead(request.lookahead))


def logits_of(gm: fx.GraphModule, attention: fx.Node, others: tuple[fx.Node, ...]) -> tuple[fx.Node | None, str]:
    """The graph's one result of the model's own that has rows, or None and why a step could not be given another."""
    own = [node for node in results_of(gm.graph) if is_rows(node) and node not in others]
    if len(own) != 1 or own[0] not in behind(attention):
        return None, "the call returns more than logits"
    return own[0], ""


def is_rows(node: object) -> bool:
    """Whether a result is [B, T, E] and not a layer's storage."""
    val = value(node)
    item = GetItem.match(node)
    stored = item is not None and Fill.is_call(item.source)
    return isinstance(val, Tensor) and val.dim() == 3 and val.is_floating_point() and not stored


def rows_ahead(
    editor: Editor, lengths: fx.Node, lookahead: int, logits: fx.Node, written: list[fx.Node]
) -> fx.Node | None:
    """`logits` of the L rows behind each prompt [B, L, V], in front of the graph's output.

    Args: written: takes up the new nodes.
    Returns: None where one of its operators takes the last row in another way than by a slice.
    Raises: RuntimeError: sizes do not fit.
    """
    output = output_of(editor.graph)

    def put(node: fx.Node) -> fx.Node:
        written.append(node)
        return node

    chain = ancestors(logits)
    after = set().union(*(behind(node) for node in chain if TakePositions.is_call(node)))
    index = put(editor.call(SPEC.ahead_index, lengths, lookahead, before=output))
    copies: dict[fx.Node, fx.Node] = {}
    for node in chain:
        view = TakePositions.match(node)
        if view is not None and view.node not in after:
            beside = editor.beside(index, view.hidden, output)
            copies[node] = put(editor.call(SPEC.take_positions, view.hidden, beside, before=output, like=node))
        elif node in after:
            if last_only(node):
                if Slice.match(node) is None:
                    return None
                copies[node] = copies[node.all_input_nodes[0]]
                continue
            with editor.graph.inserting_before(output):
                copies[node] = put(editor.graph.node_copy(node, lambda n: copies.get(n, n)))
            editor.refresh(copies[node], like=node)
    return copies[logits]
