"""A region's code runs only for sizes that its guards hold for; for others it is compiled once more, or not at all."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.source import ConstantSource
from torch._inductor.codegen.simd import SIMDScheduling
from torch._inductor.sizevars import SizeVarAllocator
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from specpass.lowering import variants
from specpass.lowering.inductor import called_with, compile_region
from specpass.lowering.regions import close

COLUMNS, FEATURES = 12, 14336
HIDDEN = torch.ops.aten.mul.Tensor


@pytest.fixture(scope="module")
def by_length() -> Iterator[Any]:
    """An operator whose decomposition asks how long its input is, as Inductor asks whether an index fits int32."""
    library = torch.library.Library("specpass_guards", "FRAGMENT")
    library.define("by_length(Tensor x) -> Tensor")
    library.impl("by_length", lambda x: x * 2 if x.shape[1] <= COLUMNS else x * 3, "CompositeImplicitAutograd")
    yield torch.ops.specpass_guards.by_length.default
    library._destroy()


def graph_of(target: Any, shape: tuple[int, int] = (2, 5), *rest: Any) -> fx.GraphModule:
    """`target(x, *rest)` as a graph; x [B, S, 1] is symbolic in its first two sizes."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC] * 2 + [DimDynamic.STATIC])
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["val"] = mode.from_tensor(torch.zeros(*shape, 1), symbolic_context=context, source=ConstantSource("x"))
    call = graph.call_function(target, (x, *rest))
    call.meta["val"] = x.meta["val"].clone()
    graph.output(call)
    return fx.GraphModule({}, graph)


def compiled(gm: fx.GraphModule, hints: Any = None, notes: list[str] | None = None) -> Callable[..., Any]:
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    return compile_region(gm, close(nodes), hints, [].append if notes is None else notes.append)


def test_code_runs_only_where_its_guards_hold(by_length: Any) -> None:
    """Without guards the code for short inputs would run on long ones."""
    for _ in ("compiled", "found in Inductor's caches"):
        notes: list[str] = []
        run = compiled(graph_of(by_length), notes=notes)
        for shape, factor in (((2, COLUMNS), 2), ((3, COLUMNS + 1), 3), ((7, 40), 3), ((7, 4), 2), ((2, COLUMNS), 2)):
            assert torch.equal(run(torch.ones(*shape, 1))[0], torch.full((*shape, 1), float(factor)))
        assert notes == [
            "a region was compiled once more: its code takes size_1 <= 12 for granted, and a call had size_1 = 13"
        ]


def test_nothing_is_asked_where_code_takes_nothing_for_granted() -> None:
    assert not isinstance(compiled(graph_of(HIDDEN, (2, 5), 2.0)), variants.Variants)


def test_a_batch_of_one_of_a_graph_that_dynamo_does_not_guard() -> None:
    """The draft is captured with sizes of its own, in code for two rows or more, and then called with one row."""
    run = compiled(graph_of(HIDDEN, (3, 5), 2.0), hints={})
    assert isinstance(run, variants.Variants)
    for rows in (3, 1, 2, 1):
        assert torch.equal(run(torch.ones(rows, 4, 1))[0], torch.full((rows, 4, 1), 2.0))
    assert len(run.variants) == 2


def test_a_subgraph_is_compiled_for_the_sizes_that_it_is_called_with() -> None:
    inside = graph_of(HIDDEN, (3, 1021), 2.0)
    outside = graph_of(HIDDEN, (7, 40), 2.0)
    outside.add_submodule("draft", inside)
    last = next(node for node in outside.graph.nodes if node.op == "call_function")
    with outside.graph.inserting_after(last):
        outside.graph.call_module("draft", (last,))
    hints = called_with(outside, "draft", None)
    assert sorted(hints.values()) == [7, 40]
    run = compiled(inside, hints)
    assert isinstance(run, variants.Variants)
    assert run.variants[0].guards.broken((7, 40)) is None


@pytest.fixture
def index_of_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the place of compilation, Inductor's choice of a CUDA kernel's index type, for [B, S, FEATURES] elements."""

    def compile_fx(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., str]:
        batch, columns = (dim.node.expr for dim in inputs[-1].shape[:2])
        env = inputs[-1].shape[0].node.shape_env
        with V.set_graph_handler(SimpleNamespace(sizevars=SizeVarAllocator(env))):  # type: ignore[arg-type]
            fits = SIMDScheduling.can_use_32bit_indexing(batch * columns * FEATURES, [])
        return lambda *_: "int32" if fits else "int64"

    monkeypatch.setattr(variants, "compile_fx", compile_fx)


@pytest.mark.usefixtures("index_of_inductor")
@pytest.mark.parametrize("hints", [(2, 60), (4, 40_000)])
def test_large_batches_are_counted_in_int64(hints: tuple[int, int]) -> None:
    """149,796 columns of 14,336 features are the most that an int32 counts; compiled for either side first."""
    run = compiled(graph_of(HIDDEN, hints, 2.0))
    beyond = 2**31 // FEATURES // 2 + 1
    for rows, columns in ((2, 60), (2, beyond - 1), (2, beyond), (4, 40_000), (2, 60)):
        index = run(torch.empty(rows, columns, 1, device="meta"))
        assert index == "int64" if rows * columns * FEATURES > 2**31 - 1 or hints[0] == 4 else index == "int32"


def one_length(length: int, rows: int, columns: int, x: torch.Tensor) -> tuple[torch.Tensor]:
    """Code that is specialised to one length."""
    return (x * length,)


def test_code_that_keeps_failing_is_not_compiled_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_fx(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        return functools.partial(one_length, int(inputs[-1].shape[1]))

    monkeypatch.setattr(variants, "compile_fx", compile_fx)
    notes: list[str] = []
    run = compiled(graph_of(HIDDEN, (2, 5), 100.0), notes=notes)
    for length in range(5, 12):
        expected = length if length < 5 + variants.MOST else 100  # the region itself
        assert float(run(torch.ones(2, length, 1))[0][0, 0]) == expected
    assert len(notes) == variants.MOST
    assert notes[-1] == (
        "a region was compiled 4 times, and runs uncompiled for other sizes: its code takes Eq(size_1, 8) for granted, "
        "and a call had size_1 = 9"
    )
