"""Keys and values that a model makes of what it caches, column by column: of MLA's latents (arXiv 2405.04434).

That no column's result depends on another, or on where it stands, is not read off the operators but found by running
them on a few random columns. So it is found whether heads stay apart.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, fx

from specpass.graph.walk import value

COLUMNS, BATCH, MOST = 5, 2, 200  # of the trial; nodes between a cache and attention are fewer than MOST
HEADS, LENGTH = 1, 2  # axes of [B, K, T, D]


@dataclasses.dataclass(frozen=True)
class Made:
    """`nodes`, in graph order, that make `result` of the cached `sources` [B, K, T, D] and of weights."""

    result: fx.Node
    sources: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]

    @classmethod
    def of(cls, result: fx.Node, is_source: Callable[[fx.Node], bool]) -> Made | None:
        """None where something else goes into it, or nothing cached does."""
        sources: set[fx.Node] = set()
        nodes: set[fx.Node] = set()
        work = [result]
        while work:
            node = work.pop()
            if node in nodes or node in sources:
                continue
            if is_source(node):
                sources.add(node)
                continue
            if len(nodes) == MOST or not (node.op in ("call_function", "get_attr") or is_weight(node)):
                return None
            nodes.add(node)
            if not isinstance(node.meta.get("val"), (int, torch.SymInt)):  # a size may be read off the ids
                work += node.all_input_nodes
        return cls(result, tuple(sorted(sources)), tuple(sorted(nodes))) if sources else None

    def keeps_apart(self, axis: int) -> bool:
        """Whether what stands at a place of `axis` depends on what stands there in the sources, and not on the place.

        Raises: Exception: the nodes cannot be run on a few columns.
        """
        generator = torch.Generator().manual_seed(0)
        given = [self._random(source, generator) for source in self.sources]
        if len({rows.shape[axis] for rows in given}) != 1:
            return False
        weights = {node: self._random(node, generator) for node in self.nodes if is_tensor(node)}
        whole = self._run(given, weights)
        if whole.shape[axis] != given[0].shape[axis]:
            return False
        turned = self._run([rows.flip(axis) for rows in given], weights)
        others = [rows.clone() for rows in given]
        for rows in others:
            rows.select(axis, 0).add_(1.0)
        changed = self._run(others, weights)
        count = whole.shape[axis] - 1
        return near(turned.flip(axis), whole) and near(changed.narrow(axis, 1, count), whole.narrow(axis, 1, count))

    def _random(self, node: fx.Node, generator: torch.Generator) -> Tensor:
        val = value(node)
        shape = [self._size(dim) for dim in val.shape]
        return torch.randn(shape, generator=generator).to(val.device, val.dtype)

    def _size(self, size: Any) -> int:
        if isinstance(size, int):
            return size
        columns = value(self.sources[0]).shape[LENGTH]
        known = columns.node.expr.free_symbols if isinstance(columns, torch.SymInt) else ()
        expr = size.node.expr
        return int(expr.subs({symbol: COLUMNS if symbol in known else BATCH for symbol in expr.free_symbols}))

    def _run(self, given: Collection[Tensor], weights: dict[fx.Node, Tensor]) -> Tensor:
        env: dict[fx.Node, Any] = {**weights, **dict(zip(self.sources, given, strict=True))}
        with torch.no_grad():
            for node in self.nodes:
                if isinstance(value(node), (int, torch.SymInt)):
                    env[node] = self._size(value(node))
                elif node.op == "get_attr":
                    env[node] = getattr(node.graph.owning_module, str(node.target))
                elif node not in env:
                    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: env[n])
                    env[node] = node.target(*args, **kwargs)
        return env[self.result]


def is_tensor(node: fx.Node) -> bool:
    return node.op == "placeholder" and isinstance(value(node), Tensor)


def is_weight(node: fx.Node) -> bool:
    """Whether an input is a size, or a tensor of fixed shape: ids and positions are whole numbers."""
    if node.op != "placeholder":
        return False
    val = node.meta.get("val")
    if isinstance(val, Tensor):
        return val.is_floating_point() and all(isinstance(dim, int) for dim in val.shape)
    return isinstance(val, (int, torch.SymInt))


def near(ours: Tensor, theirs: Tensor) -> bool:
    if not theirs.numel():
        return True
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max())
