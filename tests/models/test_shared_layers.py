"""Layers that read another layer's keys and values: its owner is pruned once, and everybody reads what it kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, compile_eager, padded, run
from tiny import prompt
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

import specpass

W, C, L, WINDOW = 8, 24, 5, 16
PROMPTS = [prompt(60), prompt(44, seed=1)]
AHEAD = prompt(L, batch=2, seed=7)
COVERING = specpass.SpecKV(budget=128, window=W, lookahead_ids=AHEAD[:1])
SNAP, SPEC = specpass.SnapKV(budget=C, window=W), specpass.SpecKV(budget=C, window=W, lookahead_ids=AHEAD[:1])

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
    "gemma3n_text": {"activation_sparsity_pattern": [0.95, 0.0, 0.0, 0.0]},
    "gemma4_text": {"global_head_dim": 32},  # computes the last row alone of layers that share
}


def shared(family: str) -> Any:
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


class Models:
    """One family: the plain model, and the same under three methods."""

    def __init__(self, family: str) -> None:
        self.family, self.plain = family, shared(family)
        self.compiled = {method: compile_eager(shared(family), method) for method in (COVERING, SNAP, SPEC)}


@pytest.fixture(scope="module", params=FAMILIES)
def models(request: pytest.FixtureRequest) -> Models:
    return Models(request.param)


def new_cache(method: Any, model: Any, rows: torch.Tensor = AHEAD[:1], **kwargs: Any) -> specpass.BudgetCache:
    given = {"lookahead_ids": rows} if method.drafts else {}
    return specpass.BudgetCache(model.config, method, 8, **given, **kwargs)


@pytest.mark.parametrize("early_exit", [True, False])
def test_covering_budget_is_exact(models: Models, early_exit: bool) -> None:
    model = models.compiled[COVERING]
    for ids in PROMPTS:
        ours = run(model, ids, past_key_values=new_cache(COVERING, model, early_exit=early_exit))
        theirs = run(models.plain, ids)
        assert ours.tokens == theirs.tokens
        torch.testing.assert_close(ours.logits, theirs.logits, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("method", [SNAP, SPEC], ids=["snapkv", "speckv"])
def test_only_owners_are_stored_and_pruned(models: Models, method: Any) -> None:
    """The first answer is the full prompt's; all readers of a layer see the same slots."""
    model, plain = models.compiled[method], DynamicCache(config=models.plain.config)
    cache = new_cache(method, model)
    ours = call(model, PROMPTS[0], cache)
    torch.testing.assert_close(ours, call(models.plain, PROMPTS[0], plain), atol=1e-4, rtol=1e-4)
    sliding, full = cache.budgeted
    assert [len(cache.layers), sliding.index, full.index] == [4, 0, 1]
    assert torch.equal(sliding.positions, torch.arange(60 - WINDOW, 60).expand(1, 2, WINDOW))
    assert (full.lengths == C).all()
    assert torch.equal(full.positions[..., -W:], torch.arange(60 - W, 60).expand(1, 2, W))


def test_every_reader_attends_to_the_kept_slots(models: Models) -> None:
    """Against the plain model, whose masks hide what was dropped: of full layers, those that share among them."""
    ids, plain = PROMPTS[0], DynamicCache(config=models.plain.config)
    ours = run(models.compiled[SNAP], ids, past_key_values=new_cache(SNAP, models.compiled[SNAP]))
    token, size = call(models.plain, ids, plain).argmax(-1), ids.shape[1]
    seen = torch.zeros(1, 2, size, dtype=torch.bool).scatter(2, ours.cache.budgeted[1].positions, True)
    for step, expected in enumerate(ours.logits[0][1:]):
        seen = torch.cat([seen, torch.ones(1, 2, 1, dtype=torch.bool)], 2)
        masks = {"full_attention": seen.repeat_interleave(2, 1)[:, :, None], "sliding_attention": None}
        told = torch.tensor([[size + step]])
        logits = call(models.plain, token, plain, attention_mask=masks, position_ids=told)
        torch.testing.assert_close(logits[0, 0], expected, atol=2e-4, rtol=1e-4)
        token = logits.argmax(-1)


def test_second_turn_and_beams(models: Models) -> None:
    model, answers = models.compiled[COVERING], []
    for target in (model, models.plain):
        cache = new_cache(COVERING, model) if target is model else DynamicCache(config=target.config)
        ids, mask = padded([PROMPTS[0], PROMPTS[1]])
        first = target.generate(ids, attention_mask=mask, max_new_tokens=4, past_key_values=cache)
        second = torch.cat([first, prompt(7, batch=2, seed=3)], 1)
        mask = torch.cat([mask, mask.new_ones(2, second.shape[1] - mask.shape[1])], 1)
        turn = target.generate(second, attention_mask=mask, max_new_tokens=4, past_key_values=cache)
        beams = target.generate(PROMPTS[0], attention_mask=torch.ones_like(PROMPTS[0]), max_new_tokens=5, num_beams=3)
        answers.append((turn.tolist(), beams.tolist()))
    assert answers[0] == answers[1]


@pytest.mark.parametrize("method", [SNAP, SPEC], ids=["snapkv", "speckv"])
def test_padded_batch_equals_rows(models: Models, method: Any) -> None:
    model = models.compiled[method]
    ids, mask = padded(PROMPTS)
    batch = run(model, ids, mask=mask, past_key_values=new_cache(method, model, AHEAD))
    for row, own in enumerate(PROMPTS):
        alone = run(model, own, past_key_values=new_cache(method, model, AHEAD[row : row + 1]))
        assert batch.tokens[row] == alone.tokens[0]
        for layer, single in zip(batch.cache.budgeted, alone.cache.budgeted, strict=True):
            assert torch.equal(layer.positions[row], single.positions[0])


def test_report_says_who_reads_whose(models: Models) -> None:
    model = models.compiled[SPEC]
    run(model, PROMPTS[0])
    text = str(specpass.report(model))
    for owner in (0, 1):
        line = f"model.layers.{owner}.self_attn: its keys and values are read by model.layers.{owner + 2}.self_attn too"
        assert line in text
