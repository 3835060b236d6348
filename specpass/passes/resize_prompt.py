"""resize_prompt: the target reads the C gathered tokens, a constant number, whatever the prompt's length.

before: logits = target(ids [B, S])
after:  logits = target(append_ids(take_ids(ids, positions), lookahead, lengths) [B, C + L])       L = 0 for SpecPC

In the target's own nodes the symbol S becomes the constant C + L, so their fake values are computed once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import ClassVar

import sympy
import torch
from torch import fx

from specpass.dialect.alibi import KeyColumns
from specpass.dialect.cache import Size
from specpass.dialect.define import SPEC
from specpass.graph.aten import Unsqueeze
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, ancestors, depends, is_op, is_size, value
from specpass.passes.facts import Drafted, Inputs, ReadPositions, Rows
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request


@dataclasses.dataclass(frozen=True)
class ResizePrompt(Pass):
    name: ClassVar[str] = "resize_prompt"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Inputs, Rows, Drafted, ReadPositions)

    def applies(self, request: Request) -> bool:
        return request.compresses

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, ids, anchor = Editor(gm), facts[Inputs].tokens, facts[Drafted].anchor
        how, length = request.pruning.prompt, request.lookahead if request.pruning.appends else 0
        assert how is not None
        assert isinstance(how.budget, int)
        symbol = value(ids).shape[1].node.expr
        nodes = [node for node in gm.graph.nodes if node >= anchor]
        target_reads(nodes, ids, gathered_ids(editor, facts, length))
        for source, new in told(editor, facts, nodes, symbol, length, original=how.positions == "original"):
            target_reads(nodes, source, new)
        resize(editor, nodes, symbol, how.budget + length)


def gathered_ids(editor: Editor, facts: Facts, length: int) -> fx.Node:
    """The tokens that the target reads, and the lookahead of `length` behind them."""
    drafted = facts[Drafted]
    read = facts[ReadPositions].positions
    taken = editor.call(SPEC.take_ids, facts[Inputs].tokens, read, before=drafted.anchor)
    if not length:
        return taken
    return editor.call(SPEC.append_ids, taken, drafted.ids, facts[Rows].lengths, before=drafted.anchor)


def told(
    editor: Editor, facts: Facts, nodes: list[fx.Node], symbol: sympy.Expr, length: int, *, original: bool
) -> list[tuple[fx.Node, fx.Node]]:
    """The target's position ids [1 or B, S], given or computed, each with what stands in for it [B, C + L]."""
    given, anchor, kept = facts[Inputs].positions, facts[Drafted].anchor, facts[ReadPositions].positions
    sources = [given] if given is not None else computed_positions(nodes, symbol) if original else []
    columns = KeyColumns.find(editor.graph) if original else []  # where packed columns are no positions
    if original and not (sources or columns):
        raise Refusal("positions='original' needs position_ids, and this model computes its positions in another way")
    numbers = kept if original else editor.call(SPEC.number_anew, kept, before=anchor)
    if length and (sources or columns):
        numbers = editor.call(SPEC.append_positions, numbers, facts[Rows].lengths, length, before=anchor)
    found = [(source, numbers) for source in sources]
    if columns:
        wide = editor.call(ATEN.unsqueeze, numbers, 1, before=anchor)
        found += [(view.node, wide) for view in columns]
    return found


def computed_positions(nodes: list[fx.Node], symbol: sympy.Expr) -> list[fx.Node]:
    """Nodes `unsqueeze(arange(S) + 0, 0)` [1, S] that depend on nothing but the length."""

    def counts(node: fx.Node) -> bool:
        view, val = Unsqueeze.match(node), node.meta.get("val")
        return (
            view is not None
            and view.dim == 0
            and val.dtype == torch.int64
            and val.dim() == 2
            and is_size(val.shape[1], symbol)
        )

    def plain(source: fx.Node) -> bool:
        return not isinstance(value(source), torch.Tensor) or is_op(source, ATEN.arange, ATEN.add)

    return [
        node for node in nodes if counts(node) and all(plain(source) or source is node for source in ancestors(node))
    ]


def target_reads(nodes: Iterable[fx.Node], old: fx.Node, new: fx.Node) -> None:
    """Let the target's nodes read `new` where they read `old`; the cache goes on counting the caller's columns."""
    for node in nodes:
        if old in node.all_input_nodes and not Size.is_call(node):
            node.replace_input_with(old, new)


def resize(editor: Editor, nodes: list[fx.Node], symbol: sympy.Expr, columns: int) -> None:
    """Put the constant in the symbol's place in `nodes`, and recompute the values that depend on it."""
    inside = set(nodes)
    for size in [n for n in editor.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]:
        if value(size).node.expr == symbol:
            for user in [user for user in size.users if user in inside]:
                put_number(user, size, columns)
    for node in nodes:
        if node.op == "call_function" and not Size.is_call(node) and depends(node.meta.get("val"), symbol):
            editor.refresh(node)
            if isinstance(value(node), int):
                for user in list(node.users):
                    put_number(user, node, value(node))


def put_number(user: fx.Node, node: fx.Node, number: int) -> None:
    """Let `user` take a number where it read a node."""
    user.args, user.kwargs = fx.map_arg((user.args, dict(user.kwargs)), lambda n: number if n is node else n)
