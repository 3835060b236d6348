"""What a graph of Dynamo's takes for granted of its inputs, as something to write down and to check a call by."""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import Tensor
from torch._dynamo.source import TensorPropertySource
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from specpass.capture import stored
from specpass.lowering.guards import Guards
from specpass.lowering.restate import Place, sizes_at


class Unfit(Exception):
    """A kept graph's inputs are others than it was made for."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a graph takes for granted of its inputs.

    Attributes:
        fixed: of each tensor dtype, device, sizes (None where they are symbols) and strides (None: contiguous).
        places: of all symbolic sizes. guards: over these.
    """

    fixed: list[tuple[torch.dtype, str, tuple[int | None, ...], tuple[int, ...] | None] | None]
    places: list[Place]
    guards: Guards

    @classmethod
    def of(cls, values: list[Any]) -> Inputs:
        """Raises: Undescribed: a layout, or a condition over something else than these inputs."""
        fixed: list[Any] = []
        sizes: list[tuple[Any, Place]] = []
        env: ShapeEnv | None = None
        for index, val in enumerate(values):
            dims: list[tuple[Any, int | None]] = [(val, None)] if isinstance(val, torch.SymInt) else []
            if isinstance(val, Tensor):
                dims = [(dim, axis) for axis, dim in enumerate(val.shape) if isinstance(dim, torch.SymInt)]
                shape = tuple(None if isinstance(dim, torch.SymInt) else dim for dim in val.shape)
                if not val.is_contiguous() and dims:
                    raise stored.Undescribed
                fixed.append((val.dtype, str(val.device), shape, None if val.is_contiguous() else val.stride()))
            elif dims:
                fixed.append(None)
            else:
                raise stored.Undescribed
            for dim, axis in dims:
                sizes.append((dim.node.expr, (index, axis)))
                env = dim.node.shape_env
        return cls(fixed, [place for _, place in sizes], _guards(env, [expr for expr, _ in sizes]))

    def check(self, args: tuple[Any, ...], passed: set[tuple[int, ...]]) -> None:
        """Raises: Unfit. Args: passed: sizes that are known to fit; more are added."""
        for arg, fixed in zip(args, self.fixed, strict=False):
            if fixed is None:
                continue
            dtype, device, shape, strides = fixed
            fits = arg.dtype == dtype and str(arg.device) == device and arg.dim() == len(shape)
            fits = fits and all(own is None or own == size for own, size in zip(shape, arg.shape, strict=True))
            if not fits or not (arg.is_contiguous() if strides is None else arg.stride() == strides):
                raise Unfit
        sizes = sizes_at(self.places, args)
        if sizes not in passed:
            if self.guards.broken(sizes) is not None:
                raise Unfit
            passed.add(sizes)


def _guards(env: ShapeEnv | None, exprs: list[sympy.Expr]) -> Guards:
    """Conditions over sizes that a graph calls `exprs`.

    Raises: Undescribed: one over a symbol that is none of them.
    """
    names = tuple(sympy.Symbol(f"size_{index}", integer=True) for index in range(len(exprs)))
    if env is None:
        return Guards((), ())
    if env.deferred_runtime_asserts:
        raise stored.Undescribed
    first: dict[sympy.Expr, sympy.Expr] = {}
    for expr, name in zip(exprs, names, strict=True):
        if expr.is_Symbol:
            first.setdefault(expr, name)
    stated = [sympy.Eq(name, expr.xreplace(first)) for expr, name in zip(exprs, names, strict=True)]
    for symbol, name in first.items():
        span = env.var_to_range[symbol]
        stated += [name >= span.lower] if span.lower.is_number and span.lower.is_finite else []
        stated += [name <= span.upper] if span.upper.is_Integer else []
    stated += [env.replace(guard.expr).xreplace(_numbers(env) | first) for guard in env.guards]
    conditions = tuple(dict.fromkeys(each for each in stated if each != sympy.true))
    if not set().union(*(each.free_symbols for each in conditions)) <= set(names):
        raise stored.Undescribed
    return Guards(names, conditions)


def _numbers(env: ShapeEnv) -> dict[sympy.Expr, sympy.Expr]:
    """Symbols that stand for Python's numbers: the form of a call tells them, if they are no inputs of the graph."""
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    sources = {symbol: env.var_to_sources.get(symbol, []) for symbol in hints}
    plain = [each for each, own in sources.items() if own and not any(isinstance(s, TensorPropertySource) for s in own)]
    return {symbol: hints[symbol] for symbol in plain}
