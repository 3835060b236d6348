"""take_last: the logits come from the prompt's own last position, in the layout that the caller gave.

Behind the last attention site nothing mixes positions, so the rows can be taken in front of the first operator that
selects or reduces along the sequence:

before: h [B, S + L, E] -> h[:, -1:] -> lm_head          after: take_positions(h, lengths - 1) [B, 1, E] -> lm_head

Operators over positions that come later (logits of every position asked for) read the rows in the original order. Where
experts sort the rows, they are taken in front of them (rows/experts.py).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.dialect.rows import TakePositions
from specpass.graph.aten import Copy
from specpass.graph.edit import Editor
from specpass.graph.rows import has_rows, is_rows, keeps_rows, last_only
from specpass.graph.walk import behind, output_of, value
from specpass.passes.facts import Drafted, Inputs, Rows, Weights
from specpass.passes.rows.experts import take_in_front_of_blocks
from specpass.passes.rows.indices import RowIndices
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.base import PROMPTS
from specpass.rewrite.sites import Sites


@dataclasses.dataclass(frozen=True)
class TakeLast(Pass):
    name: ClassVar[str] = "take_last"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[Kind, ...]] = PROMPTS
    requires: ClassVar[tuple[type, ...]] = (Sites, Inputs, Rows, Weights)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        if facts[Rows].full and Drafted not in facts:
            return  # each row's last token stands in the last column, as the model takes it to
        editor = Editor(gm)
        indices = RowIndices(editor, request, facts)
        hidden = facts[Sites].sites[-1].attention
        columns = value(hidden).shape[2]
        output = output_of(gm.graph)
        # Behind a take, rows are in the caller's layout already.
        done = take_in_front_of_blocks(editor, indices, facts[Weights].tensors, hidden, columns)
        tail = behind(hidden)
        rows = {hidden, *tail}
        for node in [n for n in gm.graph.nodes if n in tail]:
            if node is output or node in done or keeps_rows(node, columns):
                copy = Copy.match(node)
                if copy is not None and copy.input not in rows:  # read by who knows what, and not behind it
                    raise Refusal("aten.copy_ puts rows in front of the last attention site")
                continue
            for source in [n for n in node.all_input_nodes if n in rows - done and has_rows(n, columns)]:
                done |= behind(take(editor, indices, node, source, columns))
        for source in [n for n in output.all_input_nodes if n in tail - done and has_rows(n, columns)]:
            index = editor.beside(indices.every(output), source, output)
            new = editor.call(SPEC.take_positions, source, index, before=output, like=source)
            output.replace_input_with(source, new)
        take_beside(editor, hidden, columns)


def take(editor: Editor, indices: RowIndices, node: fx.Node, source: fx.Node, columns: object) -> fx.Node:
    """Let `node` read the rows of `source` that it wants: the last, or all in the caller's order."""
    if value(source).dim() != 3 or value(source).shape[1] != columns:
        raise Refusal(f"{node.target} mixes positions behind the last attention site")
    index = indices.last(node) if last_only(node) else indices.every(node)
    new = editor.call(SPEC.take_positions, source, editor.beside(index, source, node), before=node, like=node)
    node.replace_input_with(source, new)
    if "val" in node.meta:
        editor.refresh(node)
    return new


def take_beside(editor: Editor, hidden: fx.Node, columns: object) -> None:
    """Behind a take, rows are in the caller's layout: what is read there from in front of it is taken too.

    Raises: Refusal: no one take says which rows.
    """
    tail = behind(hidden)
    takes = {view.node: view.index for view in TakePositions.find(editor.graph) if view.node in tail}
    after = {take: behind(take) for take in takes}
    behind_any = set().union(*after.values()) if after else set()
    taken: dict[tuple[fx.Node, fx.Node], fx.Node] = {}
    for node in [n for n in editor.graph.nodes if n in behind_any and n not in takes and n.op != "output"]:
        indices = {index for take, index in takes.items() if node in after[take]}
        for source in node.all_input_nodes:
            if source in behind_any or source in takes or not has_rows(source, columns):
                continue
            if len(indices) != 1 or not is_rows(source, columns):
                raise Refusal(f"{node.target} reads rows from in front of the last attention site")
            key = (source, *indices)
            if key not in taken:
                index = editor.beside(next(iter(indices)), source, node)
                taken[key] = editor.call(SPEC.take_positions, source, index, before=node, like=node)
            node.replace_input_with(source, taken[key])
