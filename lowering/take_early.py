"""take_early: behind the last layer's attention only the rows that are read further on are computed.

before: o [B, T, H * Dv] -> o_proj -> + residual -> norm -> MLP -> + -> norm -> h [B, T, E]
        take_positions(h, last) -> lm_head; take_positions(h, ahead) -> lm_head
after:  rows = cat(last, ahead) [B, 1 + L]; take_positions(o, rows), take_positions(residual, rows) -> the same
        operators on [B, 1 + L, ...]; copies of h[:, :1] and h[:, 1:] -> lm_head
Where no prompt is padded and nothing looks ahead, h[:, -1:] is read, and o[:, -1:], residual[:, -1:] instead.

It is one layer's share of all linear layers but those that make its queries, keys and values. That layer is like no
other then, and runs operator by operator (`APART`): to compile it would take as long as all the others together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from itertools import accumulate
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.dialect.rows import TakePositions
from specpass.graph.edit import Editor
from specpass.graph.rows import is_rows, keeps_rows, last_only
from specpass.graph.walk import ATEN, FULL, ancestors, depends, is_op, value
from specpass.lowering.regions import APART
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import PROMPTS


@dataclasses.dataclass(frozen=True)
class TakeEarly(Pass):
    name: ClassVar[str] = "take_early"
    stage: ClassVar[str] = "LOWERED"
    kinds: ClassVar[tuple[Kind, ...]] = PROMPTS

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        takes = TakePositions.find(gm.graph)
        lasts = [] if takes else [node for node in gm.graph.nodes if last_only(node)]
        cone = read_by([view.node for view in takes] or lasts)
        if not any(is_op(node, ATEN.linear, ATEN.matmul) for node in cone):
            return  # nothing that costs
        editor = Editor(gm)
        if takes:
            take_in_front(editor, takes, cone)
        else:
            trim(editor, cone, lambda source, before: editor.call(*last_of(source), before=before, like=before))
        for node in cone:
            node.meta[APART] = True


def read_by(takes: list[fx.Node]) -> list[fx.Node]:
    """Nodes [B, T, ...], in order, whose rows nothing reads but `takes`, each row made of the same row alone.

    Empty where the rows that are read, or T, are not counted so that others could not be taken for them.
    """
    columns = value(takes[0].all_input_nodes[0]).shape[1] if takes else 0
    counted = all(value(node).dim() < 3 or isinstance(value(node).shape[1], int) for node in takes)
    alike = all(is_rows(node.all_input_nodes[0], columns) for node in takes)
    if not (isinstance(columns, torch.SymInt) and counted and alike):
        return []
    readers, cone = set(takes), []
    for node in reversed(takes[0].graph.nodes):
        if not node.users or not readers.issuperset(node.users) or not is_rows(node, columns):
            continue
        given = [source for source in node.all_input_nodes if depends(value(source), columns)]
        if keeps_rows(node, columns) and given and all(is_rows(source, columns) for source in given):
            readers.add(node)
            cone.append(node)
    return cone[::-1]


def take_in_front(editor: Editor, takes: list[TakePositions], cone: list[fx.Node]) -> None:
    """Let `cone` compute the rows of all `takes`, side by side, and those read their part."""
    indices = list(dict.fromkeys(view.index for view in takes))
    counts = {index: int(value(index).shape[1]) for index in indices}
    hoist(indices, cone[0])
    rows = indices[0] if len(indices) == 1 else editor.call(ATEN.cat, indices, 1, before=cone[0])

    def take(source: fx.Node, before: fx.Node) -> fx.Node:
        return editor.call(SPEC.take_positions, source, editor.beside(rows, source, before), before=before, like=before)

    trim(editor, cone, take)
    ends = dict(zip(indices, accumulate(counts.values()), strict=True))
    for view in takes:
        node, end = view.node, ends[view.index]
        part = (view.hidden, 1, end - counts[view.index], end)
        # A copy, as take_positions' result is one: what reads it counts on rows that lie together (see dense_rows.py).
        editor.replace(node, editor.call(ATEN.slice_copy.Tensor, *part, before=node, like=node))


def trim(editor: Editor, cone: list[fx.Node], take: Callable[[fx.Node, fx.Node], fx.Node]) -> None:
    """Let `cone` read fewer rows of what stands in front of it. `take(source, before)` makes them."""
    columns, inside, taken = value(cone[0]).shape[1], set(cone), dict[fx.Node, fx.Node]()
    for node in cone:
        for source in [s for s in node.all_input_nodes if s not in inside and is_rows(s, columns)]:
            if source not in taken:
                taken[source] = take(source, node)
            node.replace_input_with(source, taken[source])
        editor.refresh(node)


def last_of(source: fx.Node) -> tuple[Any, ...]:
    return ATEN.slice.Tensor, source, 1, -1, FULL


def hoist(nodes: Iterable[fx.Node], before: fx.Node) -> None:
    """Put nodes, and what they are made of, in front of `before`."""
    for node in nodes:
        for source in ancestors(node):
            if source > before:
                before.prepend(source)
