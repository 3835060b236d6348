"""Attention of a prompt that reads a part of it, against the same with one mask of every column."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from specpass.dialect.define import SPEC
from specpass.kernels.cpu import prefill
from specpass.kernels.sparse import reference
from specpass.ops import sparse

B, H, K = 2, 4, 2


def case(lengths: list[int], ahead: int, width: int, dim: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, ...]:
    """Query, key, value, chosen columns and lengths of packed rows; a row may have fewer columns than are chosen."""
    generator = torch.Generator().manual_seed(seed)
    columns = max(lengths) + ahead
    query, key, value = (
        torch.randn(B, columns, heads, dim, generator=generator).to(dtype).transpose(1, 2) for heads in (H, K, K)
    )
    scores = torch.rand(B, K, columns, generator=generator)
    chosen = SPEC.select(scores, torch.tensor(lengths), width, 0, 1, "max")
    return query * 2, key, value, chosen, torch.tensor(lengths)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(3, 60), min_size=B, max_size=B),
    ahead=st.integers(1, 4),
    width=st.integers(1, 20),
    recent=st.integers(1, 20),
    rows=st.sampled_from([7, 256]),
    seed=st.integers(0, 999),
)
def test_aten(lengths: list[int], ahead: int, width: int, recent: int, rows: int, seed: int) -> None:
    given_ = case(lengths, ahead, width, 8, torch.float32, seed)
    expected = sparse.prefill_attention_sparse_onnx(*given_, 0.3, 3, ahead, recent)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "ROWS", rows)
        found = SPEC.prefill_attention_sparse(*given_, 0.3, 3, ahead, recent)
    for row, length in enumerate(lengths):  # what stands behind a row's lookahead is nobody's
        own = slice(0, length + ahead)
        torch.testing.assert_close(found[row, :, own], expected[row, :, own], atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(
    prefill.refuse(*case([40, 50], 1, 4, 32, torch.bfloat16, 0)[:3], 0.3) is not None,
    reason="neither AMX nor AVX-512, or no compiler",
)
@pytest.mark.parametrize(
    ("lengths", "width", "recent"),
    [([700, 411], 64, 64), ([700, 120], 70, 65), ([333, 300], 1, 1), ([500, 500], 200, 33), ([260, 40], 128, 128)],
)
def test_the_cpus_own(lengths: list[int], width: int, recent: int) -> None:
    given_ = case(lengths, 8, width, 64, torch.bfloat16, width)
    exact = (states.double() if states.is_floating_point() else states for states in given_)
    expected = sparse.prefill_attention_sparse_onnx(*exact, 0.125, 32, 8, recent)
    found = SPEC.prefill_attention_sparse(*given_, 0.125, 32, 8, recent)
    assert found.transpose(1, 2).is_contiguous()
    for row, length in enumerate(lengths):
        own = slice(0, length + 8)
        torch.testing.assert_close(found[row, :, own].double(), expected[row, :, own], atol=2e-2, rtol=2e-2)


def test_a_prompt_that_is_short_is_read_whole() -> None:
    query, key, value, chosen, lengths = case([30, 21], 4, 17, 8, torch.float32, 0)
    found = SPEC.prefill_attention_sparse(query, key, value, chosen, lengths, 0.3, 3, 4, 17)
    assert torch.equal(found, SPEC.prefill_attention(query, key, value, 0.3))
