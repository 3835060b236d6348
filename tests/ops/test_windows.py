"""Attention that reads a window or a chunk, against the same with a mask of every column."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specpass.dialect.define import SPEC
from specpass.kernels.attention import modified_attention
from specpass.ops import attention

B, H, K, D = 2, 4, 2, 8
SPANS = st.one_of(st.tuples(st.integers(1, 40), st.just(0)), st.tuples(st.just(0), st.integers(1, 40)), st.just((0, 0)))


def reads(row: Tensor, column: Tensor, sliding: int, chunk: int) -> Tensor:
    """Which columns a row reads, by the definition."""
    mask = column <= row
    if sliding:
        mask = mask & (row - column < sliding)
    return mask & (row // chunk == column // chunk) if chunk else mask


def states(length: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    query, key, value = (torch.randn(B, heads, length, D, generator=generator) for heads in (H, K, K))
    return query, key, value


@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 60), span=SPANS, capped=st.booleans(), rows=st.sampled_from([7, 256]))
def test_a_prefill(length: int, span: tuple[int, int], capped: bool, rows: int) -> None:
    query, key, value = states(length, length)
    column = torch.arange(length)
    mask = reads(column[:, None], column, *span)[None, None]
    sinks = torch.randn(H) if capped else None
    expected = modified_attention(query, key, value, mask, 0.3, 2.0 * capped, sinks)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "ROWS", rows)  # several blocks of rows, or one
        found = SPEC.prefill_attention(query, key, value, 0.3, 2.0 * capped, sinks, *span)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    shown = attention.prefill_attention_onnx(query, key, value, 0.3, 2.0 * capped, sinks, *span)
    torch.testing.assert_close(shown, expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(used=st.integers(1, 50), count=st.integers(1, 5), span=SPANS)
def test_appended_queries(used: int, count: int, span: tuple[int, int]) -> None:
    """Slots hold neighbouring positions from a chunk's beginning on; rows of a batch hold unlike numbers of them."""
    count = min(count, used)
    query, key, value = states(64, used)
    query = query[:, :, :count]
    lengths = torch.tensor([[used] * K, [min(used + 7, 64)] * K])
    found = SPEC.attend(query, key, value, lengths, 0.3, 0.0, None, *span)
    shown = attention.attend_onnx(query, key, value, lengths, 0.3, 0.0, None, *span)
    for row in range(B):
        last = int(lengths[row, 0])
        own = torch.arange(last - count, last)
        mask = reads(own[:, None], torch.arange(64), *span)
        expected = F.scaled_dot_product_attention(
            query[[row]], key[[row]], value[[row]], attn_mask=mask, scale=0.3, enable_gqa=True
        )
        torch.testing.assert_close(found[[row]], expected, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(shown[[row]], expected, atol=1e-5, rtol=1e-4)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 40), min_size=2, max_size=4), chunk=st.integers(1, 12))
def test_what_a_chunk_keeps_of_a_prompt(lengths: list[int], chunk: int) -> None:
    found = SPEC.select_chunk(torch.tensor(lengths), K, chunk)
    for row, length in enumerate(lengths):
        own = [position for position in range(length) if position // chunk == length // chunk]
        assert found[row].tolist() == [own + [-1] * (chunk - len(own))] * K
