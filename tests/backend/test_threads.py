"""Threads that call one model: they compile a graph once, and run side by side."""

from __future__ import annotations

import concurrent.futures
from typing import Any

import pytest
import torch
from support import compile_eager, run
from tiny import prompt, tiny

import specpass
from specpass.backend import cold, settings

C, W = 24, 8
METHOD = specpass.SnapKV(budget=C, window=W)


def test_cold_threads_share_their_graphs() -> None:
    """In one of three tries: Dynamo's guards, when two threads ask them at once, at times say no to what they hold for
    ("Unexpected recompilation" in its log), and a graph is compiled once more. Threads that do not wait never share.
    """
    for _ in range(3):
        model = compile_eager(tiny(layers=1), METHOD)
        prompts = [prompt(60 + number, seed=number) for number in range(4)]
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            ours = list(pool.map(lambda ids, model=model: run(model, ids, 3).tokens, prompts))
        made = sorted(record.kind for record in specpass.report(model).graphs)
        assert ours == [run(model, ids, 3).tokens for ids in prompts]
        assert len(specpass.report(model).graphs) == len(made)
        if made == ["decode", "prefill"]:
            return
    raise AssertionError(made)


def test_a_warm_call_waits_for_nobody() -> None:
    model = compile_eager(tiny(layers=1), METHOD)
    expected = run(model, prompt(60), 8).tokens
    with concurrent.futures.ThreadPoolExecutor(3) as pool, cold._COLD:  # as while another model is compiled
        ours = [pool.submit(run, model, prompt(60), 8) for _ in range(3)]
        assert [future.result(timeout=120).tokens for future in ours] == [expected] * 3


def test_a_thread_may_make_any_number_of_graphs() -> None:
    """A thread of its own for each prompt and ratio budget, past Dynamo's own limit of 8."""
    model = compile_eager(tiny(layers=1), specpass.SnapKV(budget=0.5, window=W))
    for number in range(1, 11):
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            ours = pool.submit(run, model, prompt(130 * number), 2).result()
        assert ours.cache.layers[0].positions.shape[2] < 130 * number
    assert len(specpass.report(model).graphs) > torch._dynamo.config.recompile_limit


def test_a_limit_that_is_met_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(settings, "RECOMPILE_LIMIT", 2)
    model = compile_eager(tiny(layers=1), METHOD)

    def second(method: Any) -> None:
        cache = specpass.BudgetCache(model.config, method, max_new_tokens=3)
        run(model, prompt(60, batch=2), 3, past_key_values=cache)

    with torch._dynamo.config.patch(recompile_limit=2):
        run(model, prompt(60), 3)
        with pytest.raises(specpass.errors.GraphLimitError, match=r"the 2 that Dynamo keeps.*restore"):
            second(METHOD)
    second(METHOD)


def test_prompts_of_all_lengths_have_few_ratio_budgets() -> None:
    budgets = {specpass.SnapKV(budget=0.5, window=W).resolve(length).budget for length in range(1, 1 << 17, 8)}
    assert len(budgets) <= 17 + 8 * 6
    for length in (1 << 11, 3000, 77777):
        kept = specpass.SnapKV(budget=0.5, window=W).resolve(length).budget
        assert length // 2 <= kept <= max(length // 2 + 64, length * 9 // 16 + 1)
