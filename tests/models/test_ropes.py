"""Rotary frequencies that follow the length: both sides of the switch, across it, and no trace of a lookahead."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from support import compile_eager, padded, run
from tiny import prompt, tiny

import specpass
from specpass.capture.rope import prepare_rope

SWITCH, C, W, NEW = 48, 24, 8, 6
COVERING = specpass.SpecKV(budget=96, window=W, lookahead=4)


def phi3() -> Any:
    """Long-rope: other frequencies from SWITCH + 1 tokens on."""
    factors = {"short_factor": [1.0] * 8, "long_factor": [1.0 + 3 * i for i in range(8)]}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": SWITCH, **factors}
    return random_of(
        transformers.Phi3Config(
            **sizes(512), rope_parameters=rope, original_max_position_embeddings=SWITCH, num_key_value_heads=2
        )
    )


def dynamic() -> Any:
    """Dynamic NTK: a base of its own for each length beyond SWITCH."""
    return tiny(
        layers=1,
        max_position_embeddings=SWITCH,
        rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4},
    )


def sizes(positions: int) -> dict[str, Any]:
    ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 1}
    return {"vocab_size": 128, "max_position_embeddings": positions, "initializer_range": 0.25, **shape, **ids}


def random_of(config: Any) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return transformers.AutoModelForCausalLM.from_config(config).float().eval().requires_grad_(False)


def gathered(model: Any, method: Any = COVERING) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, method, NEW, early_exit=False)


@pytest.mark.parametrize("make", [phi3, dynamic])
def test_exact_on_both_sides_and_across(make: Any) -> None:
    """The target drafts for itself: capturing or asking it leaves its frequencies alone."""
    target = make()
    model = compile_eager(target, COVERING, target)
    for size in (46, 60, 30, 47):  # 46 + 4 looks ahead beyond the switch, and crosses it
        ours, theirs = run(model, prompt(size), NEW, past_key_values=gathered(model)), run(make(), prompt(size), NEW)
        assert ours.tokens == theirs.tokens
        torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-3, rtol=1e-4)
    report = specpass.report(model)
    assert not report.refusals
    if make is dynamic:
        assert "its rotary frequencies follow the length" in report.interpreted
        assert ours.cache.lookahead_ids.tolist() == [row[:4] for row in ours.tokens]
    else:
        assert [graph.kind for graph in report.graphs] == ["prefill", "decode"]


def test_padded_beams_across_the_switch() -> None:
    target, how = dynamic(), {"num_beams": 2}
    model = compile_eager(target, COVERING, target)
    ids, mask = padded([prompt(46), prompt(30, seed=2)])
    ours = run(model, ids, NEW, mask, past_key_values=gathered(model), **how)
    assert ours.tokens == run(dynamic(), ids, NEW, mask, **how).tokens


def test_no_prompt_loses_its_budget() -> None:
    """transformers' Phi-3 leaves its cache behind where the frequencies switch."""
    model = compile_eager(phi3(), specpass.SnapKV(budget=C, window=W))
    for size in (46, 60):
        cache = run(model, prompt(size), NEW).cache
        assert isinstance(cache, specpass.BudgetCache)
        assert cache.layers[0].positions.shape == (1, 2, C)
        assert int(cache.get_seq_length()) == size + NEW - 1


@torch.no_grad()
def test_direct_calls_without_positions() -> None:
    method = specpass.SnapKV(budget=96, window=W)
    model, plain, found = compile_eager(phi3(), method), phi3(), []
    for each, cache in ((plain, transformers.DynamicCache(config=plain.config)), (model, gathered(model, method))):
        calls = [prompt(46), *(prompt(1, seed=i) for i in range(4))]  # the keys of the prompt keep their phases
        found.append(torch.stack([each(input_ids=ids, past_key_values=cache).logits[:, -1] for ids in calls]))
    torch.testing.assert_close(found[1], found[0], atol=1e-3, rtol=1e-4)


@torch.no_grad()
def test_plain_door_wants_positions() -> None:
    """A lookahead that only a length tells of would choose the frequencies."""
    model = phi3()
    prepare_rope(model)
    torch._dynamo.reset()
    model.compile(backend=specpass.Backend(tiny(seed=3, layers=1), COVERING, lowering="eager"), dynamic=True)
    ours = model(input_ids=prompt(46), past_key_values=gathered(model), logits_to_keep=1).logits
    torch.testing.assert_close(ours, phi3()(input_ids=prompt(46), logits_to_keep=1).logits)
    assert "pass position_ids" in str(specpass.report(model))
