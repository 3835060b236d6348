"""Attention of several sequences of one prompt, against attention of each over a storage of its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from specpass.dialect.define import SPEC
from specpass.kernels.decode.reference import attend

B, EACH, K, G, C, N, D = 2, 3, 2, 2, 20, 10, 16
CHANGES: dict[str, dict[str, Any]] = {
    "plain": {},
    "soft cap": {"softcap": 5.0},
    "sinks": {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "window": {"sliding": 7},
    "chunk": {"chunk": 8},
    "all of them": {"softcap": 5.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]), "sliding": 7},
}


def joined(prompt: Tensor, own: Tensor, counts: Tensor) -> Tensor:
    """[R, K, C + N, D]: each row's prompt, and its own slots right behind those in use."""
    whole = torch.cat([prompt.repeat_interleave(EACH, 0), torch.zeros_like(own)], 2)
    place = counts.repeat_interleave(EACH, 0)[..., None] + torch.arange(N)
    return whole.scatter(2, place[..., None].expand_as(own), own)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("count", "wide"), [(1, D), (3, 8)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_attention_over_both(change: str, count: int, wide: int, dtype: torch.dtype) -> None:
    """Values as wide as keys, or not."""
    dice = torch.Generator().manual_seed(0)

    def drawn(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=dice).to(dtype)

    rows, how = B * EACH, CHANGES[change]
    query, keys, values = drawn(rows, K * G, count, D), drawn(rows, K, N, D), drawn(rows, K, N, wide)
    theirs = drawn(B, K, C, D), drawn(B, K, C, wide)
    counts = torch.tensor([[20, 20], [0, 13]])  # a head that holds nothing of the prompt
    lengths = torch.tensor([4, 9, count, 10, 5, count])[:, None].expand(-1, K).contiguous()
    found = SPEC.attend_cascade(query, keys, values, lengths, [*theirs, counts], 0.25, **how)
    storage = (joined(prompt, own, counts).float() for prompt, own in zip(theirs, (keys, values), strict=True))
    due = attend(query.float(), *storage, counts.repeat_interleave(EACH, 0) + lengths, 0.25, **how)
    assert found.dtype == dtype
    torch.testing.assert_close(found.float(), due, **({} if dtype == torch.float32 else {"atol": 0.03, "rtol": 0.03}))
    torch.library.opcheck(
        SPEC.attend_cascade,
        (query, keys, values, lengths, [*theirs, counts], 0.25),
        how,
        test_utils=("test_schema", "test_faketensor"),
    )


def test_heads_with_budgets_of_their_own_lie_one_behind_the_other() -> None:
    """In a storage of two layers, of which this one is the second."""
    dice = torch.Generator().manual_seed(1)
    counts = torch.tensor([[9, 20], [16, 3]])
    starts = 7 + torch.tensor([[0, 9], [0, 16]])
    keys, values = (torch.randn(B, 40, D, generator=dice) for _ in range(2))
    dense = [torch.zeros(B, K, C, D) for _ in range(2)]
    for row in range(B):
        for head in range(K):
            start, used = int(starts[row, head]), int(counts[row, head])
            for whole, flat in zip(dense, (keys, values), strict=True):
                whole[row, head, :used] = flat[row, start : start + used]
    query, *own = (
        torch.randn(B * EACH, heads, size, D, generator=dice) for heads, size in ((K * G, 2), (K, N), (K, N))
    )
    lengths = torch.tensor([2, 5, 10, 3, 4, 7])[:, None].repeat(1, K)
    due = SPEC.attend_cascade(query, *own, lengths, [*dense, counts], 0.25)
    found = SPEC.attend_cascade(query, *own, lengths, [keys, values, counts, starts], 0.25, layers=2)
    torch.testing.assert_close(found, due)
