"""Layers that read another layer's keys and values: its owner is pruned once, and everybody reads what it kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, padded, run
from three_methods import AHEAD, COVERING, PROMPTS, SNAP, SPEC, C, Models, check_rows_alone, new_cache
from tiny import prompt
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import specpass

WINDOW = 16
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "hidden_size": 64,
    "hidden_size_per_layer_input": 16,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "num_kv_shared_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "sliding_window": WINDOW,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "initializer_range": 0.25,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "gemma3n_text": {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0], "altup_num_inputs": 2},  # in graphs
    "gemma4_text": {"global_head_dim": 32},  # computes the last row alone of layers that share
}


def shared(family: str) -> Any:
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> Models:
    return Models(shared, request.param)


@pytest.fixture(scope="module")
def gemma4() -> Models:
    """Without padding in graphs, with it the second way."""
    return Models(shared, "gemma4_text")


def test_covering_budget_is_exact(models: Models) -> None:
    """Also where everything is drafted, scored and gathered."""
    model, (ids, mask) = models.compiled[COVERING], padded(PROMPTS)
    cache = new_cache(COVERING, model, AHEAD, early_exit=False)
    ours, theirs = run(model, ids, 4, mask=mask, past_key_values=cache), run(models.plain, ids, 4, mask=mask)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)


def test_every_reader_attends_to_the_kept_slots(gemma4: Models) -> None:
    """Against the plain model, whose masks hide what was dropped: of full layers, those that share among them."""
    ids, plain = PROMPTS[0], DynamicCache(config=gemma4.plain.config)
    ours = run(gemma4.compiled[SNAP], ids, past_key_values=new_cache(SNAP, gemma4.compiled[SNAP]))
    sliding, full = ours.cache.budgeted
    assert [len(ours.cache.layers), sliding.index, full.index] == [4, 0, 1]
    assert torch.equal(sliding.positions, torch.arange(60 - WINDOW, 60).expand(1, 2, WINDOW))
    assert full.positions.shape == (1, 2, C)
    first = call(gemma4.plain, ids, plain)
    torch.testing.assert_close(ours.logits[:, :1], first, atol=2e-4, rtol=1e-4)
    token = first.argmax(-1)
    seen = torch.zeros(1, 2, 60, dtype=torch.bool).scatter(2, full.positions, True)
    for step, expected in enumerate(ours.logits[0][1:]):
        seen = torch.cat([seen, torch.ones(1, 2, 1, dtype=torch.bool)], 2)
        masks = {"full_attention": seen.repeat_interleave(2, 1)[:, :, None], "sliding_attention": None}
        logits = call(gemma4.plain, token, plain, attention_mask=masks, position_ids=torch.tensor([[60 + step]]))
        torch.testing.assert_close(logits[0, 0], expected, atol=2e-4, rtol=1e-4)
        token = logits.argmax(-1)


def test_padded_batch_equals_rows(gemma4: Models) -> None:
    """Kept positions and tokens; the owner's queries choose, of the lookahead's as well."""
    check_rows_alone(gemma4, SPEC)


def test_padding_in_a_second_turn(models: Models) -> None:
    """It is overwritten only when all readers of a layer have read."""
    model, blocks = models.compiled[COVERING], [prompt(3, seed=4), prompt(6, seed=5)]
    cache, (ids, mask) = new_cache(COVERING, model, AHEAD, early_exit=False), padded(PROMPTS)
    call(model, ids, cache, attention_mask=mask)
    found = []
    for block, own in (padded(blocks), (torch.tensor([[5], [6]]), torch.ones(2, 1, dtype=torch.int64))):
        mask = torch.cat([mask, own], 1)
        told = (mask.cumsum(1) - 1).clamp(min=0)[:, -block.shape[1] :]
        found.append(call(model, block, cache, attention_mask=mask, position_ids=told))
    for row, (first, second) in enumerate(zip(PROMPTS, blocks, strict=True)):  # the plain windows count padding
        ids = torch.cat([first, second, torch.tensor([[5 + row]])], 1)
        expected = call(models.plain, ids, None, logits_to_keep=2)[0]
        torch.testing.assert_close(torch.cat(found, 1)[row], expected, atol=2e-4, rtol=1e-4)


def test_beams(gemma4: Models) -> None:
    model, ids = gemma4.compiled[SNAP], PROMPTS[0]
    beams = {"num_beams": 2, "max_new_tokens": 4, "attention_mask": torch.ones_like(ids)}
    found = model.generate(ids, past_key_values=new_cache(SNAP, model), **beams)
    assert found.shape == (1, 64)


def test_the_report(gemma4: Models) -> None:
    graphs, second = (gemma4.compiled[method] for method in (SNAP, SPEC))
    run(graphs, PROMPTS[0], 1)
    run(second, PROMPTS[0], 1, mask=padded(PROMPTS)[1][1:], past_key_values=new_cache(SPEC, second))
    assert specpass.report(graphs).interpreted == ""
    why = "model.layers.2.self_attn: the last rows alone are computed, over the cache of model.layers.0.self_attn"
    assert specpass.report(second).interpreted == why
    for model in (graphs, second):
        for owner in (0, 1):
            sites = (
                f"model.layers.{owner}.self_attn: its keys and values are read by model.layers.{owner + 2}.self_attn"
            )
            assert sites in str(specpass.report(model))
