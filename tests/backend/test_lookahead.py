"""Any lookahead beside any prompt: L tokens in front of, at and far beyond S, whoever writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, check_answer, check_rules, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass

C, W = 12, 4
DRAFT = tiny(seed=1, layers=1)
CASES = [
    *(("speckv", "plain", 13, L) for L in (1, 13, 39)),
    *(("given", "compile", 21, L) for L in (20, 21, 22, 63)),
    ("ngram", "plain", 13, 3),
    ("speckvpc", "plain", 21, 22),
]


def method(kind: str, length: int) -> Any:
    if kind == "given":
        return specpass.SpecKV(budget=C, window=W, lookahead_ids=prompt(length, seed=3))
    if kind == "ngram":
        return specpass.SpecKV(budget=C, window=W, lookahead="ngram")
    if kind == "speckvpc":
        sizes = {"prompt_budget": C + 2, "prompt_window": W, "prompt_kernel": 3, "neighbours": 3, "first_layer": 0}
        return specpass.SpecKVPC(budget=C, window=W, lookahead=length, **sizes)
    return specpass.SpecKV(budget=C, window=W, lookahead=length)


def compiled(door: str, how: Any) -> Any:
    draft = DRAFT if how.needs_draft else None
    if door == "compile":
        return compile_eager(tiny(layers=1), how, draft, full_verify=True)
    model = tiny(layers=1)
    model.compile(backend=specpass.Backend(draft, how, lowering="eager"), dynamic=True)
    return model


@pytest.mark.parametrize(("kind", "door", "size", "length"), CASES)
def test_any_lookahead_beside_any_prompt(kind: str, door: str, size: int, length: int) -> None:
    """The first prompt decides the hints; longer, shorter and padded ones go on from its graph."""
    how, twin = method(kind, length), tiny(layers=1)
    model = compiled(door, how)
    for other in (size, 40, 14):
        cache = specpass.BudgetCache(model.config, how, max_new_tokens=3)
        ours = run(model, prompt(other, seed=other), 3, past_key_values=cache)
        assert ours.cache.lookahead_ids.shape == (1, length)
        if kind != "speckvpc":
            check_rules(kept(cache), other, C, W)
            check_answer(ours, twin, prompt(other, seed=other), kept(cache))
    graphs = [record for record in specpass.report(model).graphs if record.kind == "prefill"]
    assert [record.exact for record in graphs] == [False]


@pytest.mark.parametrize("length", [1, 30])
def test_prompts_of_few_tokens_without_the_early_way_out(length: int) -> None:
    """S from 1: everything fits, and goes through selection all the same."""
    how, twin = method("speckv", length), tiny(layers=1)
    model = compile_eager(tiny(layers=1), how, DRAFT)
    for size in (1, 2, 3, 12):
        cache = specpass.BudgetCache(model.config, how, max_new_tokens=3, early_exit=False)
        logits = call(model, prompt(size, seed=size), cache)
        torch.testing.assert_close(logits, call(twin, prompt(size, seed=size), None), atol=1e-4, rtol=1e-4)
        assert cache.get_seq_length() == size


def test_a_long_lookahead_of_a_padded_batch() -> None:
    how, twin = method("speckv", 50), tiny(layers=1)
    model, rows = compile_eager(tiny(layers=1), how, DRAFT), [prompt(20, seed=1), prompt(5, seed=2)]
    ids, mask = padded(rows)
    ours = run(model, ids, 3, mask)
    for row, own in enumerate(rows):
        check_answer(ours, twin, own, kept(ours.cache, row), row)
