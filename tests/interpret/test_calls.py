"""Ways in which a hybrid is called, and what transformers asks of its cache."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from hybrids import hybrid, states_of
from support import call, compile_eager, padded, run
from tiny import prompt, tiny
from transformers import DynamicCache

import specpass
from specpass import errors

W, C = 8, 24
COVERING, SNAP = specpass.SnapKV(budget=128, window=W), specpass.SnapKV(budget=C, window=W)


@pytest.fixture(scope="module", params=["lfm2", "falcon_h1", "qwen3_next"])
def trio(request: pytest.FixtureRequest) -> tuple[Any, Any, Any]:
    """Plain, with a covering budget, pruned."""
    family = request.param
    return (hybrid(family), compile_eager(hybrid(family), COVERING), compile_eager(hybrid(family), SNAP))


def cache_of(model: Any, method: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, method, 16)


def test_beams(trio: tuple[Any, Any, Any]) -> None:
    plain, model, pruned = trio
    assert run(model, prompt(40), num_beams=3).tokens == run(plain, prompt(40), num_beams=3).tokens
    found = run(pruned, prompt(40), num_beams=3, num_return_sequences=2)
    assert len(found.tokens) == 2
    assert all(layer.batch_size == 3 for layer in found.cache.budgeted)


def test_second_turn(trio: tuple[Any, Any, Any]) -> None:
    plain, model, _ = trio
    answers = []
    for own, cache in ((plain, DynamicCache(config=plain.config)), (model, cache_of(model, COVERING))):
        first = run(own, prompt(40), new=4, past_key_values=cache)
        talk = torch.cat([prompt(40), torch.tensor(first.tokens), prompt(7, seed=9)], 1)
        answers.append(run(own, talk, new=4, past_key_values=cache))
    assert answers[0].tokens == answers[1].tokens
    torch.testing.assert_close(answers[1].logits, answers[0].logits, atol=1e-4, rtol=1e-4)


def test_padding_in_a_second_turn(trio: tuple[Any, Any, Any]) -> None:
    plain, model, _ = trio
    ids, mask = padded([prompt(40), prompt(30, seed=1)])
    new, own = padded([prompt(6, seed=4), prompt(3, seed=5)])
    both = torch.cat([mask, own, torch.ones(2, 1, dtype=torch.int64)], 1)
    told = (both.cumsum(1) - 1).clamp(min=0)
    found = []
    for each, cache in ((plain, DynamicCache(config=plain.config)), (model, cache_of(model, COVERING))):
        call(each, ids, cache, attention_mask=mask, position_ids=told[:, :40])
        call(each, new, cache, attention_mask=both[:, :46], position_ids=told[:, 40:46])
        found.append(call(each, prompt(1, batch=2), cache, attention_mask=both, position_ids=told[:, 46:]))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_prompt_as_embeddings(trio: tuple[Any, Any, Any]) -> None:
    plain, model, _ = trio
    embeds = plain.get_input_embeddings()(prompt(40))
    with torch.no_grad():
        ours = model(inputs_embeds=embeds, past_key_values=cache_of(model, COVERING)).logits
        torch.testing.assert_close(ours, plain(inputs_embeds=embeds).logits, atol=1e-4, rtol=1e-4)


def test_copies_and_reset(trio: tuple[Any, Any, Any]) -> None:
    model = trio[2]
    cache = cache_of(model, SNAP)
    call(model, prompt(40), cache)
    twin = copy.deepcopy(cache)
    token = prompt(1, seed=3)
    after = call(model, token, cache)
    torch.testing.assert_close(call(model, token, twin), after)
    cache.reset()
    assert not cache.filled
    again = call(model, prompt(40).repeat(2, 1), cache)  # another batch
    assert again.shape[0] == 2
    torch.testing.assert_close(call(model, token.repeat(2, 1), cache)[1:], after, atol=1e-4, rtol=1e-4)


def test_batch_changes_reach_states(trio: tuple[Any, Any, Any]) -> None:
    model = trio[2]
    cache = cache_of(model, SNAP)
    call(model, torch.cat([prompt(40), prompt(40, seed=1)]), cache)
    before = states_of(copy.deepcopy(cache))
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 2]))
    cache.reorder_cache(torch.tensor([1, 0]))
    for state, old in zip(states_of(cache), before, strict=True):
        assert torch.equal(state, old[[1, 0]])
    cache.layers[0].offload()
    assert call(model, prompt(1, batch=2), cache).shape[0] == 2


def test_crop_is_refused_by_name(trio: tuple[Any, Any, Any]) -> None:
    model = trio[2]
    cache = cache_of(model, SNAP)
    call(model, prompt(40), cache)
    call(model, prompt(3), cache)
    with pytest.raises(errors.CacheStateError, match=r"layer 0 has a state"):
        cache.crop(-2)


def test_recorded_convolutions_are_rolled_back() -> None:
    model = compile_eager(hybrid("lfm2"), SNAP)
    cache, other = cache_of(model, SNAP), cache_of(model, SNAP)
    tokens = prompt(5, seed=2)
    cache.activate_past_recording()
    call(model, prompt(40), cache)
    call(model, prompt(40), other)
    cache.crop(0)
    call(model, tokens[:, :4], cache)
    cache.crop(-2)
    call(model, tokens[:, :2], other)
    torch.testing.assert_close(call(model, tokens[:, 4:], cache), call(model, tokens[:, 4:], other))


def test_plain_door_names_the_other() -> None:
    target = hybrid("lfm2")
    torch._dynamo.reset()
    target.compile(backend=specpass.Backend(method=SNAP, lowering="eager"), dynamic=True)
    with pytest.raises(errors.UnsupportedCallError, match=r"layer 0 is configured as conv.*specpass\.compile"):
        call(target, prompt(40), cache_of(target, SNAP))


def test_gradients_are_refused() -> None:
    model = compile_eager(hybrid("lfm2"), SNAP)
    model.requires_grad_(True)
    with pytest.raises(errors.GradientsError, match="no_grad"):
        model(input_ids=prompt(40), past_key_values=cache_of(model, SNAP))


def test_restore() -> None:
    model = compile_eager(hybrid("lfm2"), SNAP)
    specpass.restore(model)
    assert isinstance(run(model, prompt(40)).cache, DynamicCache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_need_not_agree(dtype: torch.dtype) -> None:
    method = specpass.SpecKV(budget=C, window=W, lookahead=4)
    model = compile_eager(hybrid("lfm2").to(dtype), method, tiny(seed=3))
    found = run(model, prompt(40))
    assert all((layer.positions >= 0).all() and layer.keys.dtype == dtype for layer in found.cache.budgeted)
