"""take_last: the logits come from the prompt's own last position, in the layout that the caller gave.

Behind the last attention site nothing mixes positions, so the rows can be taken in front of the first operator that
selects or reduces along the sequence:

before: h [B, S + L, E] -> h[:, -1:] -> lm_head          after: take_positions(h, lengths - 1) [B, 1, E] -> lm_head

Operators over positions that come later (logits of every position asked for) read the rows in the original order.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import fx

from specpass.errors import UnsupportedCallError
from specpass.passes.base import Pass, Refusal, State
from specpass.passes.canonicalize import FULL
from specpass.passes.graph import ATEN, SPEC, Editor, find, is_op, output_of

POINTWISE_TAGS = torch.Tag.pointwise
ROW_OPS = (ATEN.linear, ATEN.to, ATEN._to_copy, ATEN.matmul, ATEN.layer_norm, ATEN.rms_norm, ATEN.dropout,
           ATEN.contiguous, ATEN.clone, ATEN.silu, ATEN.gelu, ATEN.addmm, ATEN.mm, ATEN.type_as)


@dataclasses.dataclass(frozen=True)
class TakeLast(Pass):
    name: ClassVar[str] = "take_last"
    stage: ClassVar[str] = "DRAFTED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "short")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        if state.lookahead_ids is None and state.order is None:
            return
        editor = Editor(gm)
        hidden = next(node for node in gm.graph.nodes if node is state.sites[-1].attention)
        columns = hidden.meta["val"].shape[2]
        output = output_of(gm.graph)
        tail = behind(hidden)
        done: set[fx.Node] = set()  # behind a take, in the caller's layout already
        for node in [n for n in gm.graph.nodes if n in tail]:
            if node is output or node in done or keeps_rows(node, columns):
                continue
            for source in [n for n in node.all_input_nodes if n in tail - done and has_rows(n, columns)]:
                done |= behind(self._take(editor, state, node, source, columns))
        for source in [n for n in output.all_input_nodes if n in tail - done and has_rows(n, columns)]:
            index = every_row(editor, state, output)
            new = editor.call(SPEC.take_positions, source, index, before=output, like=source)
            output.replace_input_with(source, new)
        refuse_mixed_rows(gm, columns)

    @staticmethod
    def _take(editor: Editor, state: State, node: fx.Node, source: fx.Node, columns: object) -> fx.Node:
        if source.meta["val"].dim() != 3 or source.meta["val"].shape[1] != columns:
            raise Refusal(f"{node.target} mixes positions behind the last attention site")
        last_only = (is_op(node, ATEN.slice) and tuple(node.args[1:]) == (1, -1, FULL)) or (
            is_op(node, ATEN.select) and tuple(node.args[1:]) == (1, -1))
        if last_only:
            less = editor.call(ATEN.sub.Tensor, state.lengths, 1, before=node, like=node)
            index = editor.call(ATEN.unsqueeze, less, 1, before=node, like=node)
        else:
            index = every_row(editor, state, node)
        new = editor.call(SPEC.take_positions, source, index, before=node, like=node)
        node.replace_input_with(source, new)
        if "val" in node.meta:
            editor.refresh(node)
        return new


def refuse_mixed_rows(gm: fx.GraphModule, columns: object) -> None:
    """Behind a take, rows are in the caller's layout: nothing there may also read packed rows from in front of it."""
    takes = set(find(gm.graph, SPEC.take_positions))
    after = set().union(*(behind(take) for take in takes)) if takes else set()
    for node in after - takes - {output_of(gm.graph)}:
        for source in node.all_input_nodes:
            if source not in after and source not in takes and has_rows(source, columns):
                raise Refusal(f"{node.target} reads rows from in front of the last attention site")


def every_row(editor: Editor, state: State, before: fx.Node) -> fx.Node:
    """Index [B, S] of the prompt's own rows in the caller's order.

    Raises: UnsupportedCallError where the target does not read them all.
    """
    if state.prompt_positions is not None:
        raise UnsupportedCallError(
            f"more than the last position's logits (or hidden states) were asked for, and {state.method.name} reads "
            "only a part of the prompt: pass logits_to_keep=1 (generate() does)."
        )
    if state.order is not None:
        return editor.call(SPEC.unpack_index, state.order, before=before)
    return editor.call(SPEC.row_index, state.inputs["input_ids"], before=before)


def behind(node: fx.Node) -> set[fx.Node]:
    """All nodes that depend on `node`."""
    seen: set[fx.Node] = set()
    stack = list(node.users)
    while stack:
        current = stack.pop()
        if current not in seen:
            seen.add(current)
            stack.extend(current.users)
    return seen


def has_rows(node: fx.Node, columns: object) -> bool:
    """Whether the value has the sequence axis, alone or flattened with the batch (B * T)."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and any(_holds(dim, columns) for dim in val.shape)


def _holds(dim: object, columns: object) -> bool:
    symbolic = isinstance(dim, torch.SymInt) and isinstance(columns, torch.SymInt)
    return symbolic and columns.node.expr.free_symbols <= dim.node.expr.free_symbols  # type: ignore[attr-defined]


def _same(dim: object, columns: object) -> bool:
    return isinstance(dim, torch.SymInt) and isinstance(columns, torch.SymInt) and dim.node.expr == columns.node.expr


def keeps_rows(node: fx.Node, columns: object) -> bool:
    """Whether each row of the result depends on the same row alone."""
    if node.op != "call_function" or not has_rows(node, columns):
        return False
    tags = getattr(node.target, "tags", ())
    if POINTWISE_TAGS in tags or is_op(node, *ROW_OPS):
        return True
    if is_op(node, ATEN.mean, ATEN.sum, ATEN.var, ATEN.softmax, ATEN.amax):
        dims = node.args[1] if isinstance(node.args[1], (list, tuple)) else [node.args[1]]
        return list(dims) == [-1]
    if is_op(node, ATEN.slice):  # over another axis, or over all of this one
        return not _same(node.args[0].meta["val"].shape[node.args[1]], columns) or tuple(node.args[2:]) == (0, FULL)
    return is_op(node, ATEN.reshape, ATEN.view, ATEN.transpose, ATEN.unsqueeze, ATEN.squeeze, ATEN.expand,
                 ATEN.add, ATEN.mul, ATEN.pow, ATEN.rsqrt)
