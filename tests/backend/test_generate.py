"""Generation as users do it: what they pass to generate() beside a prompt."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, check_answer, compile_eager, kept, padded, run
from tiny import PAD, prompt, tiny
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

import specpass

C, W = 40, 8


@pytest.fixture(scope="module")
def twin() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(), specpass.SnapKV(budget=C, window=W))


def test_without_an_attention_mask(model: Any) -> None:
    ids = prompt(70, seed=1)
    out = model.generate(ids, max_new_tokens=6, do_sample=False)
    assert out[:, 70:].tolist() == run(model, ids).tokens


def test_length_limits_by_other_names(model: Any) -> None:
    ids = prompt(70, seed=1)
    expected = run(model, ids, 6).tokens
    mask = torch.ones_like(ids)
    assert model.generate(ids, attention_mask=mask, max_length=76, do_sample=False)[:, 70:].tolist() == expected
    assert run(model, ids, 1).tokens == [expected[0][:1]]


class Collect(BaseStreamer):
    """Notes every token that generate() hands out."""

    def __init__(self) -> None:
        self.tokens: list[int] = []
        self.ended = False

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_a_streamer_sees_every_token(model: Any) -> None:
    ids, streamer = prompt(70, seed=2), Collect()
    expected = run(model, ids, 8, streamer=streamer)
    assert streamer.tokens == ids[0].tolist() + expected.tokens[0]
    assert streamer.ended


class StopAt(StoppingCriteria):
    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


def test_stopping_criteria(model: Any) -> None:
    ids = prompt(70, seed=3)
    stopped = run(model, ids, 20, stopping_criteria=StoppingCriteriaList([StopAt(75)]))
    assert stopped.tokens == [run(model, ids, 20).tokens[0][:5]]
    assert stopped.cache.get_seq_length() == 74


def sample(model: Any, ids: torch.Tensor, seed: int, mask: torch.Tensor | None = None) -> list[list[int]]:
    torch.manual_seed(seed)
    mask = torch.ones_like(ids) if mask is None else mask
    out = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=True, temperature=1.2, top_k=20)
    return out[:, ids.shape[1] :].tolist()


def test_sampling_is_reproducible(model: Any, twin: Any) -> None:
    long, short = prompt(70, seed=4, batch=2), prompt(C - 14, seed=4, batch=2)
    assert sample(model, long, 1) == sample(model, long, 1)
    assert sample(model, long, 1) != sample(model, long, 2)
    assert sample(model, short, 1) == sample(twin, short, 1)  # within the budget: the uncompiled model's own draws


def test_rows_that_end_early_are_padded() -> None:
    ids, mask = padded([prompt(30, seed=5), prompt(22, seed=6)])
    free = run(tiny(), ids, 12, mask).tokens
    eos = free[0][4]
    assert eos not in free[0][:4]
    ours, full = (
        model_with_eos(eos, compiled).generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for compiled in (True, False)
    )
    assert torch.equal(ours, full)
    assert ours[0, 30:].tolist()[:6] == [*free[0][:5], PAD]


def model_with_eos(eos: int, compiled: bool) -> Any:
    model = tiny(eos=eos)
    return compile_eager(model, specpass.SnapKV(budget=C, window=W)) if compiled else model


def test_padding_on_both_sides_of_the_budget_in_one_batch(model: Any, twin: Any) -> None:
    rows = [prompt(length, seed=length) for length in (80, C, 11)]
    ids, mask = padded(rows)
    ours = run(model, ids, 7, mask)
    for row, own in enumerate(rows):
        check_answer(ours, twin, own, kept(ours.cache, row), row)


def test_a_ratio_is_a_share_of_the_prompt(twin: Any) -> None:
    model, ids = compile_eager(tiny(), specpass.SnapKV(budget=0.5, window=W)), prompt(200, seed=7)
    ours = run(model, ids, 4)
    assert ours.cache.method.budget == 128  # 100 slots, rounded up
    assert kept(ours.cache)[0].shape == (2, 128)
    check_answer(ours, twin, ids, kept(ours.cache))


def test_a_lookahead_of_none_is_32_tokens_or_the_answers_length(twin: Any) -> None:
    """One prefill graph for all answers of 32 tokens or more; room is no constant of it."""
    model = compile_eager(tiny(), specpass.SpecKV(budget=C, window=W), tiny(seed=1, layers=1))
    assert specpass.BudgetCache(model.config, specpass.SpecKV(budget=C, window=W)).lookahead == 32
    for new in (3, 7):
        ours = run(model, prompt(70, seed=8), new)
        assert ours.cache.lookahead_ids.shape == (1, new)
        check_answer(ours, twin, prompt(70, seed=8), kept(ours.cache))
    graphs = len(prefills(model))
    for number in range(20):
        new = 32 + 97 * number
        ours = run(model, prompt(70 + number, seed=8), new, eos_token_id=list(range(128)))  # stops after one token
        assert ours.cache.lookahead_ids.shape == (1, 32)
        assert ours.tokens[0][0] == int(call(twin, prompt(70 + number, seed=8), None)[0, -1].argmax())
    assert len(prefills(model)) == graphs + 1


def prefills(model: Any) -> list[Any]:
    return [record for record in specpass.report(model).graphs if record.kind == "prefill"]


def test_a_sampled_draft_is_seeded_and_independent_of_its_batch() -> None:
    ids, draft = prompt(70, seed=9, batch=2), tiny(seed=1, layers=1)

    def lookahead(seed: int, *prompts: torch.Tensor) -> list[torch.Tensor]:
        method = specpass.SpecKV(budget=C, window=W, lookahead=8, temperature=1.5, seed=seed)
        model = compile_eager(tiny(), method, draft)
        caches = [specpass.BudgetCache(model.config, method, max_new_tokens=2) for _ in prompts]
        for own, cache in zip(prompts, caches, strict=True):
            call(model, own, cache)
        return [cache.lookahead_ids for cache in caches]

    first, again, alone = lookahead(1, ids, ids, ids[1:])
    assert torch.equal(first, again)
    assert torch.equal(first[1:], alone)
    assert not torch.equal(first, lookahead(2, ids)[0])


def test_no_cache_at_all_is_the_users_choice(model: Any, twin: Any) -> None:
    ids = prompt(70, seed=10)
    with pytest.warns(UserWarning, match="not a BudgetCache"):
        ours = model.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False)
    assert torch.equal(ours, twin.generate(ids, max_new_tokens=5, do_sample=False, use_cache=False))
