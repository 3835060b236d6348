"""One region, compiled once for each side of its guards that calls come from.

before: out = code(*args)                        whatever the sizes, whatever the code takes for granted
after:  out = (the first variant whose guards hold for args)(*args)
        none: one more is compiled, with the call's own sizes as hints; after MOST, the region runs op by op

Which variant runs is decided once for each tuple of sizes; a region whose guards hold for all sizes is called as it is.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx
from torch._guards import TracingContext, tracing
from torch._inductor import config
from torch._inductor.compile_fx import compile_fx

from specpass.graph.edit import copy_module
from specpass.graph.fakes import symbolic_mode
from specpass.lowering.guards import Guards, read_guards
from specpass.lowering.restate import Place, Size, restate, sizes_at, symbolic_sizes
from specpass.lowering.reuse_blocks import is_prompts, reusing_code

Run: TypeAlias = Callable[..., Any]
MOST = 4  # variants of a region; each takes seconds to compile
REMEMBERED = 4096  # tuples of sizes whose variant is known


@dataclasses.dataclass(frozen=True)
class Variant:
    run: Run
    guards: Guards


class Variants:
    """A region's callable.

    Args:
        graph: the region as a graph of its own, of `values`, the fake inputs with the sizes of the graph around it.
        hints: each symbolic size of `values` in the call that is compiled for.
        least: symbols of the graph around it are known to be at least this.
        name: of the layer, for notes.
        note: takes what there is to say to the user of later calls.
    """

    def __init__(
        self,
        graph: fx.GraphModule,
        values: Sequence[Size | Tensor],
        hints: Sequence[int],
        least: int,
        name: str,
        note: Callable[[str], None],
    ) -> None:
        self.graph, self.values, self.least, self.name, self.note = graph, values, least, name, note
        found = symbolic_sizes(values)
        self.sizes, self.places = [size for size, _ in found], [place for _, place in found]
        self.tag = torch.compiler.config.cache_key_tag  # see inductor.tagged
        self.chosen: dict[tuple[int, ...], Run] = {}
        self.lock = threading.Lock()
        self.gave_up = False
        self.variants = [self._compile(hints)]

    def __call__(self, *args: Any) -> Any:
        sizes = sizes_at(self.places, args)
        run = self.chosen.get(sizes)
        return (self._choose(sizes) if run is None else run)(*args)

    def callable(self) -> Run:
        """What to call: the code itself, where its guards hold for all sizes."""
        first = self.variants[0]
        return self if first.guards.conditions else first.run

    def _choose(self, sizes: tuple[int, ...]) -> Run:
        with self.lock:
            if len(self.chosen) >= REMEMBERED:
                self.chosen.clear()
            self.chosen[sizes] = run = self._find(sizes)
        return run

    def _find(self, sizes: tuple[int, ...]) -> Run:
        for variant in self.variants:
            if variant.guards.broken(sizes) is None:
                return variant.run
        said = self._reason(sizes)
        if len(self.variants) < MOST:
            with torch.no_grad(), torch.compiler.config.patch(cache_key_tag=self.tag):
                self.variants.append(self._compile(sizes))
            if self.variants[-1].guards.broken(sizes) is None:
                self.note(f"{self.name} was compiled once more: {said}")
                return self.variants[-1].run
        if not self.gave_up:
            times = len(self.variants)
            self.note(f"{self.name} was compiled {times} times, and runs uncompiled for other sizes: {said}")
        self.gave_up = True
        return self.graph.forward

    def _reason(self, sizes: tuple[int, ...]) -> str:
        """Why no variant serves these sizes."""
        guards = self.variants[-1].guards
        broken = guards.broken(sizes)
        assert broken is not None
        had = ", ".join(
            f"{name} = {size}" for name, size in zip(guards.names, sizes, strict=True) if name in broken.free_symbols
        )
        return f"its code takes {broken} for granted, and a call had {had}"

    def _compile(self, hints: Sequence[int]) -> Variant:
        """Inductor's code for the symbolic sizes of the inputs, with what it takes for granted."""
        mode = symbolic_mode()
        inputs, symbols = restate(self.values, self.sizes, hints, mode)
        graph = copy_module(self.graph)
        hidden = [place for place, symbol in zip(self.places, symbols, strict=True) if is_hidden(place, symbol)]
        first = [inputs[index].shape[axis] for index, axis in hidden]  # type: ignore[union-attr]
        add_numbers(graph, len(hidden))
        # A fused kernel keeps float32 between operators where the model rounds to bfloat16; it must not: the answers
        # are to be the uncompiled model's, and a draft's near-tie would go the other way.
        reusing = reusing_code() if is_prompts(self.values) else contextlib.nullcontext()
        with tracing(TracingContext(mode)), torch.no_grad(), config.patch(emulate_precision_casts=True), reusing:
            code = compile_fx(graph, [*first, *inputs])
        run = (lambda *args: code(*sizes_at(hidden, args), *args)) if hidden else code
        assert mode.shape_env is not None
        return Variant(run, read_guards(mode.shape_env, symbols, [size.node.expr for size in self.sizes], self.least))


def is_hidden(place: Place, symbol: sympy.Expr) -> bool:
    """Whether a symbol is a tensor's size and no input of its own.

    Inductor's caches key code by the guards over sizes that are inputs, as those of Dynamo's graphs all are: code with
    guards over others would be found again for any size.
    """
    return place[1] is not None and symbol.is_Symbol


def add_numbers(graph: fx.GraphModule, count: int) -> None:
    """Give the graph this many inputs more, in front of its own, which nothing reads."""
    with graph.graph.inserting_before(next(iter(graph.graph.nodes))):
        for index in range(count):
            graph.graph.placeholder(f"size_{index}")
    graph.recompile()
