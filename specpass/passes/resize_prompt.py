"""resize_prompt: the target reads the C gathered tokens, a constant number, whatever the prompt's length.

before: logits = target(ids [B, S])
after:  logits = target(append_ids(take_ids(ids, positions), lookahead, lengths) [B, C + L])       L = 0 for SpecPC

In the target's own nodes the symbol S becomes the constant C + L, so their fake values are computed once more.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor, quiet
from specpass.graph.walk import ATEN, ancestors, depends, is_op, is_size, value
from specpass.passes.base import Pass, Refusal, State


@dataclasses.dataclass(frozen=True)
class ResizePrompt(Pass):
    name: ClassVar[str] = "resize_prompt"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill",)

    def run(self, gm: fx.GraphModule, state: State) -> None:
        if state.prompt_positions is None:
            return
        editor, anchor = Editor(gm), state.anchor
        length = state.lookahead if state.method.appends else 0
        ids = state.inputs["input_ids"]
        symbol = value(ids).shape[1].node.expr
        how: Any = state.method.prompt
        columns = how.budget + length
        nodes = [node for node in gm.graph.nodes if node >= anchor]
        target_reads(editor, nodes, ids, gathered_ids(editor, state, ids, length))
        for node, new in told(editor, state, nodes, symbol, length):
            target_reads(editor, nodes, node, new)
        resize(editor, nodes, symbol, columns)


def gathered_ids(editor: Editor, state: State, ids: fx.Node, length: int) -> fx.Node:
    taken = editor.call(SPEC.take_ids, ids, state.prompt_positions, before=state.anchor)
    if not length:
        return taken
    return editor.call(SPEC.append_ids, taken, state.lookahead_ids, state.lengths, before=state.anchor)


def told(editor: Editor, state: State, nodes: list[fx.Node], symbol: Any, length: int) -> list[tuple[fx.Node, fx.Node]]:
    """The target's position ids [1 or B, S], given or computed, each with what stands in for it [B, C + L]."""
    given = state.inputs.get("position_ids")
    original = state.method.prompt.positions == "original"  # type: ignore[union-attr]
    sources = [given] if given is not None else computed_positions(nodes, symbol) if original else []
    if original and not sources:
        raise Refusal("positions='original' needs position_ids, and this model computes its positions in another way")
    anchor = state.anchor
    kept = state.prompt_positions
    numbers = kept if original else editor.call(SPEC.number_anew, kept, before=anchor)
    if length and sources:
        numbers = editor.call(SPEC.append_positions, numbers, state.lengths, length, before=anchor)
    return [(source, numbers) for source in sources]


def computed_positions(nodes: list[fx.Node], symbol: Any) -> list[fx.Node]:
    """Nodes `unsqueeze(arange(S) + 0, 0)` [1, S] that depend on nothing but the length."""
    found = []
    for node in nodes:
        if is_op(node, ATEN.unsqueeze) and node.args[1] == 0:
            val = value(node)
            counts = val.dtype == torch.int64 and val.dim() == 2 and is_size(val.shape[1], symbol)
            if counts and all(
                not isinstance(value(source), torch.Tensor) or is_op(source, ATEN.arange, ATEN.add) or source is node
                for source in ancestors(node)
            ):
                found.append(node)
    return found


def target_reads(editor: Editor, nodes: Iterable[fx.Node], old: fx.Node, new: fx.Node) -> None:
    """Let the target's nodes read `new` where they read `old`; the cache goes on counting the caller's columns."""
    for node in nodes:
        if old in node.all_input_nodes and not is_op(node, SPEC.size):
            node.replace_input_with(old, new)


def resize(editor: Editor, nodes: list[fx.Node], symbol: Any, columns: int) -> None:
    """Put the constant in the symbol's place in `nodes`, and recompute the values that depend on it."""
    inside = set(nodes)
    for size in [n for n in editor.graph.nodes if isinstance(n.meta.get("val"), torch.SymInt)]:
        if size.meta["val"].node.expr == symbol:
            for user in [user for user in size.users if user in inside]:
                _replace_constant(user, size, columns)
    for node in nodes:
        if node.op == "call_function" and not is_op(node, SPEC.size) and depends(node.meta.get("val"), symbol):
            with quiet(editor.mode):
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: n.meta["val"])
                node.meta["val"] = node.target(*args, **kwargs)
            if isinstance(node.meta["val"], int):
                for user in list(node.users):
                    _replace_constant(user, node, node.meta["val"])


def _replace_constant(user: fx.Node, node: fx.Node, constant: int) -> None:
    user.args, user.kwargs = fx.map_arg((user.args, dict(user.kwargs)), lambda n: constant if n is node else n)
