"""The inputs of a region in a shape environment of their own, so that its code depends on nothing around it.

What Inductor learns about sizes so stays out of the guards that Dynamo checks on each call; guards.py reads it from the
region's own environment.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic

Size: TypeAlias = int | torch.SymInt
Place: TypeAlias = tuple[int, int | None]  # an input and its axis, or an input that is a number
Hints: TypeAlias = Mapping[sympy.Symbol, int]  # sizes that a graph is called with, in place of those it was traced with


def symbolic_sizes(values: Sequence[Size | Tensor]) -> list[tuple[torch.SymInt, Place]]:
    """The distinct symbolic sizes of a region's inputs, and where a call finds each: a number, where there is one."""
    numbers = [(val, (index, None)) for index, val in enumerate(values) if not isinstance(val, Tensor)]
    tensors = [(index, val.shape) for index, val in enumerate(values) if isinstance(val, Tensor)]
    dims = [(dim, (index, axis)) for index, shape in tensors for axis, dim in enumerate(shape)]
    found: dict[sympy.Expr, tuple[torch.SymInt, Place]] = {}
    for size, place in (*numbers, *dims):
        if isinstance(size, torch.SymInt) and size.node.expr.free_symbols:
            found.setdefault(size.node.expr, (size, place))
    return list(found.values())


def sizes_at(places: Sequence[Place], args: Sequence[Any]) -> tuple[int, ...]:
    """The sizes that a call has at these places."""
    return tuple(int(args[index] if axis is None else args[index].shape[axis]) for index, axis in places)


def hint_of(size: torch.SymInt, hints: Hints) -> int:
    """What a size is in the call that is compiled for, as far as it is known, else where the graph was traced."""
    expr = size.node.expr
    known = expr.xreplace({symbol: sympy.Integer(hints[symbol]) for symbol in expr.free_symbols & hints.keys()})
    return int(known) if known.is_number else int(size.node.hint)


def restate(
    values: Sequence[Size | Tensor], sizes: Sequence[torch.SymInt], hints: Sequence[int], mode: FakeTensorMode
) -> tuple[list[Size | Tensor], list[sympy.Expr]]:
    """Fake inputs of `mode`: one fresh symbol for each of `sizes`, the distinct symbolic sizes of `values`.

    Args: hints: what each size is in the call that is compiled for.
    Returns: the inputs; what stands for each size: a symbol, or the number itself where it is 0 or 1.
    """
    env = mode.shape_env
    fresh: dict[sympy.Expr, Size] = {}
    symbols: list[sympy.Expr] = []
    for number, (old, hint) in enumerate(zip(sizes, hints, strict=True)):
        source = ConstantSource(f"size_{number}")
        symbols.append(env.create_symbol(hint, source, DimDynamic.DYNAMIC))
        fresh[old.node.expr] = env.create_symintnode(symbols[-1], hint=hint, source=source)

    def size(dim: Size) -> Size:
        if isinstance(dim, torch.SymInt) and dim.node.expr.free_symbols:
            return fresh[dim.node.expr]
        return int(dim)

    def tensor(val: Tensor) -> Tensor:
        shape = [size(dim) for dim in val.shape]
        order = sorted(range(val.dim()), key=lambda axis: val.stride(axis))
        stride: list[Size] = [0] * val.dim()
        step: Size = 1
        if any(isinstance(dim, torch.SymInt) for dim in val.stride()):
            for axis in order:  # dense in the order of the original strides
                stride[axis] = step
                step = step * shape[axis]
        else:
            stride = list(val.stride())
        return torch.empty_strided(shape, stride, dtype=val.dtype, device=val.device)

    with mode, torch.no_grad():
        return [tensor(val) if isinstance(val, Tensor) else size(val) for val in values], symbols
