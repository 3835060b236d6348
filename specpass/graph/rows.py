"""What graphs say of rows [B, T, ...]: which values have them, and which operators keep them apart."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from specpass.graph.aten import Cat, Chunks, Reduction, Select, Slice
from specpass.graph.operands import GetItem
from specpass.graph.walk import ATEN, FULL, is_op, is_size, value

# Of a model that is spread over processes: every rank adds its summand to the same rows.
COLLECTIVES = (
    (torch.ops._c10d_functional.all_reduce, torch.ops._c10d_functional.wait_tensor)
    if torch.distributed.is_available()
    else ()
)
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
    ATEN.copy_,
    ATEN.silu,
    ATEN.gelu,
    ATEN.addmm,
    ATEN.mm,
    ATEN.type_as,
)
SHAPE_OPS = (
    ATEN.reshape,
    ATEN.view,
    ATEN.view_as,
    ATEN.reshape_as,
    ATEN.transpose,
    ATEN.permute,
    ATEN.unsqueeze,
    ATEN.squeeze,
    ATEN.stack,
    ATEN.expand,
    ATEN.add,
    ATEN.mul,
    ATEN.multiply,
    ATEN.divide,
    ATEN.subtract,
    ATEN.pow,
    ATEN.rsqrt,
)


def has_rows(node: fx.Node, columns: object) -> bool:
    """Whether the value, or an item of it, has the sequence axis, alone or flattened with the batch (B * T)."""
    val = node.meta.get("val")
    parts = val if isinstance(val, (list, tuple)) else [val]
    return any(isinstance(part, Tensor) and any(_holds(dim, columns) for dim in part.shape) for part in parts)


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
    if POINTWISE_TAGS in getattr(node.target, "tags", ()) or is_op(node, *ROW_OPS, *COLLECTIVES):
        return True
    reduction, cut, chunks, one = (view.match(node) for view in (Reduction, Slice, Chunks, Select))
    if reduction is not None:
        dims = reduction.dim if isinstance(reduction.dim, (list, tuple)) else [reduction.dim]
        shape = value(reduction.input).shape
        return all(isinstance(dim, int) and not _holds(shape[dim], columns) for dim in dims)
    if is_op(node, ATEN.repeat):
        return any(is_size(dim, columns) for dim in node.meta["val"].shape)
    if one is not None:
        return not _holds(value(one.input).shape[one.dim], columns)
    if chunks is not None:
        return not _holds(value(chunks.input).shape[chunks.dim], columns)
    joined = Cat.match(node)
    if joined is not None:
        return not any(_holds(value(part).shape[joined.dim], columns) for part in joined.tensors)
    if GetItem.match(node) is not None:  # of what keeps rows: a node that does not is stopped at
        return True
    if cut is not None:  # over another axis, or over all of this one
        whole = (cut.start, cut.end, cut.step) == (0, FULL, 1)
        return whole or not is_size(value(cut.input).shape[cut.dim], columns)
    return is_op(node, *SHAPE_OPS)


def last_only(node: fx.Node) -> bool:
    """x[:, -1:] or x[:, -1]"""
    cut, one = Slice.match(node), Select.match(node)
    if cut is not None:
        return (cut.dim, cut.start, cut.end, cut.step) == (1, -1, FULL, 1)
    return one is not None and (one.dim, one.index) == (1, -1)
