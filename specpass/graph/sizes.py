"""Fake values of other sizes: one symbol's place taken by an expression, without running an operator."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import Tensor, fx

from specpass.graph.edit import fake_mode_of, quiet


class Substitution:
    """Puts `new` in the place of `symbol`: in numbers, in sizes and strides of tensors, in the items of lists.

    Hints follow: the hint of `new` comes from those of the graph's inputs, which stay what they are.
    """

    def __init__(self, gm: fx.GraphModule, symbol: sympy.Symbol, new: sympy.Expr) -> None:
        self.mode, self.symbol, self.new = fake_mode_of(gm), symbol, new
        self.sizes: dict[sympy.Expr, Any] = {}
        self.hints: dict[sympy.Expr, int | None] = {}
        for node in gm.graph.find_nodes(op="placeholder"):
            val = node.meta.get("val")
            for dim in val.shape if isinstance(val, Tensor) else (val,):
                if isinstance(dim, torch.SymInt):
                    self.hints.setdefault(dim.node.expr, dim.node.hint)

    def of(self, val: Any) -> Any:
        if isinstance(val, torch.SymInt):
            return self._size(val)
        if isinstance(val, Tensor):
            shape, stride = (tuple(map(self._size, dims)) for dims in (val.shape, val.stride()))
            with quiet(self.mode):
                return torch.empty_strided(shape, stride, dtype=val.dtype, device=val.device)
        if isinstance(val, (list, tuple)):
            return type(val)(self.of(item) for item in val)
        return val

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt) or self.symbol not in size.node.expr.free_symbols:
            return size
        expr = size.node.expr
        if expr not in self.sizes:
            longer = sympy.expand(expr.xreplace({self.symbol: self.new}))
            hint = longer.xreplace({symbol: hint for symbol, hint in self.hints.items() if hint is not None})
            env = self.mode.shape_env
            assert env is not None
            self.sizes[expr] = env.create_symintnode(longer, hint=int(hint) if hint.is_number else None)
        return self.sizes[expr]
