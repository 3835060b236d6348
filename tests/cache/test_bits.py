"""A prompt in 8, 4 or 2 bits: bounds of the error, bytes, and steps against eager attention over dequantised slots."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import call, compile_eager, padded, run, second_way
from tiny import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import specpass
from specpass import errors
from specpass.backend import direct
from specpass.bits import BITS, GROUP, RANK, Layout, blocks_of
from specpass.kernels.bits.reference import dequantize, low_rank, quantize_kv
from specpass.observe.storage import cache_bytes
from specpass.passes.attend_slots import AttendSlots
from specpass.passes.gather_prune import GatherPrune
from specpass.reports.cost import costs_of
from specpass.rewrite import Refusal
from specpass.sizes import Decoder

C = 24
METHOD = specpass.SnapKV(budget=C, window=8)


@pytest.fixture(scope="module", params=BITS)
def model(request: Any) -> Any:
    return compile_eager(tiny(layers=1), METHOD, cache_bits=request.param)


def quantized(states: tuple[Tensor, Tensor], used: Tensor, bits: int, slots: int) -> tuple[Tensor, Tensor]:
    """Keys and values [B, K, C, D] and back again, in float32."""
    layout = Layout(bits, states[0].shape[3], states[1].shape[3], states[0].element_size())
    found = quantize_kv(*(own.flatten(1, 2) for own in states), used, slots, 0, bits)
    made = (dequantize(found[3], found[5], layout, name, states[0].dtype) for name in ("key", "value"))
    return tuple(each[:, :, :slots] for each in made)  # type: ignore[return-value]


@settings(max_examples=15, deadline=None)
@given(
    bits=st.sampled_from((8, 4)),
    dtype=st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
    slots=st.integers(1, 150),
    dims=st.tuples(st.sampled_from((8, 64, 72, 128)), st.sampled_from((8, 64, 96))),
    far=st.floats(0, 50),
    seed=st.integers(0, 1000),
)
def test_an_error_is_half_a_step_at_most(
    bits: int, dtype: torch.dtype, slots: int, dims: tuple[int, int], far: float, seed: int
) -> None:
    """Of each group's range, in the group's own numbers, with what its dtype rounds off; unused slots count nowhere."""
    dice = torch.Generator().manual_seed(seed)
    keys, values = ((torch.randn(2, 2, slots, dim, generator=dice) + far).to(dtype) for dim in dims)
    used = torch.randint(1, slots + 1, (2, 2), generator=dice)
    inside = (torch.arange(slots) < used[..., None])[..., None]
    keys, values = (torch.where(inside, states, 1000) for states in (keys, values))  # of an unused slot: anything
    group = dims[1] if dims[1] % GROUP else GROUP
    found = quantized((keys, values), used, bits, slots)
    shown = [states.float().masked_fill(~inside, float("nan")) for states in (keys, values)]
    blocks = [shown[0][:, :, start : start + GROUP] for start in range(0, slots, GROUP)]
    spans = [torch.cat([span(block, 2) for block in blocks], 2), span(shown[1].unflatten(-1, (-1, group)), -1)]
    for states, made, spread in zip(shown, found, (spans[0], spans[1].flatten(-2)), strict=True):
        step = spread / (2**bits - 1)
        slack = 2 * torch.finfo(dtype).eps * spread + 1e-4
        assert not ((made - states).abs() > 0.5 * step + slack).any()


def span(states: Tensor, axis: int) -> Tensor:
    """The range along an axis of what is not nan, of the shape of `states`."""
    low = states.nan_to_num(float("inf")).amin(axis, keepdim=True)
    high = states.nan_to_num(float("-inf")).amax(axis, keepdim=True)
    return (high - low).clamp(min=0).expand_as(states)


def test_two_bits_keep_outliers_and_a_low_rank() -> None:
    dice = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(1, 2, 128, 64, generator=dice) for _ in range(2))
    far = values.clone()
    far[:, :, ::7, 5] = 40.0  # one in a group: it is kept as it is, and widens no range
    used = torch.full((1, 2), 128)
    plain, made = (quantized((keys, own), used, 2, 128)[1] for own in (values, far))
    torch.testing.assert_close(made[:, :, ::7, 5], far[:, :, ::7, 5])
    assert (made - far).pow(2).mean() < 1.1 * (plain - values).pow(2).mean()
    exact = torch.randn(3, 40, RANK, generator=dice) @ torch.randn(3, RANK, 16, generator=dice)
    factor, basis = low_rank(exact, RANK)
    torch.testing.assert_close(factor @ basis, exact, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_steps_attend_to_what_the_codes_say(model: Any) -> None:
    """Tightly, in float32; of 8 bits the logits are nearly those of the cache as it was; one decode graph serves."""
    ids, bits = prompt(50), specpass.report(model).data()["cache_bits"]["bits"]
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=8, cache_bits=bits)
    call(model, ids, cache)
    plain, first = tiny(layers=1), torch.empty(0)
    held = DynamicCache(config=plain.config)
    for index, layer in enumerate(cache.layers):
        held.update(layer.keys[:, :, :C].clone(), layer.values[:, :, :C].clone(), index)
    before = len(specpass.report(model).graphs)
    for token in range(5):
        if token == 3:
            cache.reserve(70)  # the storage grows
        fed = torch.tensor([[3 + token]])
        ours = call(model, fed, cache)
        first = ours if token == 0 else first
        due = plain(fed, past_key_values=held, position_ids=torch.tensor([[50 + token]])).logits
        torch.testing.assert_close(ours, due, atol=1e-4, rtol=1e-4)
    assert len(specpass.report(model).graphs) == before + 1
    assert f"{bits} bits, groups of 64" in str(specpass.report(model))
    if bits == 8:  # nearly what they are unquantised
        whole = DynamicCache(config=plain.config)
        plain(ids, past_key_values=whole)
        for index, (own, layer) in enumerate(zip(whole.layers, cache.layers, strict=True)):
            place = layer.positions[..., None].expand(-1, -1, -1, own.keys.shape[3])
            pruned = DynamicCache(config=plain.config)
            pruned.update(own.keys.gather(2, place), own.values.gather(2, place), index)
        exact = plain(torch.tensor([[3]]), past_key_values=pruned, position_ids=torch.tensor([[50]])).logits
        assert (first - exact).abs().max() < 0.02 * exact.abs().max()
    if bits == 4:  # a second turn, and some of it taken back
        more = call(model, prompt(5, seed=4), cache, logits_to_keep=0)
        cache.crop(3)
        again = call(model, prompt(5, seed=4)[:, 2:], cache, logits_to_keep=0)
        torch.testing.assert_close(again, more[:, 2:], atol=1e-4, rtol=1e-4)
        assert cache.layers[0].lengths.tolist() == [[10] * cache.layers[0].kv_heads]


@pytest.mark.parametrize("model", [2], indirect=True)
def test_padded_rows_answer_as_they_do_alone(model: Any) -> None:
    """One of them shorter than the budget; then rows change places."""
    ids, mask = padded([prompt(50), prompt(12, seed=1)])
    together = run(model, ids, 4, mask)
    for row, own in enumerate((prompt(50), prompt(12, seed=1))):
        assert together.tokens[row] == run(model, own, 4).tokens[0]
    fed, told = torch.tensor([[3], [4]]), torch.tensor([[53], [15]])
    first = call(model, fed, together.cache, position_ids=told)
    together.cache.crop(1)
    together.cache.batch_select_indices(torch.tensor([1, 0]))
    again = call(model, fed.flip(0), together.cache, position_ids=told.flip(0))
    torch.testing.assert_close(again, first.flip(0))


@pytest.mark.parametrize("model", [4], indirect=True)
def test_what_is_generated_may_be_bounded(model: Any) -> None:
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=8, generated=8, cache_bits=4)
    for token, size in enumerate([50, *[1] * 12]):
        cache.reserve(1)
        call(model, prompt(size, seed=token), cache)
    assert (cache.layers[0].lengths <= 8).all()
    assert cache.layers[0].generated[0, 0].max() == 11
    assert cache.layers[0].keys.shape[2] == C + 8


@pytest.mark.parametrize(("bits", "budget"), [(8, 100), (4, 64), (2, 192)])
def test_bytes_are_those_of_the_formula(bits: int, budget: int) -> None:
    """Within 3 % of what a cache holds: codes, scales and what 2 bits need besides; the answer's room in its dtype."""
    target = tiny(layers=1)
    method = specpass.StreamingLLM(budget=budget)
    cache = specpass.BudgetCache(target.config, method, max_new_tokens=1, cache_bits=bits)
    call(compile_eager(target, method), prompt(budget + 9), cache)
    layer = cache.layers[0]
    heads, dim = layer.kv_heads, layer.key_buffer.shape[2]
    groups = blocks_of(budget)
    codes = 2 * groups * GROUP * dim * bits // 8
    scales = 4 * 2 * groups * (dim + GROUP)  # of a key group per channel, of a value group per token, in float32
    more = groups * (GROUP + dim) * (4 + 1) + 4 * RANK * 2 * (groups * GROUP + dim) if bits == 2 else 0
    due = heads * (codes + scales + more + 2 * 4 * 64 * dim)
    integers = 8 * heads * (budget + 2)  # positions, and two counts
    assert abs(cache_bytes(cache) - due - integers) <= 0.03 * due
    costs = costs_of(method, Decoder.of(target.config, 4), bits=bits)
    assert costs.numbers(budget + 9, 1)["kv_bytes"][1] == pytest.approx(cache_bytes(cache), rel=0.03)


@pytest.mark.parametrize("make", [compile_eager, second_way], ids=["graphs", "own forward"])
def test_rows_that_fit_keep_all_where_layers_have_unlike_budgets(make: Any) -> None:
    """A padded batch's layers then have more slots than their budget."""
    method = specpass.PyramidKV(budget=24, window=8, beta=4)
    ids, mask = padded([prompt(25), prompt(23, seed=1)])
    target = make(tiny(), method, cache_bits=8)
    cache = specpass.BudgetCache(target.config, method, max_new_tokens=2, cache_bits=8)
    run(target, ids, 1, mask, past_key_values=cache)
    assert [layer.counts[1].tolist() for layer in cache.layers] == [[23, 23], [23, 23]]


@pytest.mark.parametrize("family", ["gemma2", "bloom"])
def test_layers_that_cannot_be_quantised_stay_as_they_are(family: str) -> None:
    """A window's, and one whose attention adds a bias by positions; the report says which."""
    layers = 2 if family == "gemma2" else 1
    target = compile_eager(tiny(family, layers=layers), METHOD, cache_bits=8)
    ours = run(target, prompt(50), 2)
    found = [layer.quantized is not None for layer in ours.cache.budgeted]
    assert any(found) == (family != "bloom")
    assert not all(found)
    assert "1 layers in the model's dtype: " in str(specpass.report(target))


@pytest.mark.parametrize(
    ("method", "bits", "text"),
    [
        (METHOD, 3, "cache_bits=3: expected one of 8, 4, 2"),
        (METHOD, True, "cache_bits=True"),
        (specpass.SnapKV(budget=C, window=8, spread="heads"), 4, "spread='heads'"),
        (specpass.SnapKV(budget="auto"), 8, "share=0.95"),
    ],
)
def test_bits_that_there_are_not(method: Any, bits: Any, text: str) -> None:
    target = tiny(layers=1)
    for make in (
        lambda: specpass.compile(target, method=method, cache_bits=bits),
        lambda: specpass.BudgetCache(target.config, method, cache_bits=bits),
    ):
        with pytest.raises(errors.CacheBitsError, match=text):
            make()


def test_a_model_that_runs_uncompiled_keeps_the_same_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own forward reads prompt and steps; a question behind a document goes the same way."""
    graphs = run(compile_eager(tiny(layers=1), METHOD, cache_bits=4), prompt(50), 3)
    monkeypatch.setattr(direct, "why_uncompiled", lambda target: "no graphs")
    target = compile_eager(tiny(layers=1), METHOD, cache_bits=4)
    ours = run(target, prompt(50), 3)
    assert ours.tokens == graphs.tokens
    assert torch.equal(ours.cache.layers[0].codes, graphs.cache.layers[0].codes)
    prefix = specpass.read(target, prompt(50)[:, :41])
    assert run(target, prompt(50)[:, 41:], 3, prefix=prefix).tokens == graphs.tokens


def test_a_prompt_that_is_refused_is_not_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the plain door, where the model then runs exactly."""

    def refuse(*_: Any) -> None:
        raise Refusal("for the test")

    plain, target = run(tiny(layers=1), prompt(50), 3), tiny(layers=1)
    monkeypatch.setattr(GatherPrune, "run", refuse)
    monkeypatch.setattr(AttendSlots, "run", refuse)
    target.compile(backend=specpass.Backend(method=METHOD, lowering="eager"), dynamic=True)
    cache = specpass.BudgetCache(target.config, METHOD, max_new_tokens=3, cache_bits=4)
    ours = run(target, prompt(50), 3, past_key_values=cache)
    assert ours.tokens == plain.tokens
    assert cache.layers[0].quantized is None
