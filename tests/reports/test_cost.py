"""The closed forms against what the compiled graphs do: FLOPs by torch's counter, bytes by storages."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import call, compile_eager, second_way
from tiny import prompt, tiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import specpass
import specpass.ops.flops
from specpass.backend import compile as backend
from specpass.kernels.decode.reference import attend
from specpass.kernels.importance.reference import importance
from specpass.observe.storage import cache_bytes
from specpass.ops import attention
from specpass.reports import cost
from specpass.sizes import Decoder

S, C, W, L, NEW = 300, 64, 8, 6, 5
NEAR = pytest.approx  # 2 % where stock models are counted: rotary tables and norms are left out of the forms


@pytest.fixture
def counts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """FLOPs of each call of a compiled graph, the draft's in the prefill included."""
    found: list[int] = []
    lower = backend.lower

    def counting(*args: Any, **options: Any) -> Any:
        lowered = lower(*args, **options)

        def counted(*inputs: Any) -> Any:
            with FlopCounterMode(display=False) as counter:
                out = lowered.run(*inputs)
            found.append(counter.get_total_flops())
            return out

        return dataclasses.replace(lowered, run=counted)

    monkeypatch.setattr(backend, "lower", counting)
    return found


METHODS = [
    specpass.SpecKV(C, window=W, lookahead=L),
    specpass.SnapKV(C, window=W),
    specpass.SnapKV(C, window=W, spread="heads"),
    specpass.SnapKV(C, window=W, spread="global"),
    specpass.SpecKV(C, window=W, lookahead=L, futures=3),
    specpass.StreamingLLM(C),
    specpass.SpecKV(0.25, window=W),
    specpass.PyramidKV(C, window=W, beta=4),
    specpass.SpecPC(C, window=W, first_layer=1),
    specpass.SpecPC(0.25, window=W, lookahead=L, first_layer=0),
    specpass.SpecKVPC(C, window=W, lookahead=L, prompt_budget=2 * C, prompt_window=2 * W, first_layer=1),
]


@pytest.mark.parametrize(
    ("method", "batch"),
    [(METHODS[0], 1), *((method, 2) for method in METHODS)],
    ids=lambda value: str(value) if isinstance(value, int) else f"{value.name}-{value.budget}",
)
def test_forms_are_what_runs(method: specpass.Method, batch: int, counts: list[int]) -> None:
    target, draft = tiny("qwen2", layers=3), tiny("llama", layers=2, seed=1)
    compile_eager(target, method, draft if method.drafts else None)
    cache = specpass.BudgetCache(target.config, method, max_new_tokens=NEW, prompt_length=S)
    call(target, prompt(S, batch=batch), cache)
    call(target, prompt(1, batch=batch), cache)
    costs = cost.costs_of(method, Decoder.of(target.config), Decoder.of(draft.config))
    assert costs is not None
    ours = {name: pair[1] for name, pair in costs.numbers(S, NEW, batch).items()}
    assert ours["prefill_flops"] + ours["draft_flops"] == counts[0]
    assert ours["decode_flops"] == counts[1]
    assert ours["kv_bytes"] == NEAR(cache_bytes(cache), rel=1e-3)  # two 0-d tensors are left out
    assert (ours["draft_flops"] > 0) == method.drafts


def test_a_lookahead_of_the_targets_own() -> None:
    """All FLOPs of a prompt: read once, L - 1 steps, window and lookahead once more."""
    method = specpass.SpecKV(C, window=W, lookahead="self")
    target = second_way(tiny("qwen2", layers=3), method)
    costs = cost.costs_of(method, Decoder.of(target.config))
    assert costs is not None
    numbers = costs.numbers(S, NEW, 2)
    cache = specpass.BudgetCache(target.config, method, max_new_tokens=NEW)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        call(target, prompt(S, batch=2), cache)
    assert numbers["prefill_flops"][1] + numbers["draft_flops"][1] == NEAR(counter.get_total_flops(), rel=0.02)
    assert numbers["kv_bytes"][1] == NEAR(cache_bytes(cache), rel=1e-3)
    whole = specpass.report(target).whole
    assert costs.held(S, NEW, 2) == NEAR(whole.whole_bytes + whole.slots_bytes, rel=1e-3)
    assert costs.held(C, NEW) == 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
def test_full_kv(family: str) -> None:
    target = tiny(family, layers=3)
    costs = cost.costs_of(specpass.SnapKV(C, window=W), Decoder.of(target.config))
    assert costs is not None
    full = {name: pair[0] for name, pair in costs.numbers(S, NEW).items()}
    plain = sdpa_kernel(SDPBackend.MATH)  # torch's counter knows no CPU flash attention
    with torch.no_grad(), plain, FlopCounterMode(display=False) as counter:
        cache = target(input_ids=prompt(S), logits_to_keep=1).past_key_values
    assert full["prefill_flops"] == NEAR(counter.get_total_flops(), rel=0.02)
    assert full["kv_bytes"] == NEAR(sum(t.nbytes for layer in cache.layers for t in (layer.keys, layer.values)))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        target(input_ids=prompt(1), past_key_values=cache)
    assert full["decode_flops"] == NEAR(counter.get_total_flops(), rel=0.02)


def test_weights_are_the_parameters_that_a_pass_reads() -> None:
    model = tiny("smollm", layers=4)
    sizes = Decoder.of(model.config)
    assert sizes is not None
    form = cost.Forms().weights().subs(cost.Forms().values(sizes))
    assert int(form) == NEAR(sum(p.nbytes for p in model.parameters()), rel=0.02)


def test_operators_formulas_are_their_references_counts() -> None:
    query, rows = torch.randn(2, 4, 10, 16), torch.arange(10).expand(2, -1)
    key, value = torch.randn(2, 2, 10, 16), torch.randn(2, 2, 10, 8)
    lengths = torch.full((2,), 10)
    spec = torch.ops.specpass
    for ours, theirs, args in (
        (spec.importance, importance, (query, key, rows, lengths, 4, 0.25, "max")),
        (spec.prefill_attention, attention.prefill_attention, (query, key, value, 0.25)),
        (spec.attend, attend, (query, key, value, lengths[:, None].expand(-1, 2), 0.25)),
    ):
        numbers = []
        for run in (ours, theirs):
            with FlopCounterMode(display=False) as counter:
                run(*args)
            numbers.append(counter.get_total_flops())
        assert numbers[0] == numbers[1] > 0


@pytest.mark.parametrize(
    "method",
    [specpass.SpecKV(1024, lookahead=32), specpass.SpecPC(1024), specpass.SpecKVPC(1024, lookahead=32)],
    ids=lambda method: method.name,
)
def test_break_even_is_where_the_sign_turns(method: specpass.Method) -> None:
    target, draft = Decoder(28, 1536, 12, 2, 128, 8960, 151936, 3, 2), Decoder(24, 896, 14, 2, 64, 4864, 151936, 3, 2)
    costs = cost.costs_of(method, target, draft)
    assert costs is not None

    def total(prompt: int, what: str, which: int, new: int) -> float:
        numbers = costs.numbers(prompt, new)
        if what == "kv_bytes":
            return numbers["kv_bytes"][which] + (0 if which else costs.numbers(new - 1, new)["kv_bytes"][0])
        steps = (new - 1) * numbers[f"decode_{what}"][which]
        return numbers[f"prefill_{what}"][which] + numbers[f"draft_{what}"][which] + steps

    # Only a compressed prompt saves FLOPs in the prefill: the draft reads all of it, the target a constant number.
    cases = [("kv_bytes", 256), ("bytes", 4096), *([("flops", 256)] if method.prompt else [])]
    for what, new in cases:
        start = costs.break_even(what, new)
        assert start is not None
        assert start > 1025
        assert total(start, what, 1, new) <= total(start, what, 0, new)
        assert total(start - 1, what, 1, new) > total(start - 1, what, 0, new)
    if method.prompt is None:
        assert costs.break_even("flops", 2) is None  # a draft's prefill is never won back in two tokens


def test_a_ratio_pays_from_there_on_whatever_its_rounding() -> None:
    target = Decoder(28, 1536, 12, 2, 128, 8960, 151936, 3, 2)
    costs = cost.costs_of(specpass.SnapKV(0.25), target)
    assert costs is not None
    start = costs.break_even("kv_bytes", 256)
    assert start is not None
    for length in range(start, start + 300):
        full = costs.numbers(length + 255, 256)["kv_bytes"][0]
        assert costs.numbers(length, 256)["kv_bytes"][1] <= full
    assert start > 64  # shorter ones fit the least budget


def test_a_prompt_that_fits_costs_what_full_kv_costs() -> None:
    sizes = Decoder(2, 64, 4, 2, 16, 96, 128, 3, 4)
    costs = cost.costs_of(METHODS[0], sizes, sizes)
    assert costs is not None
    numbers = costs.numbers(C, NEW)
    assert numbers["prefill_flops"][0] == numbers["prefill_flops"][1]
    assert numbers["draft_flops"] == (0, 0)


def test_what_has_no_closed_form_says_none() -> None:
    class Other(specpass.SnapKV):
        pass

    sizes = Decoder(2, 64, 4, 2, 16, 96, 128, 3, 4)
    assert cost.costs_of(Other(C), sizes) is None
    assert cost.costs_of(METHODS[0], sizes) is None  # SpecKV without a draft's sizes
