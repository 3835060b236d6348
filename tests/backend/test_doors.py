"""The three doors: specpass.compile, target.compile(backend=...), torch.compile(target, backend="specpass")."""

from __future__ import annotations

import copy
import pickle
import warnings
from typing import Any

import pytest
import torch
from support import call, check_answer, compile_eager, kept, padded, run, state_of
from tiny import prompt, tiny
from transformers import DynamicCache

import specpass
from specpass.backend.entry import entry_point
from specpass.errors import UncompiledCacheError, UnsupportedCallError

C, W, L = 24, 8, 4
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L)
SNAP = specpass.SnapKV(budget=C, window=W)


def new_cache(model: Any, method: Any = METHOD, **kwargs: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, method, max_new_tokens=6, **kwargs)


@pytest.fixture(scope="module")
def twin() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def draft() -> Any:
    return tiny(seed=1, layers=1)


@pytest.fixture(scope="module")
def expected(draft: Any) -> Any:
    """What specpass.compile and generate give for a prompt of 60 tokens."""
    model = compile_eager(tiny(), METHOD, draft)
    ours = run(model, prompt(60))
    check_answer(ours, tiny(), prompt(60), kept(ours.cache))
    return ours


@pytest.fixture(scope="module")
def plain(draft: Any) -> Any:
    model = tiny()
    model.compile(backend=specpass.Backend(draft=draft, method=METHOD, lowering="eager"), dynamic=True)
    return model


def same_kept(ours: Any, theirs: Any) -> bool:
    return all(torch.equal(a, b) for a, b in zip(kept(ours), kept(theirs), strict=True))


def test_the_plain_door_generates(plain: Any, expected: Any) -> None:
    ours = run(plain, prompt(60), past_key_values=new_cache(plain))
    assert ours.tokens == expected.tokens
    assert same_kept(ours.cache, expected.cache)
    assert torch.equal(ours.cache.lookahead_ids, expected.cache.lookahead_ids)
    torch.testing.assert_close(ours.logits, expected.logits, atol=1e-5, rtol=1e-5)


def test_the_plain_door_takes_direct_calls(plain: Any, expected: Any) -> None:
    cache = new_cache(plain)
    logits = call(plain, prompt(60), cache)
    assert logits.shape == (1, 1, 128)
    torch.testing.assert_close(logits[:, 0], expected.logits[:, 0], atol=1e-5, rtol=1e-5)
    assert same_kept(cache, expected.cache)


def test_the_plain_door_pads_and_fits(plain: Any, twin: Any) -> None:
    """A padded batch beyond the budget, and one within it, through generate."""
    ids = prompt(60, batch=2)
    mask = torch.ones_like(ids)
    mask[1, :25] = 0
    ours = run(plain, ids, 5, mask, past_key_values=new_cache(plain))
    check_answer(ours, twin, ids[:1], kept(ours.cache), 0)
    check_answer(ours, twin, ids[1:, 25:], kept(ours.cache, 1), 1)
    short = run(plain, prompt(C), 5, past_key_values=new_cache(plain))
    assert short.tokens == run(twin, prompt(C), 5).tokens


def test_the_plain_door_reports(plain: Any, expected: Any) -> None:
    run(plain, prompt(60), past_key_values=new_cache(plain))
    text = str(specpass.report(plain))
    assert "2 sites rewritten" in text
    assert f"{C} slots" in text
    assert not specpass.report(plain).refusals


@pytest.fixture(scope="module")
def registered() -> None:
    """The entry point registers the name where specpass is installed; a bare checkout does it by hand."""
    if "specpass" not in torch._dynamo.list_backends(exclude_tags=None):
        torch._dynamo.register_backend(entry_point, name="specpass")


@pytest.mark.parametrize("dynamic", [None, True])
def test_the_name_serves_forward_calls(
    registered: None, dynamic: bool | None, draft: Any, expected: Any, twin: Any
) -> None:
    torch._dynamo.reset()
    target = tiny()
    f = torch.compile(
        target, backend="specpass", dynamic=dynamic, options={"draft": draft, "method": METHOD, "lowering": "eager"}
    )
    for length in (60, 61, 75):
        cache, ids = new_cache(target), prompt(length)
        logits = call(f, ids, cache)
        full = call(twin, ids, None)
        torch.testing.assert_close(logits, full, atol=1e-4, rtol=1e-4)
        assert kept(cache)[0].shape == (2, C)
        tokens = [int(logits[0, -1].argmax())]
        for _ in range(3):
            tokens.append(int(call(f, torch.tensor([[tokens[-1]]]), cache)[0, -1].argmax()))
        if length == 60:
            assert same_kept(cache, expected.cache)
            assert tokens == expected.tokens[0][:4]


def test_an_unknown_option_is_an_error(registered: None) -> None:
    torch._dynamo.reset()
    f = torch.compile(tiny(), backend="specpass", options={"method": SNAP, "buget": 3})
    with pytest.raises(Exception, match="buget"):
        call(f, prompt(60), new_cache(tiny(), SNAP))


# -- nothing stays behind


def test_compile_returns_the_target_and_restore_leaves_it_as_it_was(twin: Any) -> None:
    target = tiny()
    before = state_of(target)
    weights = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    assert compile_eager(target, SNAP) is target
    assert type(target) is type(twin)
    assert state_of(target)[0].keys() == before[0].keys()
    changed = {name for name, module in state_of(target)[0].items() if module != before[0][name]}
    assert changed == {""}  # instance attributes of the model itself, no submodule's
    pruned = run(target, prompt(60), 3)
    assert pruned.cache.layers[0].slots < 60 + 64
    assert specpass.restore(target) is target
    assert state_of(target) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in target.state_dict().items())
    assert isinstance(run(target, prompt(60), 3).cache, DynamicCache)
    assert specpass.restore(target) is target
    with pytest.raises(UnsupportedCallError, match="not compiled with specpass"):
        specpass.report(target)


def test_restore_puts_the_users_own_attributes_back() -> None:
    target = tiny()
    target.compile(backend="eager")
    mine = target._compiled_call_impl
    compile_eager(target, SNAP)
    compile_eager(target, specpass.StreamingLLM(budget=C))  # a second compile replaces the first
    assert specpass.report(target).method.startswith("StreamingLLM")
    specpass.restore(target)
    assert target._compiled_call_impl is mine


def test_a_copied_model_is_its_own() -> None:
    """restore makes an ordinary model of a copy, compile a pruned one that computes with its own weights."""
    target = compile_eager(tiny(), SNAP)
    ours = run(target, prompt(60), 3)
    twin = specpass.restore(copy.deepcopy(target))
    assert state_of(twin)[0][""][1].keys() == state_of(tiny())[0][""][1].keys()
    assert run(twin, prompt(60), 3).tokens == run(tiny(), prompt(60), 3).tokens
    compile_eager(twin, SNAP)
    assert run(twin, prompt(60), 3).tokens == ours.tokens
    for parameter in twin.parameters():
        parameter.zero_()
    assert run(twin, prompt(60), 3).tokens == [[0, 0, 0]]
    assert run(target, prompt(60), 3).tokens == ours.tokens
    with pytest.raises(TypeError, match="restore"):
        pickle.dumps(target)


# -- exact where nothing can be pruned


def test_a_foreign_cache_is_exact_with_one_warning(plain: Any, twin: Any) -> None:
    ids = prompt(60, seed=2)
    for model in (plain, compile_eager(tiny(), SNAP)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                cache, other = DynamicCache(), DynamicCache()
                for part in (ids, prompt(1), prompt(1)):
                    torch.testing.assert_close(call(model, part, cache), call(twin, part, other), atol=1e-5, rtol=1e-5)
                assert cache.get_seq_length() == 62
        assert len([w for w in caught if "BudgetCache" in str(w.message)]) == 1


def test_an_uncompiled_model_refuses_the_cache(twin: Any) -> None:
    with pytest.raises(UncompiledCacheError, match=r"specpass\.compile"):
        twin.generate(prompt(60), past_key_values=new_cache(twin), max_new_tokens=3)


@pytest.mark.parametrize("family", ["gpt2", "opt"])
def test_what_cannot_be_pruned_runs_exactly_and_says_why(family: str) -> None:
    """Learned positions: pruned rightly or refused with a reason, never wrong."""
    twin, model = tiny(family, layers=1), compile_eager(tiny(family, layers=1), SNAP)
    rows = [prompt(60, seed=3), prompt(43, seed=4)]
    ids, mask = padded(rows)
    alone, together = run(model, rows[0]), run(model, ids, mask=mask)
    report = specpass.report(model)
    if report.refusals:
        assert all(record.exact for record in report.graphs)
        for ours, full in ((alone, run(twin, rows[0])), (together, run(twin, ids, mask=mask))):
            assert ours.tokens == full.tokens
            torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)
    else:
        check_answer(alone, twin, rows[0], kept(alone.cache))
        for row, own in enumerate(rows):
            check_answer(together, twin, own, kept(together.cache, row), row)


def test_many_models_never_run_uncompiled() -> None:
    """Dynamo's limit counts per code object, which all models share; past it a call would run uncompiled."""
    torch._dynamo.reset()
    method = specpass.StreamingLLM(budget=C)
    with torch._dynamo.config.patch(recompile_limit=2):
        for seed in range(3):
            for door in ("compile", "plain"):
                model = tiny(seed=seed, layers=1)
                if door == "compile":
                    compile_eager(model, method)
                else:
                    model.compile(backend=specpass.Backend(method=method, lowering="eager"), dynamic=True)
                cache = new_cache(model, method)
                call(model, prompt(60), cache)
                assert kept(cache)[0].shape == (2, C)
                assert specpass.report(model).graphs
