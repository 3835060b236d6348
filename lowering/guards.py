"""What a region's code takes for granted about the sizes that it is called with.

Inductor bakes answers to questions about sizes into its code (do 14336 * s0 * s1 elements fit an int32 index?) and
records each as a guard in the shape environment. Regions are compiled in an environment of their own, which nobody
else evaluates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import sympy
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.numbers import int_oo
from torch.utils._sympy.value_ranges import ValueRanges, bound_sympy


@dataclasses.dataclass(frozen=True)
class Guards:
    """Conditions over the sizes of a call, `names` in their order; those that always hold are left out."""

    names: tuple[sympy.Symbol, ...]
    conditions: tuple[sympy.Basic, ...]

    def broken(self, sizes: Sequence[int]) -> sympy.Basic | None:
        """The first condition that does not hold for these sizes."""
        known = {name: sympy.Integer(size) for name, size in zip(self.names, sizes, strict=True)}
        return next((each for each in self.conditions if each.xreplace(known) != sympy.true), None)


def read_guards(env: ShapeEnv, symbols: Sequence[sympy.Expr], sizes: Sequence[sympy.Expr], least: int) -> Guards:
    """The guards of code that was compiled in `env`.

    Args:
        symbols: what stands for each size in `env`: a symbol, which is at least 2 there, or the number itself.
        sizes: the same sizes as the graph around the region says them, which may relate them (K * P slots, and P).
        least: that graph's symbols are known to be at least this.
    """
    names = tuple(sympy.Symbol(f"size_{index}", integer=True, positive=True) for index in range(len(symbols)))
    renamed = {symbol: name for symbol, name in zip(symbols, names, strict=True) if symbol.is_Symbol}
    taken = [
        name >= 2 if symbol.is_Symbol else sympy.Eq(name, symbol) for symbol, name in zip(symbols, names, strict=True)
    ]
    stated = [*taken, *(guard.expr.xreplace(renamed) for guard in env.guards)]
    outside = dict(zip(names, sizes, strict=True))
    open_ones = [condition for condition in stated if not _always(condition.xreplace(outside), least)]
    return Guards(names, tuple(dict.fromkeys(open_ones)))


def _always(condition: sympy.Basic, least: int) -> bool:
    """Whether a condition holds for all symbols that are at least `least`."""
    if condition in (sympy.true, sympy.false):
        return condition == sympy.true
    ranges = {symbol: ValueRanges(least, int_oo) for symbol in condition.free_symbols}
    bound = bound_sympy(condition, ranges)
    return bound.is_singleton() and bound.lower == sympy.true
