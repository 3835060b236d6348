"""BudgetCache: what is stored where, how much of it, and what the base class promises."""

from __future__ import annotations

import copy
import gc
from typing import Any

import pytest
import torch
from support import call, check_answer, compile_eager, kept, padded, run
from tiny import prompt, tiny
from transformers import DynamicCache

import specpass
from specpass.cache.layer import room_of
from specpass.errors import CacheStateError
from specpass.testing import eager

C, W, K, D, LAYERS = 40, 8, 2, 16, 2
METHOD = specpass.SnapKV(budget=C, window=W)


@pytest.fixture(scope="module")
def twin() -> Any:
    return tiny()


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(), METHOD)


def new_cache(max_new_tokens: int = 8, **kwargs: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(tiny().config, METHOD, max_new_tokens=max_new_tokens, **kwargs)


def steps(model: Any, cache: Any, tokens: torch.Tensor) -> torch.Tensor:
    """Logits [B, n, V] of feeding tokens [B, n] one by one."""
    return torch.cat([call(model, tokens[:, [i]], cache) for i in range(tokens.shape[1])], 1)


def greedy(model: Any, cache: Any, ids: torch.Tensor, new: int) -> list[int]:
    """Greedy decoding by direct calls."""
    tokens = [int(call(model, ids, cache)[0, -1].argmax())]
    while len(tokens) < new:
        tokens.append(int(call(model, torch.tensor([[tokens[-1]]]), cache)[0, -1].argmax()))
    return tokens


def same(ours: Any, theirs: Any) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


# -- storage


def test_layout(model: Any, twin: Any) -> None:
    cache, full, ids = new_cache(), DynamicCache(), prompt(70)
    assert cache.layers[0].keys is None
    assert cache.get_seq_length() == 0
    call(model, ids, cache)
    call(twin, ids, full)
    assert cache.get_seq_length() == 70
    assert cache.get_query_offset() == C
    for layer, everything in zip(cache.layers, full.layers, strict=True):
        assert layer.slots == C + 64
        assert layer.offsets.tolist() == [0, C + 64, 2 * (C + 64)]
        assert layer.lengths.tolist() == [[C] * K]
        assert layer.positions.shape == (1, K, C)
        assert layer.positions.dtype == layer.lengths.dtype == torch.int64
        index = layer.positions[..., None].expand(-1, -1, -1, D)
        for buffer, view, source in (
            (layer.key_buffer, layer.keys, everything.keys),
            (layer.value_buffer, layer.values, everything.values),
        ):
            assert buffer.shape == (1, K * (C + 64), D)
            assert view.shape == (1, K, C + 64, D)
            assert view.data_ptr() == buffer.data_ptr()
            same(view[:, :, :C], source.gather(2, index))
            assert not view[:, :, C:].any()
            for head in range(K):
                start, end = layer.offsets[head : head + 2]
                assert torch.equal(buffer[:, start:end], view[:, head])


@pytest.mark.parametrize(("tokens", "room"), [(1, 64), (64, 64), (65, 128), (300, 320), (512, 512), (131072, 512)])
def test_room_is_a_multiple_of_64(tokens: int, room: int) -> None:
    assert new_cache(tokens).room == room


def test_generation_beyond_the_room_grows_in_blocks() -> None:
    """Tokens, bounds and numbering as with large room from the start, and no graph for each block."""
    method = specpass.StreamingLLM(budget=C)
    model, ids, new = compile_eager(tiny(layers=1), method), prompt(70, seed=1), 290
    small, large = (specpass.BudgetCache(model.config, method, max_new_tokens=room) for room in (8, 320))
    tokens = [int(call(model, ids, small)[0, -1].argmax())]
    for count in range(1, new):
        tokens.append(int(call(model, torch.tensor([[tokens[-1]]]), small)[0, -1].argmax()))
        assert small.layers[0].slots <= C + max(count + count // 2, 64) + 64
        assert small.get_seq_length() == 70 + count
        assert (small.layers[0].lengths == C + count).all()
    assert small.layers[0].slots >= C + new
    assert len([record for record in specpass.report(model).graphs if record.kind == "decode"]) <= 2
    assert tokens == greedy(model, large, ids, new)
    assert large.layers[0].slots == C + 320
    same(small.layers[0].keys[:, :, : C + new - 1], large.layers[0].keys[:, :, : C + new - 1])


def test_room_beyond_512_tokens_comes_as_it_is_needed(model: Any) -> None:
    """The report's formula is what is allocated, at each length; few sizes on the way to 40,000 tokens."""
    cache, sizes = new_cache(131072), set()
    call(model, prompt(70), cache)
    for count in (512, 513, 768, 769, 3000, 40000):
        while cache.appended < count - 1:
            cache.appended += 1
            cache.reserve(1)  # as each decode step does
            sizes.add(cache.layers[0].slots)
        assert cache.layers[0].slots == C + room_of(count)
        assert room_of(count) <= count * 3 // 2 + 64
    assert len(sizes) <= 14


def test_storages_add_up_to_the_formula(model: Any) -> None:
    method = specpass.SnapKV(budget=C, window=W)
    for ids, mask in ((prompt(70), None), padded([prompt(90), prompt(20)])):
        cache = new_cache(100)
        call(model, ids, cache, **({} if mask is None else {"attention_mask": mask}))
        batch, room = ids.shape[0], 128
        kv = 2 * LAYERS * batch * K * (C + room) * D * 4
        formula = kv + LAYERS * batch * K * (method.budget + 1) * 8  # positions and lengths are int64
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in reachable(cache)}
        assert abs(sum(storages.values()) - formula) <= 0.05 * formula


def reachable(cache: Any) -> list[torch.Tensor]:
    """Tensors that the cache holds, however deep, without walking into modules and types."""
    found: list[torch.Tensor] = []
    seen: set[int] = set()
    stack: list[Any] = [cache]
    while stack:
        thing = stack.pop()
        if id(thing) in seen or thing is None or isinstance(thing, (type, str, int, float, type(gc))):
            continue
        seen.add(id(thing))
        if isinstance(thing, torch.Tensor):
            found.append(thing)
        elif isinstance(thing, dict):
            stack += thing.values()
        elif isinstance(thing, (list, tuple, set)):
            stack += thing
        elif hasattr(thing, "__dict__") and not callable(thing):
            stack += vars(thing).values()
    return found


def test_no_tensor_of_prompt_length_survives() -> None:
    """Neither the target's K/V nor the draft's, nor a mask, nor anything that the first, compiling call saw."""
    method = specpass.SpecKV(budget=C, window=W, lookahead=5)
    model = compile_eager(tiny(), method, tiny(seed=1, layers=1))
    before = tensors()
    known, weights = {id(tensor) for tensor in before}, {tensor.untyped_storage().data_ptr() for tensor in before}
    for size in (331, 947):
        cache = specpass.BudgetCache(model.config, method, max_new_tokens=8)
        ids = prompt(size)
        call(model, ids, cache)
        call(model, prompt(1), cache)
        new = [tensor for tensor in tensors() if id(tensor) not in known and tensor is not ids]
        long = {length + more for length in (331, 947) for more in (-1, 0, 1, 4, 5, 64, 69)}
        assert [tuple(tensor.shape) for tensor in new if long & set(tensor.shape)] == []
        # nor a small view of something long: of the largest that may live, the cache's storage, K (C + N) D floats
        storages = [tensor.untyped_storage() for tensor in new]
        largest = max(storage.nbytes() for storage in storages if storage.data_ptr() not in weights)
        assert largest == K * (C + 64) * D * 4


def tensors() -> list[torch.Tensor]:
    """Real tensors alive in this process."""
    gc.collect()
    found = [thing for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)]
    return [tensor for tensor in found if type(tensor).__name__ in ("Tensor", "Parameter") and not tensor.is_meta]


# -- what a transformers cache promises


def test_crop_takes_appended_tokens_back(model: Any) -> None:
    cache, ids, tokens = new_cache(), prompt(70, seed=2), prompt(5, seed=3)
    call(model, ids, cache)
    first = steps(model, cache, tokens)
    cache.crop(0)
    assert cache.get_seq_length() == 75
    cache.crop(-3)
    assert cache.get_seq_length() == 72
    assert (cache.layers[0].lengths == C + 2).all()
    same(steps(model, cache, tokens[:, 2:]), first[:, 2:])
    with pytest.raises(CacheStateError, match=r"6.*5 tokens"):
        cache.crop(-6)
    assert cache.get_seq_length() == 75


def test_reset_prunes_the_next_prompt_anew(model: Any) -> None:
    cache = new_cache()
    for seed in (4, 5):
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.layers[0].positions is None
        assert cache.lookahead_ids is None
        assert greedy(model, cache, prompt(70, seed=seed), 5) == greedy(model, new_cache(), prompt(70, seed=seed), 5)
        assert cache.get_seq_length() == 74


def test_beam_search(model: Any, twin: Any) -> None:
    """Within the budget it is the uncompiled model's; beyond it the cache is reordered with its beams."""
    ids = prompt(C - 12, seed=6, batch=2)
    options = {"num_beams": 3, "max_new_tokens": 10, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(model.generate(ids, **options), twin.generate(ids, **options))
    long = prompt(70, seed=6)
    out = model.generate(long, **{**options, "attention_mask": torch.ones_like(long)}, return_dict_in_generate=True)
    assert out.sequences.shape[1] == 80
    assert out.past_key_values.batch_size == 3


def test_reorder_moves_whole_rows(model: Any) -> None:
    """Rows of different lengths, one of them shorter than the budget."""
    cache, other, order = new_cache(), new_cache(), [2, 0, 0]
    ids, mask = padded([prompt(70, seed=7), prompt(55, seed=8), prompt(20, seed=9)])
    call(model, ids, cache, attention_mask=mask)
    call(model, ids[order], other, attention_mask=mask[order])
    cache.reorder_cache(torch.tensor(order))
    for ours, theirs in zip(cache.layers, other.layers, strict=True):
        assert ours.lengths.tolist() == [[20, 20], [C, C], [C, C]]
        assert torch.equal(ours.positions, theirs.positions)
        same(ours.keys, theirs.keys)
        same(ours.values, theirs.values)
    token, position = prompt(1, seed=8, batch=3), mask[order].sum(1, keepdim=True)
    same(call(model, token, cache, position_ids=position), call(model, token, other, position_ids=position))


def test_a_copy_is_another_cache(model: Any) -> None:
    cache, tokens = new_cache(), prompt(4, seed=9)
    call(model, prompt(70, seed=9), cache)
    copied = copy.deepcopy(cache)
    assert copied.handle is not cache.handle
    ours = steps(model, copied, tokens)
    assert cache.get_seq_length() == 70
    assert copied.get_seq_length() == 74
    assert cache.appended == 0
    assert not cache.layers[0].keys[:, :, C:].any()
    same(steps(model, cache, tokens), ours)


def test_several_tokens_appended_at_once_are_one_by_one(model: Any) -> None:
    one, many, tokens = new_cache(), new_cache(), prompt(9, seed=11)
    for cache in (one, many):
        call(model, prompt(70, seed=10), cache)
    same(call(model, tokens, many, logits_to_keep=0), steps(model, one, tokens))
    assert many.get_seq_length() == one.get_seq_length() == 79
    token = prompt(1, seed=12)
    same(call(model, token, many), call(model, token, one))


def test_a_second_turn_of_a_conversation_is_an_append(model: Any) -> None:
    ids, turn, cache = prompt(70, seed=13), prompt(12, seed=14), new_cache(64)
    first = torch.tensor(run(model, ids, 6, past_key_values=cache).tokens)
    assert cache.get_seq_length() == 75
    positions = kept(cache)
    second = run(model, torch.cat([ids, first, turn], 1), 6, past_key_values=cache)
    assert all(torch.equal(a, b) for a, b in zip(kept(cache), positions, strict=True))
    alone = new_cache(64)
    call(model, ids, alone)
    steps(model, alone, first)
    last = steps(model, alone, turn)[0, -1]
    tokens = [int(last.argmax())]
    while len(tokens) < 6:
        tokens.append(int(call(model, torch.tensor([[tokens[-1]]]), alone)[0, -1].argmax()))
    assert second.tokens == [tokens]


def test_calls_in_a_row_are_independent(model: Any, twin: Any) -> None:
    for number, (batch, length) in enumerate([(1, 70), (2, 55), (1, 33), (3, 90), (1, 71)]):
        ids = prompt(length, batch=batch, seed=20 + number)
        ours = run(model, ids, 5)
        for row in range(batch):
            check_answer(ours, twin, ids[[row]], kept(ours.cache, row), row)
            if length > C:
                chosen = eager.select(twin, ids[[row]], C, None, eager.Scoring(W, reduce="mean", pool="avg"))
                assert all(
                    eager.score_margin(s, p, W) >= -1e-6
                    for s, p in zip(chosen.scores, kept(ours.cache, row), strict=True)
                )
