"""Experts behind the last attention site treat tokens one by one, though their operators sort and group them.

before: h [B, T, E] -> reshape [B * T, E] -> topk, sort, grouped products, index -> reshape [B, T, E]
after:  the same on take_positions(h, index) [B, M, E]

That no token's result depends on another is not read off the operators but found by running them: on a few random rows
with the model's own weights, some of them in another order must give the same rows.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.rows import has_rows, is_rows, keeps_rows, last_only
from specpass.graph.walk import ATEN, behind, depends, is_size
from specpass.passes.rows.indices import RowIndices
from specpass.rewrite import Refusal

ROWS, SOME = 5, (3, 0, 4)  # rows of the trial, and those that are run once more
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-8}  # relative to the largest number; 16 bits: 2e-2


@dataclasses.dataclass(frozen=True)
class Block:
    """`nodes` in graph order from the `entries` [B, T, ...] on, which they read, to the `exits` [B, T, ...]."""

    entries: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    exits: tuple[fx.Node, ...]


def take_in_front_of_blocks(
    editor: Editor, indices: RowIndices, weights: Mapping[fx.Node, Tensor], hidden: fx.Node, columns: object
) -> set[fx.Node]:
    """Take rows in front of blocks that sort them, and of what is added to their results; returns what stands behind.

    Raises: Refusal: positions are mixed.
    """
    tail = behind(hidden)
    start = next((node for node in editor.graph.nodes if node in tail and mixes(node, tail, columns)), None)
    if start is None or not isinstance(columns, torch.SymInt):
        return set()
    block = find_block(start, tail, columns)
    check_tokens_apart(editor.gm, block, weights, columns)
    place = hidden.next
    only_last = all(last_only(node) for node in ends(block.exits, columns))
    index = (indices.last if only_last else indices.every)(place)
    length = 1 if only_last else editor.call(ATEN.sym_size.int, index, 1, before=place)
    taken: dict[fx.Node, fx.Node] = {}

    def take(source: fx.Node) -> fx.Node:
        if source not in taken:
            before = max(source, place).next
            taken[source] = editor.call(SPEC.take_positions, source, index, before=before, like=source)
        return taken[source]

    for entry in block.entries:
        take(entry)
    exits = rebuild(editor, block, taken, columns, length)
    after = set().union(*map(behind, exits))
    for node in [n for n in editor.graph.nodes if n in after and n.op != "output"]:
        for source in node.all_input_nodes:
            if source not in after and source not in exits and is_rows(source, columns):
                node.replace_input_with(source, take(source))
        editor.refresh(node)
    takes = set(taken.values())
    return takes.union(*map(behind, takes))


def mixes(node: fx.Node, tail: set[fx.Node], columns: object) -> bool:
    """Whether a node behind the last attention site does something else to rows than take some or keep them apart."""
    if node.op == "output" or keeps_rows(node, columns):
        return False
    rows = [source for source in node.all_input_nodes if source in tail and has_rows(source, columns)]
    return any(source.meta["val"].dim() != 3 for source in rows)


def ends(starts: tuple[fx.Node, ...], columns: object) -> set[fx.Node]:
    """Where the rows of `starts` end: nodes that do not keep them, or the output."""
    found: set[fx.Node] = set()
    seen: set[fx.Node] = set()
    stack = [user for node in starts for user in node.users]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op == "output" or not keeps_rows(node, columns):
            found.add(node)
        else:
            stack.extend(node.users)
    return found


def find_block(start: fx.Node, tail: set[fx.Node], columns: torch.SymInt) -> Block:
    """The nodes around `start` between values [B, T, ...]; `tail` is what stands behind the last attention site.

    Raises: Refusal: what mixes rows is no such block.
    """
    entries: set[fx.Node] = set()
    inside: set[fx.Node] = set()
    exits: set[fx.Node] = set()
    work = [start]
    while work:
        node = work.pop()
        if node in inside:
            continue
        if node.op != "call_function":
            raise Refusal(f"{start.target} mixes positions behind the last attention site")
        inside.add(node)
        for source in node.all_input_nodes:
            if is_rows(source, columns):
                entries.add(source)
            elif depends(source.meta.get("val"), columns) and not is_length(source, columns):
                work.append(source)
        if is_rows(node, columns):
            exits.add(node)
        elif node in tail:
            work += node.users
    last = max(inside)
    if not exits or any(user < last for node in exits for user in node.users):
        raise Refusal(f"{start.target} mixes positions behind the last attention site")
    return Block(tuple(sorted(entries - inside)), tuple(sorted(inside)), tuple(sorted(exits)))


def is_length(node: fx.Node, columns: torch.SymInt) -> bool:
    """Whether the node is the number T itself."""
    return is_size(node.meta.get("val"), columns)


def check_tokens_apart(
    gm: fx.GraphModule, block: Block, weights: Mapping[fx.Node, Tensor], columns: torch.SymInt
) -> None:
    """Run the block on random rows, and on some of them in another order.

    Args: weights: real tensors of the graph's placeholders.

    Raises: Refusal: a row's result depends on other rows, or it cannot be run.
    """
    where = f"{block.nodes[0].target} ... {block.nodes[-1].target}"
    generator = torch.Generator().manual_seed(0)
    try:
        given = []
        for entry in block.entries:
            val = entry.meta["val"]
            batch = 1 if isinstance(val.shape[0], torch.SymInt) else val.shape[0]
            sizes = (batch, ROWS, *map(int, val.shape[2:]))
            given.append(torch.randn(sizes, generator=generator).to(val.device, val.dtype))
        with torch.no_grad():
            trial = _Trial(gm, block, weights, columns)
            every, some = trial.run(given), trial.run([rows[:, list(SOME)] for rows in given])
    except Exception as error:
        raise Refusal(f"{where} behind the last attention site cannot be tried on a few rows ({error})") from error
    for whole, part in zip(every, some, strict=True):
        expected = whole[:, list(SOME)].float()
        apart = (part.float() - expected).abs().max()
        if not apart <= TOLERANCE.get(whole.dtype, 2e-2) * expected.abs().max():
            raise Refusal(f"{where} mixes positions behind the last attention site")


class _Trial:
    """Evaluates a block for batch 1 and so many rows as it is given."""

    def __init__(
        self, gm: fx.GraphModule, block: Block, weights: Mapping[fx.Node, Tensor], columns: torch.SymInt
    ) -> None:
        self.gm, self.block, self.weights, self.columns = gm, block, weights, columns

    def run(self, rows: list[Tensor]) -> list[Tensor]:
        self.known: dict[fx.Node, Any] = dict(zip(self.block.entries, rows, strict=True))
        batch = self.block.entries[0].meta["val"].shape[0]
        columns = self.columns.node.expr
        (symbol,) = columns.free_symbols  # T is the prompt's length, or that and L more
        self.sizes = {symbol: rows[0].shape[1] - (columns - symbol)}
        if isinstance(batch, torch.SymInt):
            self.sizes[batch.node.expr] = 1
        for node in self.block.nodes:  # in order: what is written in place is written once
            self.value(node)
        return [self.known[node] for node in self.block.exits]

    def value(self, node: fx.Node) -> Any:
        if node not in self.known:
            val = node.meta.get("val")
            if isinstance(val, torch.SymInt):
                self.known[node] = int(val.node.expr.subs(self.sizes))
            elif node.op == "get_attr":
                self.known[node] = getattr(self.gm, str(node.target))
            elif node.op == "placeholder":
                self.known[node] = self.weights[node]
            else:
                args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.value)
                self.known[node] = node.target(*args, **kwargs)
        return self.known[node]


def rebuild(
    editor: Editor, block: Block, taken: dict[fx.Node, fx.Node], columns: torch.SymInt, length: fx.Node | int
) -> list[fx.Node]:
    """Put a copy of the block that reads `taken` [B, M, ...] in its place; returns what takes its exits' place.

    Args: length: M.
    """
    new: dict[fx.Node, Any] = dict(taken)
    place = block.nodes[-1].next

    def told(node: fx.Node) -> Any:
        return new[node] if node in new else length if is_length(node, columns) else node

    for node in block.nodes:
        with editor.graph.inserting_before(place):
            copy = editor.graph.node_copy(node, told)
        editor.refresh(copy)
        new[node] = copy
        if isinstance(copy.meta["val"], int):  # B * M where both are numbers
            new[node] = copy.meta["val"]
            editor.graph.erase_node(copy)
    for node in block.exits:
        node.replace_all_uses_with(new[node])
    for node in reversed(block.nodes):  # operators in place would not count as dead code
        if not node.users:
            editor.graph.erase_node(node)
    return [new[node] for node in block.exits]
