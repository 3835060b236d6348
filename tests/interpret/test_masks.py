"""A mask is read by its values; what is neither causal nor as configured keeps its site exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import specpass.ops  # noqa: F401  (binds the operators)
from specpass.interpret.masks import difference
from specpass.interpret.rows import Packing, behind
from specpass.sizes import FULL, Span

PADS = st.lists(st.integers(0, 4), min_size=1, max_size=3)


def mask_of(real: Tensor, span: Span) -> Tensor:
    size = real.shape[1]
    position = (real.cumsum(1) - 1)[:, None]
    row, column = position[..., :, None], position[..., None, :]
    mask = torch.ones(size, size, dtype=torch.bool).tril() & (real != 0)[:, None, None, :]
    if span.sliding:
        mask = mask & (row - column < span.sliding)
    if span.chunk:
        mask = mask & (row // span.chunk == column // span.chunk)
    return mask


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 9), PADS, st.sampled_from([0, 2, 3, 20]), st.booleans())
def test_meaning(size: int, pads: list[int], bound: int, added: bool) -> None:
    real = torch.ones(len(pads), size, dtype=torch.int64)
    for row, pad in enumerate(pads):
        real[row, : min(pad, size - 1)] = 0
    seen = None if bool(real.all()) else real != 0
    for span in (FULL, Span(sliding=bound), Span(chunk=bound)):
        mask = mask_of(real, span)
        given_mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min) if added else mask
        for rows in (size, 1):  # a layer that shares keys may compute the last rows alone
            assert difference(given_mask[:, :, -rows:], seen, rows, size, span) == ""
        wrong = mask.clone()
        wrong[:, :, -1, -1] = False
        assert "configured" in difference(wrong, seen, size, size, span)


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (torch.ones(1, 4, 5, 5, dtype=torch.bool), "shape"),
        (torch.ones(1, 1, 5, 6, dtype=torch.bool), "shape"),
        (torch.ones(1, 1, 5, 5, dtype=torch.bool), "configured"),
        (torch.full((1, 1, 5, 5), 0.5), "bias"),
    ],
)
def test_what_is_not_understood(mask: Tensor, reason: str) -> None:
    assert reason in difference(mask, None, 5, 5, FULL)


@pytest.mark.parametrize("span", [FULL, Span(sliding=3)])
def test_blocks_that_see_each_other(span: Span) -> None:
    mask = mask_of(torch.ones(1, 8, dtype=torch.int64), span)
    mask[:, :, 1:6, 1:6] = True
    assert difference(mask, None, 8, 8, span, blocks=True) == ""
    assert "configured" in difference(mask, None, 8, 8, span)
    if span != FULL:  # reads further back, and nobody sees it in turn: no block
        mask[:, :, 6, 0] = True
        assert "configured" in difference(mask, None, 8, 8, span, blocks=True)
    mask = mask_of(torch.ones(1, 8, dtype=torch.int64), Span(sliding=3))
    mask[:, :, 4:, 4:] = True  # what comes behind reads as the last row does
    assert "configured" in difference(mask, None, 8, 8, Span(sliding=3), blocks=True)


def test_packing() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    states = torch.arange(8.0).view(2, 1, 4, 1)
    packing = Packing.of(states[:, 0], mask)
    assert packing.lengths.tolist() == [2, 4]
    assert packing.states(states)[0, 0, :2, 0].tolist() == [2.0, 3.0]
    rows = torch.tensor([[-1, 0, 1], [1, 2, 3]])
    assert packing.take(states, rows)[:, 0, 1:, 0].tolist() == [[2.0, 3.0], [6.0, 7.0]]
    longer = behind(packing.states(states), torch.full((2, 1, 2, 1), 9.0), packing.lengths)
    assert longer[0, 0, :4, 0].tolist() == [2.0, 3.0, 9.0, 9.0]
    assert longer[1, 0, :, 0].tolist() == [4.0, 5.0, 6.0, 7.0, 9.0, 9.0]
    assert Packing.of(states[:, 0], torch.ones(2, 4)).order is None
