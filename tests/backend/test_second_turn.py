"""A second turn with padding: masked tokens of an appended block are seen by nobody, in batches too."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, compile_eager, padded
from tiny import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import specpass
from specpass.errors import CacheStateError, MaskError, PositionsError

C, W = 24, 8
FIRST = [prompt(60, seed=1), prompt(43, seed=2), prompt(20, seed=3)]
NEW = [prompt(3, seed=4), prompt(6, seed=5), prompt(1, seed=6)]


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(), specpass.SnapKV(budget=C, window=W))


@pytest.fixture(scope="module")
def covering() -> Any:
    return compile_eager(tiny(), specpass.SnapKV(budget=4096, window=W))


def new_cache(model: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, model._specpass.backend.method, max_new_tokens=64)


def turns(model: Any, cache: Any, first: list[Tensor], new: list[Tensor], steps: int = 3) -> list[Tensor]:
    """Two turns, padded on the left, and a few tokens: logits [B, V] behind the second turn and each token."""
    ids, mask = padded(first)
    call(model, ids, cache, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0))
    found = []
    for number in range(steps + 1):
        ids, own = padded(new) if number == 0 else (torch.full((len(first), 1), 7 + number), torch.ones(len(first), 1))
        mask = torch.cat([mask, own.to(mask)], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        found.append(call(model, ids, cache, attention_mask=mask, position_ids=positions)[:, -1])
    return found


def test_within_the_budget_it_is_the_plain_models(covering: Any) -> None:
    ours = turns(covering, new_cache(covering), FIRST, NEW)
    twin = tiny()
    for logits, theirs in zip(ours, turns(twin, DynamicCache(config=twin.config), FIRST, NEW), strict=True):
        torch.testing.assert_close(logits, theirs, atol=1e-4, rtol=1e-4)


def test_rows_of_a_batch_are_those_of_the_row_alone(model: Any) -> None:
    cache = new_cache(model)
    together = turns(model, cache, FIRST, NEW)
    for row, (first, new) in enumerate(zip(FIRST, NEW, strict=True)):
        own = new_cache(model)
        alone = turns(model, own, [first], [new])
        for ours, theirs in zip(together, alone, strict=True):
            torch.testing.assert_close(ours[row], theirs[0], atol=1e-4, rtol=1e-4)
        assert cache.layers[0].lengths[row].tolist() == own.layers[0].lengths[0].tolist()
        assert own.layers[0].lengths[0, 0] == min(C, first.shape[1]) + new.shape[1] + 3


def test_generate_goes_on_from_a_padded_turn(model: Any) -> None:
    """generate computes the positions from the mask of the whole conversation."""
    first, mask = padded(FIRST)
    new, own = padded(NEW)
    cache = new_cache(model)
    call(model, first, cache, attention_mask=mask)
    whole, ids = torch.cat([mask, own], 1), torch.cat([first, new], 1)
    options = {"max_new_tokens": 4, "do_sample": False}
    ours = model.generate(ids, attention_mask=whole, past_key_values=cache, **options)[:, ids.shape[1] :]
    for row in range(3):
        alone = new_cache(model)
        call(model, FIRST[row], alone)
        both = torch.cat([FIRST[row], NEW[row]], 1)
        theirs = model.generate(both, past_key_values=alone, **options)
        assert ours[row].tolist() == theirs[0, both.shape[1] :].tolist()


def test_a_graph_without_padding_has_no_mask(model: Any) -> None:
    cache, graphs = new_cache(model), len(specpass.report(model).graphs)
    call(model, FIRST[0], cache)
    for ids in (prompt(5), prompt(9), prompt(1)):
        seen = torch.ones(1, cache.get_seq_length() + ids.shape[1], dtype=torch.int64)
        call(model, ids, cache, attention_mask=seen)
        with_mask = len(specpass.report(model).graphs)
        call(model, ids, cache)
        assert len(specpass.report(model).graphs) == with_mask
    assert len(specpass.report(model).graphs) <= graphs + 3


def test_what_a_mask_cannot_say(model: Any) -> None:
    cache = new_cache(model)
    call(model, FIRST[0], cache)
    mask = torch.ones(1, 63, dtype=torch.int64)
    mask[0, 60] = 0
    with pytest.raises(PositionsError, match="position_ids"):
        call(model, prompt(3), cache, attention_mask=mask)
    for wrong in (mask[:, :2], mask[None, None]):
        with pytest.raises(MaskError, match="3 tokens are appended"):
            call(model, prompt(3), cache, attention_mask=wrong)
    call(model, prompt(3), cache, attention_mask=mask, position_ids=torch.tensor([[60, 60, 61]]))
    call(model, prompt(1), cache, position_ids=torch.tensor([[62]]))
    cache.crop(1)
    with pytest.raises(CacheStateError, match=r"at most 0, or call reset"):
        cache.crop(1)
    assert cache.layers[0].lengths.tolist() == [[C + 2, C + 2]]
