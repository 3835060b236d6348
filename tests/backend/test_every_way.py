"""Every way that generate() is called: by assistants, in chunks, with beams, streamers, without a cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import compile_eager, kept, run
from tiny import prompt, tiny
from transformers import TextIteratorStreamer

import specpass

C, W, BIG = 24, 8, 256
IDS = prompt(60, seed=0)


@pytest.fixture(scope="module")
def models() -> dict[int, Any]:
    """A pruned model, one whose budget covers everything, and their uncompiled twin (0)."""
    pruned = compile_eager(tiny(), specpass.SnapKV(budget=C, window=W))
    return {C: pruned, BIG: compile_eager(tiny(), specpass.SnapKV(budget=BIG, window=W)), 0: tiny()}


ASSISTED: dict[str, dict[str, Any]] = {
    "assistant": {"assistant_model": tiny(seed=7, layers=1)},
    "itself": {"assistant_model": tiny()},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
}


@pytest.mark.parametrize("how", ASSISTED)
def test_assisted_decoding_gives_the_models_own_greedy_tokens(models: dict[int, Any], how: str) -> None:
    """Rejected candidates leave no trace, those of the first call included; a repeating prompt has some accepted."""
    for ids in (IDS, prompt(12, seed=1).repeat(1, 5)):
        for budget in (C, BIG):
            plain = models[budget if budget == C else 0]
            expected = run(plain, ids, 20).tokens
            ours = run(models[budget], ids, 20, **ASSISTED[how])
            assert ours.tokens == expected, budget
            assert kept(ours.cache)[0].shape[1] == min(budget, 60)


def test_chunks_of_a_prompt_are_pruned_as_one(models: dict[int, Any]) -> None:
    for batch in (1, 2):
        ids = prompt(60, seed=2, batch=batch)
        mask = torch.ones_like(ids)
        mask[0, : 10 * (batch - 1)] = 0
        expected = run(models[C], ids, 6, mask)
        with pytest.warns(UserWarning, match="prefill_chunk_size bounds nothing"):
            ours = run(models[C], ids, 6, mask, prefill_chunk_size=16)
        assert ours.tokens == expected.tokens
        for one, other in zip(kept(ours.cache), kept(expected.cache), strict=True):
            assert torch.equal(one, other)


WAYS: dict[str, dict[str, Any]] = {
    "beams": {"num_beams": 3},
    "beam sampling": {"num_beams": 3, "do_sample": True},
    "several sequences": {"do_sample": True, "num_return_sequences": 3},
    "several beams": {"num_beams": 4, "num_return_sequences": 4},
    "constrained": {"prefix_allowed_tokens_fn": lambda batch, ids: [3, 5, 7, 11, 13]},
    "bad words": {"bad_words_ids": [[3], [5, 7]], "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "scores and hidden states": {"output_scores": True, "output_hidden_states": True},
    "without a cache": {"use_cache": False},
    "static cache": {"cache_implementation": "static"},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_covering_budget_is_the_plain_model_in_every_way(models: dict[int, Any], way: str) -> None:
    options = {"max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True, **WAYS[way]}
    found = []
    for model in (models[BIG], models[0]):
        torch.manual_seed(3)
        found.append(model.generate(IDS, **options))
    ours, plain = found
    assert torch.equal(ours.sequences, plain.sequences)
    for name in ("scores", "hidden_states"):
        if plain.get(name) is not None:
            for one, other in zip(getattr(ours, name), getattr(plain, name), strict=True):
                torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("door", ["compile", "plain"])
def test_arguments_by_position_are_the_models_own(door: str) -> None:
    """GPT-2 takes its cache second, Llama fourth."""
    method = specpass.SnapKV(budget=C, window=W)
    mask = torch.ones(2, 60, dtype=torch.int64)
    mask[0, :9] = 0
    ids, positions = prompt(60, batch=2), (mask.cumsum(1) - 1).clamp(min=0)
    for family in ("gpt2", "llama"):
        torch._dynamo.reset()
        model = tiny(family, layers=1)
        if door == "compile":
            compile_eager(model, method)
        else:
            model.compile(backend=specpass.Backend(None, method, lowering="eager"), dynamic=True)
        kept_of = []
        for by_name in (True, False):
            cache = specpass.BudgetCache(model.config, method, 6)
            named = {"attention_mask": mask, "position_ids": positions, "past_key_values": cache}
            order = ("past_key_values", "attention_mask", None, "position_ids")  # None: token_type_ids
            if family == "llama":
                order = ("attention_mask", "position_ids", "past_key_values")
            arguments = [named.get(str(name)) for name in order]
            with torch.no_grad():
                model(ids, **named) if by_name else model(ids, *arguments)
            kept_of.append(cache.layers[0].positions)
        assert torch.equal(*kept_of)
        assert not specpass.report(model).refusals


def test_positional_arguments_inference_mode_and_streamers(models: dict[int, Any]) -> None:
    class Words:
        def decode(self, ids: Any, **_: Any) -> str:
            return " ".join(map(str, ids))

    expected = run(models[C], IDS).tokens
    with torch.inference_mode():
        assert run(models[C], IDS).tokens == expected
        cache = specpass.BudgetCache(models[C].config, specpass.SnapKV(budget=C, window=W), 6)
        logits = models[C](IDS, torch.ones_like(IDS), None, cache).logits
        assert int(logits[0, -1].argmax()) == expected[0][0]
    streamer = TextIteratorStreamer(Words(), skip_prompt=True)
    models[C].generate(IDS, max_new_tokens=6, do_sample=False, streamer=streamer)
    assert "".join(streamer).split() == [str(token) for token in expected[0]]
