"""Masks by meaning: whatever the window's size, whatever the spelling, padding or none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

from specpass.graph.operands import results_of
from specpass.passes.facts import Inputs
from specpass.passes.read.masks import mask_span
from specpass.sizes import Span

Rule = Callable[[Tensor, Tensor], Tensor]  # (query positions [.., 1], key positions [1, ..]) -> bool


def causal(q: Tensor, k: Tensor) -> Tensor:
    return k <= q


def found(rule: Rule, padding: bool) -> Span | str:
    """What is read of the mask [B, 1, S, S] that a model makes by `rule`, with symbolic B and S."""

    def make(ids: Tensor, mask: Tensor) -> Tensor:
        column = torch.arange(ids.shape[1])
        kept = rule(column[:, None], column[None, :])[None, None].expand(ids.shape[0], 1, -1, -1)
        return kept & mask.bool()[:, None, None, :] if padding else kept.clone()

    mode = FakeTensorMode(shape_env=ShapeEnv())
    context = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DUCK] * 2)
    ids, mask = (
        mode.from_tensor(torch.ones(3, 1021, dtype=torch.int64), symbolic_context=context, source=ConstantSource(name))
        for name in ("ids", "mask")
    )
    with mode:
        graph = make_fx(make, pre_dispatch=True)(ids, mask).graph
    first, second = graph.find_nodes(op="placeholder")
    node: fx.Node = results_of(graph)[0]
    return mask_span(node, Inputs(first, second))


@settings(max_examples=12, deadline=None)
@given(bound=st.one_of(st.integers(2, 9), st.integers(10, 1 << 20)), padding=st.booleans())
def test_windows_and_chunks_of_any_size(bound: int, padding: bool) -> None:
    assert found(lambda q, k: causal(q, k) & (k > q - bound), padding) == Span(sliding=bound)
    assert found(lambda q, k: causal(q, k) & (q - k < bound), padding) == Span(sliding=bound)
    if not padding:  # with padding, chunks begin at each row's first token
        assert found(lambda q, k: causal(q, k) & (q // bound == k // bound), padding) == Span(chunk=bound)


@pytest.mark.parametrize("padding", [True, False])
def test_causal_and_what_is_none_of_them(padding: bool) -> None:
    assert found(causal, padding) == Span()
    strangers: tuple[Any, ...] = (
        lambda q, k: (q - k).abs() < 4,  # looks ahead
        lambda q, k: causal(q, k) | (k < 3),  # a prefix
        lambda q, k: causal(q, k) & ((q - k) % 2 == 0),  # dilated
    )
    for rule in strangers:
        assert found(rule, padding) == "unknown: neither causal nor a sliding window nor chunks"


def test_two_numbers_are_told_apart() -> None:
    assert found(lambda q, k: causal(q, k) & (q - k < 4096) & (q - k < 512), False) == Span(sliding=512)
    chunked = found(lambda q, k: causal(q, k) & (q // 8192 == k // 8192) & (q - k < 100_000), False)
    assert chunked == Span(chunk=8192)
