"""What a layer computes of each row alone runs in pieces of rows, and nobody notices."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from graphs import SNAPKV, SPECKV
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from traces import prompt_graph, step_graph

from specpass.graph.walk import value
from specpass.lowering import row_pieces
from specpass.lowering.inductor import compile_region, extract
from specpass.lowering.regions import Region, close, find_regions
from specpass.lowering.row_pieces import Pieces, split_rows

E, WIDE = 8, 24


def layer(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A causal mean in the place of attention, and an MLP."""
    x = x + x.cumsum(1)
    return x + F.linear(F.silu(F.linear(x, up)), down)


def gated(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Gate and up are one product, as in Phi-3 and GLM."""
    gate, inner = F.linear(x + x.cumsum(1), torch.cat([up, up * 2])).chunk(2, -1)
    return x + F.linear(F.silu(gate) * inner, down)


def beside(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """The MLP reads what attention reads."""
    return x.cumsum(1) + F.linear(F.silu(F.linear(x, up)), down)


def mixed_behind(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up), down).cumsum(1)


def mixed_between(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up).cumsum(1), down)


def other_prompts(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up), down) + x[:1]


def by_prompt(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up), down) * x[:, :1]


def by_column(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return F.linear(F.linear(x, up), down) * x[0, :, :1]


def in_place(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x.add_(F.linear(F.linear(x, up), down))


def read_and_written(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    h = x * 2
    out = F.linear(F.linear(h, up), down)
    return out + h.mul_(3).cumsum(1)


def narrow(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    return x.cumsum(1) + F.linear(x, up[:E])


def weights() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(WIDE, E, generator=generator) / 4, torch.randn(E, WIDE, generator=generator) / 4


@functools.cache
def region_of(function: Callable[..., Tensor], batch: int = 2) -> tuple[fx.GraphModule, Region]:
    """`function` as a region: x [B, T, E], symbolic in its first two sizes (one prompt: in T)."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    sizes = [DimDynamic.DYNAMIC if batch > 1 else DimDynamic.STATIC, DimDynamic.DYNAMIC, DimDynamic.STATIC]
    context = StatelessSymbolicContext(dynamic_sizes=sizes)
    x = mode.from_tensor(torch.zeros(batch, 5, E), symbolic_context=context)
    gm = make_fx(function, pre_dispatch=True)(
        x, *(mode.from_tensor(weight, static_shapes=True) for weight in weights())
    )
    return gm, close([node for node in gm.graph.nodes if node.op == "call_function" and not number(node)])


def number(node: fx.Node) -> bool:
    return isinstance(value(node), torch.SymInt)


def tail_of(region: Region) -> list[str]:
    split = split_rows(region)
    return [] if split is None else [node.target.__name__.split(".")[0] for node in split.tail.nodes]  # type: ignore[union-attr]


def layers_of(graph: Any) -> list[Region]:
    return [close(found.nodes) for found in find_regions(graph.gm)]


def test_text() -> None:
    """From attention's output on: a layer of Llama's."""
    (region,) = layers_of(prompt_graph(SNAPKV).after("specialize"))
    names = tail_of(region)
    norm = ["to", "pow", "mean", "add", "rsqrt", "mul", "to", "mul"]
    assert names == ["linear", "add", *norm, "linear", "silu", "linear", "mul", "linear", "add"]


def test_a_product_of_gate_and_up_is_in_the_pieces() -> None:
    assert tail_of(region_of(gated)[1])[0] == "add"  # in front of both products
    assert tail_of(region_of(gated)[1]).count("linear") == 2


def test_count() -> None:
    regions = layers_of(prompt_graph(SPECKV, layers=3).after("specialize"))
    assert [tail.count("linear") for tail in map(tail_of, regions)] == [4] * 3


@pytest.mark.parametrize("function", [layer, gated, beside])
@given(batch=st.integers(1, 3), columns=st.integers(2, 9), most=st.integers(2, 9))
@settings(max_examples=25, deadline=None)
def test_numbers(function: Any, batch: int, columns: int, most: int) -> None:
    gm, region = region_of(function, batch)
    split = split_rows(region)
    assert split is not None
    called: list[int] = []
    tail = extract(gm, split.tail)

    def count(*args: Any) -> Any:
        rows = [arg.shape[:2] for arg in args if isinstance(arg, Tensor) and arg.dim() == 3]
        assert {tuple(shape) for shape in rows} == {(1, rows[0][1])}
        called.append(rows[0][1])
        return tail(*args)

    pieces = Pieces(extract(gm, split.head), count, split, region)
    pieces.most = most
    x = torch.randn(batch, columns, E, generator=torch.Generator().manual_seed(columns))
    given = {"x": x, "up": weights()[0], "down": weights()[1]}
    args = [given[node.name.removesuffix("_1")] for node in region.inputs]
    torch.testing.assert_close(pieces(*args), extract(gm, region)(*args), atol=1e-5, rtol=1e-5)
    assert sum(called) == batch * columns
    assert max(called) <= most
    assert len(called) == math.ceil(batch * columns / most)
    assert max(called) - min(called) <= 1


@pytest.mark.parametrize("family", ["qwen2", "smollm3", "gemma2", "falcon-alibi"])
def test_serves_models(family: str) -> None:
    options = {"layer_types": ("full_attention",) * 2} if family == "gemma2" else {}
    region = layers_of(prompt_graph(SNAPKV, layers=2, family=family, **options).after("specialize"))[0]
    linear, matmul = map(tail_of(region).count, ("linear", "matmul"))
    assert linear + matmul >= 3  # attention's projection and the MLP's


@pytest.mark.parametrize(
    "function", [mixed_behind, mixed_between, other_prompts, by_prompt, by_column, in_place, read_and_written, narrow]
)
def test_leaves_what_counts_on_other_rows_or_gains_nothing(function: Any) -> None:
    assert tail_of(region_of(function)[1]) == []


def test_leaves_steps_and_experts() -> None:
    assert not any(map(tail_of, layers_of(step_graph(SNAPKV).after("specialize"))))
    assert not any(map(tail_of, layers_of(prompt_graph(SNAPKV, family="mixtral").after("specialize"))))


def test_pieces_are_larger_where_a_product_needs_more_rows() -> None:
    assert row_pieces.piece_rows(2 * 14336, "cuda") > 18_000
    assert row_pieces.piece_rows(2 * 8960, "cpu") in range(4096, 8192)  # two pieces of 8,192 tokens


@pytest.mark.parametrize("batch", [1, 3])
def test_one_code_for_all_lengths_and_prompts(batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As Inductor compiles it: nothing is compiled anew where the last piece, or the batch, is another."""
    monkeypatch.setattr(row_pieces, "CPU_PIECE", 7 * WIDE * 4)
    gm, region = region_of(layer, batch)
    up, down = weights()
    notes: list[str] = []
    run = compile_region(gm, region, note=notes.append, prompt=True)
    assert isinstance(run, Pieces)
    for columns in (4, 7, 23, 100):
        x = torch.randn(batch, columns, E)
        args = [{"x_1": x, "up_1": up, "down_1": down}[node.name] for node in region.inputs]
        torch.testing.assert_close(run(*args)[0], layer(x, up, down), atol=1e-4, rtol=1e-4)
    assert not notes
