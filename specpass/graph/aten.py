"""Views of the aten operators that passes match; names are the schemas' (`self` is `input`)."""

from __future__ import annotations

from typing import Any

from torch import fx

from specpass.graph.operands import Operands
from specpass.graph.walk import ATEN, VIEWS, is_op


class Sdpa(Operands, packets=[ATEN.scaled_dot_product_attention]):
    query: fx.Node  # [B, H, q, D]
    key: fx.Node  # [B, K or H, T, D]
    value: fx.Node
    attn_mask: fx.Node | None
    dropout_p: float
    is_causal: bool
    scale: float | None
    enable_gqa: bool


class Softmax(Operands, packets=[ATEN.softmax, ATEN._softmax]):
    input: fx.Node
    dim: int


class Matmul(Operands, packets=[ATEN.matmul]):
    input: fx.Node
    other: fx.Node


class Linear(Operands, packets=[ATEN.linear]):
    input: fx.Node  # [..., K]
    weight: fx.Node  # [N, K]
    bias: fx.Node | None  # [N]


class GroupedMm(Operands, packets=[ATEN._grouped_mm]):
    input: fx.Node  # [R, K], or a batch
    mat2: fx.Node  # [E, K, N]
    offs: fx.Node | None  # [E]
    bias: fx.Node | None
    out_dtype: Any


class Bmm(Operands, packets=[ATEN.bmm]):
    input: fx.Node
    mat2: fx.Node


class Baddbmm(Operands, packets=[ATEN.baddbmm]):
    input: fx.Node
    batch1: fx.Node
    batch2: fx.Node
    beta: Any
    alpha: Any


class Add(Operands, packets=[ATEN.add]):
    input: Any
    other: Any


class Sub(Operands, packets=[ATEN.sub]):
    input: Any
    other: Any


class Factor(Operands, packets=[ATEN.mul, ATEN.div]):
    input: Any
    other: Any

    @staticmethod
    def multiplies(node: fx.Node) -> bool:
        return is_op(node, ATEN.mul)


class Tanh(Operands, packets=[ATEN.tanh]):
    input: fx.Node


class Cat(Operands, packets=[ATEN.cat]):
    tensors: list[fx.Node]
    dim: int


class Copy(Operands, packets=[ATEN.copy_]):
    input: fx.Node
    src: fx.Node


class Where(Operands, packets=[ATEN.where]):
    condition: fx.Node
    input: Any
    other: Any


class MaskedFill(Operands, packets=[ATEN.masked_fill]):
    input: fx.Node
    mask: fx.Node
    value: Any


class Largest(Operands, packets=[ATEN.max, ATEN.amax]):
    input: fx.Node
    dim: Any  # a number (max) or a list of them (amax); None over all axes


class Reduction(Operands, packets=[ATEN.mean, ATEN.sum, ATEN.var, ATEN.softmax, ATEN.amax]):
    input: fx.Node
    dim: Any


class Chunks(Operands, packets=[ATEN.chunk, ATEN.split, ATEN.split_with_sizes, ATEN.unbind]):
    input: fx.Node
    dim: int


class Transpose(Operands, packets=[ATEN.transpose]):
    input: fx.Node
    dim0: int
    dim1: int


class Slice(Operands, packets=[ATEN.slice]):
    input: fx.Node
    dim: int
    start: Any
    end: Any
    step: Any


class Select(Operands, packets=[ATEN.select]):
    input: fx.Node
    dim: int
    index: Any


class Unsqueeze(Operands, packets=[ATEN.unsqueeze]):
    input: fx.Node
    dim: int


class Expand(Operands, packets=[ATEN.expand]):
    input: fx.Node


class View(Operands, packets=VIEWS):
    input: fx.Node


class Passive(Operands, packets=[ATEN.to, ATEN._to_copy, ATEN.dropout, ATEN.contiguous, ATEN.clone]):
    """Casts, dropout that is off, copies."""

    input: fx.Node


class Dropout(Operands, packets=[ATEN.dropout]):
    input: fx.Node
    train: bool


class Embedding(Operands, packets=[ATEN.embedding]):
    weight: fx.Node
    indices: fx.Node


class StorageView(Operands, packets=[*VIEWS, ATEN.unflatten]):
    """Another shape of the same memory, in the same order."""

    input: fx.Node


class MemoryView(Operands, packets=[*VIEWS, ATEN.unflatten, ATEN.transpose]):
    """Another look at the same memory."""

    input: fx.Node


class SameNumbers(
    Operands,
    packets=[*VIEWS, ATEN.unflatten, ATEN.flatten, ATEN.squeeze, ATEN.unsqueeze, ATEN.expand, ATEN.repeat, ATEN.slice],
):
    """Another shape of some or all of the same numbers, in the same order along each axis."""

    input: fx.Node


class Copied(Operands, packets=[ATEN.lift_fresh_copy, ATEN.detach_]):
    input: fx.Node


class Written(Operands):
    """Any call whose schema says that it writes its first operand, `self`."""

    input: fx.Node

    @classmethod
    def is_call(cls, node: object) -> bool:
        schema = getattr(getattr(node, "target", None), "_schema", None)
        return schema is not None and schema.is_mutable
