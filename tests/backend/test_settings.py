"""Dynamo's settings hold more graphs for our models and no fake results, and are nobody else's business."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import call, compile_eager
from tiny import prompt, tiny
from torch._dynamo.repro import after_dynamo
from torch._subclasses.fake_tensor import FakeTensorMode

import specpass
from specpass.backend.entry import entry_point
from specpass.backend.settings import RECOMPILE_LIMIT

METHOD = specpass.StreamingLLM(budget=0.5)
LIMIT = torch._dynamo.config.recompile_limit


def ours(target: Any) -> Any:
    return compile_eager(target, METHOD)


def plain(target: Any) -> Any:
    target.compile(backend=specpass.Backend(method=METHOD, lowering="eager"), dynamic=True)
    return target


def named(target: Any) -> Any:
    return torch.compile(target, backend=entry_point, dynamic=True, options={"method": METHOD, "lowering": "eager"})


DOORS = (ours, plain, named)


@pytest.fixture(autouse=True)
def forgetful() -> None:
    torch._dynamo.reset()


def check_many(door: Callable[[Any], Any], graphs: int, limit: int) -> None:
    """Each budget's prompt is pruned: past the limit, BudgetCache.update would be called uncompiled, and raise."""
    target = tiny(layers=1)
    with torch._dynamo.config.patch(recompile_limit=limit):
        model = door(target)
        for budget in range(1, graphs + 1):  # in steps of 64: a graph each
            cache = specpass.BudgetCache(target.config, METHOD, max_new_tokens=6, prompt_length=128 * budget)
            call(model, prompt(128 * budget), cache)
            assert cache.layers[0].positions.shape[2] == 64 * budget
            assert torch._dynamo.config.recompile_limit == limit
    assert len(specpass.report(target).graphs) == graphs


@pytest.mark.parametrize("door", DOORS)
def test_every_door_holds_more_graphs_than_the_limit(door: Callable[[Any], Any]) -> None:
    check_many(door, graphs=4, limit=2)


@pytest.mark.parametrize("door", DOORS)
def test_in_a_worker_thread_too(door: Callable[[Any], Any]) -> None:
    """Dynamo's settings are a thread's own."""
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        pool.submit(check_many, door, graphs=4, limit=2).result()


def test_dynamos_own_limit_is_not_ours() -> None:
    check_many(named, graphs=9, limit=LIMIT)


def test_the_limit_is_the_users_again_after_an_error() -> None:
    model = plain(tiny(layers=1))
    with pytest.raises(specpass.errors.MethodMismatchError):
        call(model, prompt(60), specpass.BudgetCache(model.config, specpass.SnapKV(budget=40), max_new_tokens=6))
    assert torch._dynamo.config.recompile_limit == LIMIT


def test_a_foreign_backend_keeps_its_limit() -> None:
    seen = []

    def backend(gm: Any, inputs: Any) -> Any:
        seen.append(torch._dynamo.config.recompile_limit)
        return gm.forward

    torch.compile(lambda x: x + 1, backend=backend)(torch.ones(3))
    assert seen == [LIMIT]


def asked_of_the_cache() -> int:
    return FakeTensorMode.cache_hits + FakeTensorMode.cache_misses


@pytest.mark.parametrize("door", DOORS)
def test_no_fake_result_is_kept_for_another_operator(door: Callable[[Any], Any]) -> None:
    """With symbolic sizes that costs more than it spares: a tenth of the time to compile."""
    model, before = door(tiny(layers=2)), asked_of_the_cache()
    call(model, prompt(128), specpass.BudgetCache(model.config, METHOD, max_new_tokens=6, prompt_length=128))
    assert asked_of_the_cache() == before
    torch.compile(lambda x: x + 1, backend="eager")(torch.ones(3))
    assert asked_of_the_cache() > before, "torch counts otherwise than this test does"


def test_where_dynamo_does_not_ask_the_limit_is_raised_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(after_dynamo.WrapBackendDebug, "backend_ctx_ctor")
    model = plain(tiny(layers=1))
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=6, prompt_length=128)
    with torch._dynamo.config.patch(recompile_limit=LIMIT):
        call(model, prompt(128), cache)
        assert torch._dynamo.config.recompile_limit == RECOMPILE_LIMIT


def test_few_graphs_serve_rooms_beams_batches_and_turns_of_every_size() -> None:
    """Storage that is a view, grew or was reordered, and positions that are slices, find the graphs there are."""
    model = compile_eager(tiny(layers=1), specpass.SnapKV(budget=24, window=8))

    def answer(length: int, new: int, batch: int = 2, **options: Any) -> None:
        ids = prompt(length, batch=batch)
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, return_dict_in_generate=True, **options
        )
        turn = torch.cat([out.sequences, prompt(5, batch=len(out.sequences))], 1)
        if "num_beams" not in options:
            model.generate(
                turn, attention_mask=torch.ones_like(turn), past_key_values=out.past_key_values, max_new_tokens=3
            )

    for length in (60, 20):
        answer(length, 5)
    kinds = sorted(record.kind for record in specpass.report(model).graphs)
    assert kinds == ["append", "decode", "prefill", "short"]
    for new in (5, 90, 150):
        for batch, options in ((3, {}), (4, {"do_sample": True}), (2, {"num_beams": 2}), (5, {"num_beams": 3})):
            answer(47 + new // 5, new, batch, **options)
            answer(11, new, batch, **options)
    found = sorted(record.kind for record in specpass.report(model).graphs)
    assert found == sorted([*kinds, "decode"])  # one more for beams, which share their prompts' slots


def test_what_changes_nothing_makes_no_graph() -> None:
    """A slice as a prompt, an assistant's arguments, a tokenizer for stop strings, no early way out."""
    method = specpass.SnapKV(budget=24, window=8)
    model, ids = compile_eager(tiny(layers=1), method), prompt(60)
    tokens = model.generate(ids, max_new_tokens=3, do_sample=False)[:, 60:]
    kinds = sorted(record.kind for record in specpass.report(model).graphs)
    assert kinds == ["decode", "prefill"]

    def first(ids: torch.Tensor, early_exit: bool = True, **how: Any) -> torch.Tensor:
        cache = specpass.BudgetCache(model.config, method, 3, early_exit=early_exit)
        positions = torch.arange(ids.shape[1])[None]
        return call(model, ids, cache, position_ids=positions, **how).argmax(-1)

    for how in ({}, {"use_cache": True, "return_dict": True}, {"tokenizer": object()}, {"early_exit": False}):
        assert torch.equal(first(prompt(61)[:, :60], **how), tokens[:, :1])
    first(prompt(20), early_exit=False)
    assert len(specpass.report(model).graphs) == len(kinds)
    cache = specpass.BudgetCache(model.config, method, 3)
    with torch.no_grad():
        assert isinstance(model(ids, past_key_values=cache, return_dict=False), tuple)
