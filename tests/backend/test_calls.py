"""What a call leaves on the cache's storage for the graph of the next step."""

from __future__ import annotations

import pytest
import torch

from specpass.backend.calls import DYNAMIC_MARKS, Call


@pytest.mark.parametrize("mark", DYNAMIC_MARKS)
def test_layers_do_not_get_a_symbol_each(mark: str) -> None:
    """Compiled layers mark sizes that were symbols, and Dynamo would give each of them its own in the next graph."""
    storages = [torch.zeros(1, 20, 4) for _ in range(4)]
    for storage in storages:
        setattr(storage, mark, {1})
    Call(list, "prefill", {}, static=dict.fromkeys(range(4), 2))._mark_sizes(storages)
    assert [hasattr(storage, mark) for storage in storages] == [False] * 4
    assert [storage._dynamo_static_indices for storage in storages] == [{2}] * 4  # of D, which stays a constant
