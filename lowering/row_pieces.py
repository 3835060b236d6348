"""What a layer computes of each row alone runs in pieces of rows, when a long prompt is read.

before: region(h, ...)                  attention and MLP; an MLP's values are [B, T, I] each
after:  o, ... = head(h, ...)           what mixes rows, and what that reads
        for each piece of rows: out[piece] = tail(o[piece], h[piece], ...)       values [1, rows, I]

The peak of a prefill is then a layer's attention and no MLP of the whole prompt. A piece's rows may be of any prompt of
the batch: [B, T, E] is read as [1, B * T, E]. Steps are called without: their few rows would pay for two calls a layer.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from specpass.dialect.linear import LinearRows
from specpass.graph.aten import Written
from specpass.graph.rows import keeps_rows
from specpass.graph.walk import depends, is_size, value
from specpass.lowering.regions import Region, close
from specpass.lowering.restate import symbolic_sizes

CPU_PIECE = 80 << 20  # bytes of a piece's widest value on a CPU, where some stay for the next (kernels/cpu/blocks.py)
PIECE = 512 << 20  # and elsewhere: 18,000 rows of an MLP of 14,336 in 16 bits, enough for any product's full rate


@dataclasses.dataclass(frozen=True)
class Split:
    """A region in two, and what pieces of `tail` are given.

    Attributes:
        takes: one character for each input of the tail: "r" rows, "b" how many prompts, "t" how many columns,
            "w" what has neither.
        most: rows of a piece, at most.
    """

    head: Region
    tail: Region
    takes: str
    most: int

    def piece(self) -> tuple[list[Any], list[int]]:
        """The tail's inputs, its rows contiguous, and what each of their symbolic sizes is in a piece."""
        given = zip(map(value, self.tail.inputs), self.takes, strict=True)
        values = [val.new_empty(val.shape) if take == "r" else val for val, take in given]
        columns = next(val.shape[1] for val, take in zip(values, self.takes, strict=True) if take == "r")
        return values, [self.most if is_size(size, columns) else 1 for size, _ in symbolic_sizes(values)]


def split_rows(region: Region) -> Split | None:
    """None where nothing of the region is worth pieces, or something in it counts on all rows together."""
    states = next((val for val in map(value, region.inputs) if isinstance(val, Tensor) and val.dim() == 3), None)
    if states is None or not isinstance(states.shape[1], torch.SymInt):
        return None
    batch, columns = states.shape[:2]
    tail = row_wise(region.nodes, batch, columns)
    widest = max(map(row_bytes, tail), default=0)
    if widest <= states.shape[2] * states.element_size():
        return None  # no value is wider than the hidden states
    inside = set(tail)
    written = [view.input for view in map(Written.match, region.nodes) if view is not None]
    if any(node not in inside and depends(value(node), columns) for node in written):
        return None  # a piece may be a copy, which would be written in the place of the rows
    head, rest = close([node for node in region.nodes if node not in inside]), close(tail)
    takes = "".join(kind_of(node, batch, columns) for node in rest.inputs)
    return None if "?" in takes else Split(head, rest, takes, piece_rows(widest, states.device.type))


def piece_rows(row_bytes: int, device: str) -> int:
    """Rows of a piece, at most, whose widest value has `row_bytes` bytes a row."""
    return max((CPU_PIECE if device == "cpu" else PIECE) // row_bytes, 2)


def row_wise(nodes: Sequence[fx.Node], batch: Any, columns: torch.SymInt) -> list[fx.Node]:
    """Nodes [B, T, ...], each row made of the same row alone, that no other node of `nodes` reads, in order."""
    region, found = set(nodes), set[fx.Node]()
    for node in reversed(nodes):
        rows = [source for source in node.all_input_nodes if depends(value(source), columns)]
        alike = all(has_only_rows(each, batch, columns) for each in (node, *rows))
        readers = [user for user in node.users if user in region]
        if alike and rows and (keeps_rows(node, columns) or LinearRows.is_call(node)) and found.issuperset(readers):
            found.add(node)
    return [node for node in nodes if node in found]


def parts_of(node: fx.Node) -> Sequence[Any]:
    """A node's value, or the items of it (a layer's gate and up, cut from one product)."""
    val = value(node)
    return val if isinstance(val, (list, tuple)) else [val]


def has_only_rows(node: fx.Node, batch: Any, columns: torch.SymInt) -> bool:
    """Whether the value, or each item of it, is [B, T, any]."""
    tensors = [part for part in parts_of(node) if isinstance(part, Tensor) and part.dim() == 3]
    alike = all(is_size(part.shape[1], columns) and same(part.shape[0], batch) for part in tensors)
    return alike and len(tensors) == len(parts_of(node))


def row_bytes(node: fx.Node) -> int:
    return sum(part.shape[2] * part.element_size() for part in parts_of(node))


def kind_of(node: fx.Node, batch: Any, columns: torch.SymInt) -> str:
    """See Split.takes; "?" for what pieces cannot be given."""
    val = value(node)
    if isinstance(val, Tensor) and has_only_rows(node, batch, columns):
        return "r"
    if isinstance(val, Tensor):
        return "w" if all(isinstance(size, int) for size in (*val.shape, *val.stride())) else "?"
    if is_size(val, columns):
        return "t"
    return "b" if same(val, batch) else "?"


def same(size: Any, batch: Any) -> bool:
    """Whether a first axis is the batch: a symbolic size, or one prompt (another number would be all prompts')."""
    return is_size(size, batch) if isinstance(batch, torch.SymInt) else type(size) is int and size == batch == 1


class Pieces:
    """A split region's callable.

    Args:
        head, tail: take what `split`'s regions take, and return what these return; `tail` of one prompt's rows.
        split, region: what was split, for where each value comes from and goes to.
    """

    def __init__(self, head: Callable[..., Any], tail: Callable[..., Any], split: Split, region: Region) -> None:
        self.head, self.tail, self.takes, self.most = head, tail, split.takes, split.most
        whole = {node: index for index, node in enumerate(region.inputs)}
        made = {node: len(whole) + index for index, node in enumerate(split.head.outputs)}
        last = {node: len(whole) + len(made) + index for index, node in enumerate(split.tail.outputs)}
        self.head_reads = [whole[node] for node in split.head.inputs]
        self.tail_reads = [(whole | made)[node] for node in split.tail.inputs]
        self.returns = [(made | last)[node] for node in region.outputs]

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        values = [*args, *self.head(*[args[index] for index in self.head_reads])]
        values += self._by_rows([values[index] for index in self.tail_reads])
        return tuple(values[index] for index in self.returns)

    def _by_rows(self, given: list[Any]) -> list[Tensor]:
        batch, columns = given[self.takes.index("r")].shape[:2]
        rows = batch * columns
        flat = [
            v.contiguous().view(1, rows, -1) if take == "r" else v for v, take in zip(given, self.takes, strict=True)
        ]
        count = -(-rows // self.most)
        ends = [rows * index // count for index in range(count + 1)]  # pieces of one length, or two that are neighbours
        made = [self.tail(*self._piece(flat, *bounds)) for bounds in itertools.pairwise(ends)]
        outs = made[0] if count == 1 else [torch.cat(parts, 1) for parts in zip(*made, strict=True)]
        return [out.reshape(batch, columns, -1) for out in outs]

    def _piece(self, flat: list[Any], start: int, end: int) -> list[Any]:
        sizes = {"b": 1, "t": end - start}
        return [
            v[:, start:end] if take == "r" else sizes.get(take, v) for v, take in zip(flat, self.takes, strict=True)
        ]
