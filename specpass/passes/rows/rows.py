"""What the passes know of rows [B, T, ...]: which operators keep them apart, which end them, where prompts end."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from specpass.dialect.define import SPEC
from specpass.errors import UnsupportedCallError
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, FULL, is_op, is_size
from specpass.passes.base import State

POINTWISE_TAGS = torch.Tag.pointwise
ROW_OPS = (
    ATEN.linear,
    ATEN.to,
    ATEN._to_copy,
    ATEN.matmul,
    ATEN.layer_norm,
    ATEN.rms_norm,
    ATEN.dropout,
    ATEN.contiguous,
    ATEN.clone,
    ATEN.silu,
    ATEN.gelu,
    ATEN.addmm,
    ATEN.mm,
    ATEN.type_as,
)


def has_rows(node: fx.Node, columns: object) -> bool:
    """Whether the value has the sequence axis, alone or flattened with the batch (B * T)."""
    val = node.meta.get("val")
    return isinstance(val, torch.Tensor) and any(_holds(dim, columns) for dim in val.shape)


def _holds(dim: object, columns: object) -> bool:
    symbolic = isinstance(dim, torch.SymInt) and isinstance(columns, torch.SymInt)
    return symbolic and columns.node.expr.free_symbols <= dim.node.expr.free_symbols  # type: ignore[attr-defined]


def is_rows(node: fx.Node, columns: object) -> bool:
    """Whether the value is [B, T, ...] with three axes."""
    val = node.meta.get("val")
    return isinstance(val, Tensor) and val.dim() == 3 and is_size(val.shape[1], columns)


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
        return not is_size(node.args[0].meta["val"].shape[node.args[1]], columns) or tuple(node.args[2:]) == (0, FULL)
    return is_op(
        node,
        ATEN.reshape,
        ATEN.view,
        ATEN.transpose,
        ATEN.unsqueeze,
        ATEN.squeeze,
        ATEN.expand,
        ATEN.add,
        ATEN.mul,
        ATEN.pow,
        ATEN.rsqrt,
    )


def last_only(node: fx.Node) -> bool:
    """x[:, -1:] or x[:, -1]"""
    return (is_op(node, ATEN.slice) and tuple(node.args[1:]) == (1, -1, FULL)) or (
        is_op(node, ATEN.select) and tuple(node.args[1:]) == (1, -1)
    )


def last_row(editor: Editor, state: State, before: fx.Node) -> fx.Node:
    """Index [B, 1] of each prompt's last row."""
    less = editor.call(ATEN.sub.Tensor, state.lengths, 1, before=before, like=before)
    return editor.call(ATEN.unsqueeze, less, 1, before=before, like=before)


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
