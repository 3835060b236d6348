"""What specpass does not understand runs exactly, with a reason; and nothing recompiles that need not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import call, check_answer, compile_eager, kept, padded, run
from tiny import prompt, tiny
from transformers import DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import repeat_kv

import specpass

C, W, L = 24, 8, 4
METHOD = specpass.SnapKV(budget=C, window=W)


def new_cache(model: Any, method: Any = METHOD) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, method, max_new_tokens=8)


def exact_generation(model: Any, twin: Any, *reasons: str) -> None:
    """Refused for these reasons, and token for token the uncompiled model."""
    ids = prompt(60, seed=1)
    ours, full = run(model, ids), run(twin, ids)
    report = specpass.report(model)
    for reason in reasons:
        assert any(reason in text for text in report.refusals), report.refusals
    assert "runs exactly" in str(report)
    assert all(record.exact and not record.sites for record in report.graphs)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)


def mixed_keys(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key + key.mean(2, keepdim=True), value, mask, **kwargs)


def mixed_values(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    return sdpa_attention_forward(module, query, key, value + value.mean(2, keepdim=True), mask, **kwargs)


@pytest.mark.parametrize(
    ("function", "masked", "reason"),
    [
        (mixed_keys, True, "model.layers.0.self_attn: keys change between the cache and attention"),
        (mixed_keys, False, "model.layers.0.self_attn: keys change between the cache and attention"),
        (mixed_values, True, "model.layers.0.self_attn: values change between the cache and attention"),
    ],
    ids=["keys", "keys without a mask function", "values"],
)
def test_attention_over_something_else_than_the_cache(
    function: Callable[..., Any], masked: bool, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", function)
    if masked:
        monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", sdpa_mask)
    target, twin = tiny(attention="mine", layers=1), tiny(attention="mine", layers=1)
    exact_generation(compile_eager(target, METHOD), twin, reason)


def with_logits(change: Callable[[Any], Any]) -> Callable[..., Any]:
    """Attention spelled out, whose masked logits [B, H, q, T] are changed in front of the softmax."""

    def attend(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
        key, value = (repeat_kv(states, module.num_key_value_groups) for states in (key, value))
        logits = change(query @ key.transpose(2, 3) * module.scaling + mask)
        return (logits.softmax(-1) @ value).transpose(1, 2), None

    return attend


def by_distance_squared(logits: Any) -> Any:
    column = torch.arange(logits.shape[3])
    return logits + torch.tensor([0.5, 0.25, 0.125, 0.0625])[:, None, None] * (column * column)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda logits: logits.abs() * logits, "model.layers.0.self_attn: attention logits are changed in a way"),
        (by_distance_squared, "adds a bias to the logits that is no slope of a head times the key's position"),
    ],
    ids=["unknown", "a bias that is not linear"],
)
def test_changed_logits_run_exactly_and_are_named(
    change: Callable[[Any], Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", with_logits(change))
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", eager_mask)
    target, twin = tiny(attention="mine", layers=1), tiny(attention="mine", layers=1)
    exact_generation(compile_eager(target, METHOD), twin, reason)


def test_one_site_that_is_not_understood_has_no_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """Around the model's own forward it stays exact by itself: tests/interpret/test_one_exact_site.py."""
    torch._dynamo.reset()

    def second_layer(module: Any, *args: Any, **kwargs: Any) -> Any:
        return (mixed_keys if module.layer_idx == 1 else sdpa_attention_forward)(module, *args, **kwargs)

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", second_layer)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", sdpa_mask)
    model = compile_eager(tiny(attention="mine"), METHOD)
    cache = run(model, prompt(60, seed=1)).cache
    report = specpass.report(model)
    assert report.interpreted == "model.layers.1.self_attn: keys change between the cache and attention"
    assert [layer.exact for layer in cache.layers] == [False, True]
    assert not report.refusals


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(), METHOD)


@pytest.fixture(scope="module")
def twin() -> Any:
    return tiny()


def prefix_mask(size: int) -> torch.Tensor:
    """Bidirectional over the first ten tokens: what a prefix language model asks for."""
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    mask[:, :10] = True
    return mask[None, None]


def test_a_four_dimensional_mask_is_not_taken_for_causal(twin: Any) -> None:
    model, ids = compile_eager(tiny(), METHOD), prompt(60, seed=2)
    cache, other = new_cache(model), DynamicCache()
    ours = call(model, ids, cache, attention_mask=prefix_mask(60))
    full = call(twin, ids, other, attention_mask=prefix_mask(60))
    assert (full - call(twin, ids, None)).abs().max() > 1e-2  # the mask matters
    torch.testing.assert_close(ours, full, atol=1e-5, rtol=1e-5)
    assert any("mask" in reason for reason in specpass.report(model).refusals)
    assert kept(cache)[0].shape == (2, 60)
    for token in (3, 4):
        step = torch.tensor([[token]])
        torch.testing.assert_close(call(model, step, cache), call(twin, step, other), atol=1e-4, rtol=1e-4)


def test_embeddings_in_place_of_ids(twin: Any) -> None:
    """Without a lookahead, nothing needs ids."""
    model, ids = compile_eager(tiny(), METHOD), prompt(60, seed=3)
    options = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    embeds = twin.get_input_embeddings()(ids)
    ours = model.generate(inputs_embeds=embeds, **options)
    assert torch.equal(ours, model.generate(ids, **options)[:, 60:])
    assert not specpass.report(model).refusals


def test_a_refused_model_serves_padded_batches_and_second_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "mine", mixed_keys)
    monkeypatch.setitem(ALL_MASK_ATTENTION_FUNCTIONS._global_mapping, "mine", sdpa_mask)
    model, twin = (tiny(attention="mine", layers=1) for _ in range(2))
    compile_eager(model, METHOD)
    ids, mask = padded([prompt(60, seed=4), prompt(31, seed=5)])
    ours, full = run(model, ids, 5, mask), run(twin, ids, 5, mask)
    assert any("keys change" in reason for reason in specpass.report(model).refusals)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)
    first = torch.tensor(ours.tokens)
    turn = torch.cat([ids, first, prompt(9, seed=6, batch=2)], 1)
    longer = torch.cat([mask, torch.ones(2, 14, dtype=torch.int64)], 1)
    again = run(model, turn, 5, longer, past_key_values=ours.cache)
    assert again.tokens == run(twin, turn, 5, longer).tokens


# -- numbers of graphs


@pytest.mark.parametrize("door", ["compile", "plain"])
def test_one_graph_for_each_kind_and_batch_class(door: str) -> None:
    """Four lengths, batches of one, two and three, with and without padding: nothing recompiles after the second."""
    torch._dynamo.reset()
    model, method, draft = tiny(layers=1), METHOD, None
    if door == "compile":
        method, draft = specpass.SpecKV(budget=C, window=W, lookahead=L), tiny(seed=1, layers=1)
        compile_eager(model, method, draft)
    else:
        model.compile(backend=specpass.Backend(draft, method, lowering="eager"), dynamic=True)

    def generate(length: int, batch: int, pad: bool) -> None:
        ids = prompt(length, batch=batch)
        mask = torch.ones_like(ids)
        if pad:
            mask[0, : length // 3] = 0
        run(model, ids, 2, mask, past_key_values=new_cache(model, method))

    kinds = [(1, False), (2, False), (2, True)]
    for length in (60, 97, 21, 15):
        for batch, pad in kinds:
            generate(length, batch, pad)
    after_second = len(specpass.report(model).graphs)
    for length in (131, 260, 18, 9):
        for batch, pad in [*kinds, (3, True)]:
            generate(length, batch, pad)
    graphs = specpass.report(model).graphs
    assert len(graphs) == after_second
    found = Counter(record.kind for record in graphs)
    assert found["prefill"] <= len(kinds)
    assert found["short"] <= len(kinds)
    assert found["decode"] <= 2  # lengths, not masks, say what a step reads


def test_a_mask_of_ones_is_no_mask(model: Any) -> None:
    ids, graphs = prompt(60, batch=2), specpass.report(model).graphs
    call(model, ids, new_cache(model))
    before = len(graphs)
    call(model, ids, new_cache(model), attention_mask=torch.ones_like(ids))
    call(model, ids, new_cache(model), attention_mask=torch.ones_like(ids, dtype=torch.bool))
    assert len(graphs) == before


def test_appends_of_any_length_are_one_graph(model: Any) -> None:
    for length in (60, 75):
        cache = new_cache(model)
        call(model, prompt(length), cache)
        for count in (5, 9, 2, 14):
            call(model, prompt(count, seed=count), cache)
    assert Counter(record.kind for record in specpass.report(model).graphs)["append"] == 1


def test_a_one_token_prompt_is_a_prefill(model: Any, twin: Any) -> None:
    cache = new_cache(model)
    ours = run(model, prompt(1, seed=7), 5, past_key_values=cache)
    check_answer(ours, twin, prompt(1, seed=7), None)
    assert kept(cache)[0].tolist() == [[0], [0]]
    assert cache.get_seq_length() == 5
