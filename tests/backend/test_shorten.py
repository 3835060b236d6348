"""A prompt shortened for another engine: the eager formulas' tokens, and what is refused."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tiny import tiny

import specpass
from specpass import errors
from specpass.testing import prompt as eager


@pytest.fixture(scope="module")
def draft() -> torch.nn.Module:
    return tiny()


def prompt(length: int) -> list[int]:
    return torch.randint(1, 128, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@pytest.mark.parametrize(("lowering", "lookahead"), [("eager", 1), ("eager", 3), ("inductor", 1)])
def test_the_eager_formulas_tokens(draft: torch.nn.Module, lowering: str, lookahead: int) -> None:
    how = eager.PromptScoring(window=8, kernel=5, neighbours=5, lookahead=lookahead)
    method = specpass.SpecPC(budget=32, **dataclasses.asdict(how))
    compressor = specpass.PromptCompressor(draft, method, lowering=lowering)
    for length, budget in ((90, 32), (70, 20)):
        ids = prompt(length)
        scores = eager.pooled(eager.prompt_scores(draft, torch.tensor([ids]), how), how)
        kept = compressor(ids, budget=budget)
        assert kept.positions == eager.choose(scores, budget, how)
        assert kept.ids == [ids[position] for position in kept.positions]


def test_a_prompt_that_fits_is_whole(draft: torch.nn.Module) -> None:
    compressor = specpass.PromptCompressor(draft, specpass.SpecPC(budget=64, window=8), lowering="eager")
    ids = prompt(64)
    assert compressor(ids) == compressor(ids, budget=1.0)
    assert compressor(ids).ids == ids


def test_what_is_refused(draft: torch.nn.Module) -> None:
    with pytest.raises(errors.UnsupportedCallError, match="SnapKV prunes the target's KV cache"):
        specpass.PromptCompressor(draft, specpass.SnapKV(budget=64))
    with pytest.raises(errors.UnsupportedCallError, match="positions='original'"):
        specpass.PromptCompressor(draft, specpass.SpecPC(budget=96, positions="original"))
    compressor = specpass.PromptCompressor(draft, specpass.SpecPC(budget=64, window=8), lowering="eager")
    with pytest.raises(errors.BudgetError, match="budget=8 is not larger than window=8"):
        compressor(prompt(90), budget=8)
    most = draft.config.max_position_embeddings
    with pytest.raises(errors.DraftContextError, match=f"reads at most {most}"):
        compressor([1] * most)
