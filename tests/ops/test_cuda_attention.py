"""A prefill's attention on CUDA: one call of flash attention for all heads, without a GPU by what is called."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from specpass.dialect.define import SPEC
from specpass.kernels.attention import modified_attention
from specpass.kernels.dispatch import choose
from specpass.ops import attention

B, H, K, T, D = 2, 8, 2, 300, 64


def states(dtype: torch.dtype, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (torch.randn(B, T, heads, D, dtype=dtype, device=device).transpose(1, 2) for heads in (H, K, K))
    return query, key, value


def called(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, *options: Any) -> list[Any]:
    """What a prefill calls where CPU tensors count as CUDA's, whose numbers are checked."""
    given = states(dtype)
    expected = attention.prefill_attention(*given, 0.3, *options)
    found: list[Any] = []
    real = attention.F.scaled_dot_product_attention

    def sdpa(query: Tensor, *rest: Tensor, **how: Any) -> Tensor:
        found.append((tuple(query.shape), how.get("enable_gqa", False)))
        return real(query, *rest, **how)

    def windowed(query: Tensor, key: Tensor, value: Tensor, scale: float, sliding: int = 0) -> tuple[Tensor, Tensor]:
        found.append(sliding)
        row, column = torch.arange(T)[:, None], torch.arange(T)
        mask = (column <= row) & (row - column < (sliding or T))
        logits = query.float() @ key.float().repeat_interleave(H // K, 1).transpose(2, 3) * scale
        lse = logits.masked_fill(~mask, float("-inf")).logsumexp(-1)
        return modified_attention(query, key, value, mask[None, None], scale, 0.0, None), lse

    with monkeypatch.context() as patch:
        patch.setattr(attention, "on_cuda", lambda states: True)
        patch.setattr(attention, "returns_lse", lambda query, *rest: query.dtype == torch.bfloat16)
        patch.setattr(attention.F, "scaled_dot_product_attention", sdpa)
        patch.setattr(attention, "flash_on_cuda", windowed)
        out = attention.prefill_attention(*given, 0.3, *options)
    assert out.transpose(1, 2).is_contiguous()
    tolerance = 6e-2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance)
    return found


def test_one_call_for_all_members_of_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, torch.bfloat16) == [((B, H, T, D), True)]


def test_float32_goes_by_member_since_nothing_fused_takes_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, torch.float32) == [((B, K, T, D), False)] * (H // K)


def test_masked_rows_are_one_call_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    blocks = [attention.ROWS, T - attention.ROWS]
    expected = [((B, K, H // K * rows, D), False) for rows in blocks]
    assert called(monkeypatch, torch.bfloat16, 0.0, None, 0, 128) == expected
    assert called(monkeypatch, torch.float32, 0.0, None, 40, 0) == expected
    bias = torch.randn(1, H, T)
    assert called(monkeypatch, torch.float32, 0.0, None, 0, 0, bias) == expected


@pytest.mark.parametrize("sliding", [0, 40])
def test_windows_and_sinks_are_one_call(sliding: int, monkeypatch: pytest.MonkeyPatch) -> None:
    assert called(monkeypatch, torch.bfloat16, 0.0, torch.randn(H), sliding, 0) == [sliding]
    if sliding:
        assert called(monkeypatch, torch.bfloat16, 0.0, None, sliding, 0) == [sliding]


def test_the_operator_behind_a_window() -> None:
    with FakeTensorMode():
        out, lse = attention.flash_on_cuda(*states(torch.bfloat16, "cuda"), 0.3, 40)
    assert (out.shape, lse.shape, lse.dtype) == ((B, H, T, D), (B, H, T), torch.float32)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.usefixtures("triton_counts_as_installed")
def test_the_table_says_so() -> None:
    with FakeTensorMode():
        tensors = dict(zip(("query", "key", "value"), states(torch.bfloat16, "cuda"), strict=True))
    plain = {"scale": 0.3, "softcap": 0.0, "sinks": None, "chunk": 0, "bias": None}
    assert choose("prefill_attention", {**tensors, **plain, "sliding": 40}).reason.endswith("with a window")
    assert "256 query rows" in choose("prefill_attention", {**tensors, **plain, "sliding": 0, "chunk": 40}).reason


@pytest.mark.parametrize("heads", [1, H])
def test_a_group_in_the_querys_rows(heads: int) -> None:
    query, key, value = states(torch.float32)
    mask = torch.rand(1 if heads == 1 else B, heads, T, T) < 0.5
    mask |= torch.eye(T, dtype=torch.bool)
    found = attention.attention_folded(query, key, value, mask, scale=0.3)
    torch.testing.assert_close(found, modified_attention(query, key, value, mask, 0.3, 0.0, None), atol=1e-5, rtol=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", [(), (40, 0), (0, 128)], ids=["full", "window", "chunk"])
@pytest.mark.parametrize("sinks", [False, True])
def test_numbers_on_a_gpu(options: tuple[int, ...], sinks: bool) -> None:
    query, key, value = states(torch.bfloat16, "cuda")
    told = (0.0, torch.randn(H, device="cuda") if sinks else None, *options)
    expected = SPEC.prefill_attention(
        *(part.float().cpu() for part in (query, key, value)),
        0.3,
        0.0,
        None if told[1] is None else told[1].cpu(),
        *options,
    )
    found = SPEC.prefill_attention(query, key, value, 0.3, *told)
    torch.testing.assert_close(found.float().cpu(), expected, atol=6e-2, rtol=6e-2)
