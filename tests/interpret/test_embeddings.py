"""Prompts that come as embeddings: a lookahead is given as ids, which the model embeds as it does its own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import compile_eager, padded, run
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass import errors

W, C = 8, 24
IDS, MASK = padded([prompt(40), prompt(30, seed=2)])
AHEAD = prompt(4, batch=2, seed=7)
GEMMA = {"layers": 1, "layer_types": ("full_attention",)}


def spec(budget: int) -> Any:
    return specpass.SpecKV(budget=budget, window=W, lookahead=4)


def model_of(family: str) -> Any:
    return tiny(family, **GEMMA) if family == "gemma3" else tiny(family, layers=1)


def answer(model: Any, **kwargs: Any) -> Any:
    embeds = model.get_input_embeddings()(IDS)
    how = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True, **kwargs}
    return model.generate(inputs_embeds=embeds, attention_mask=MASK, **how)


def gathered(model: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, spec(64), 6, early_exit=False)


def positions(cache: Any) -> Tensor:
    return torch.stack([layer.positions for layer in cache.layers])


@pytest.mark.parametrize("family", ["gemma3", "llama"])  # Gemma scales its embeddings
def test_a_lookahead_behind_embeddings(family: str) -> None:
    plain, model = model_of(family), compile_eager(model_of(family), spec(64), tiny(seed=3, layers=1))
    cache = gathered(model)
    ours = answer(model, lookahead_ids=AHEAD, past_key_values=cache)
    assert torch.equal(ours.sequences, answer(plain).sequences)
    assert torch.equal(cache.lookahead_ids, AHEAD)
    beams = {"num_beams": 3, "num_return_sequences": 2}
    ours = answer(model, lookahead_ids=AHEAD, past_key_values=gathered(model), **beams)
    assert torch.equal(ours.sequences, answer(plain, **beams).sequences)


def test_embeddings_keep_what_their_ids_keep() -> None:
    model = compile_eager(model_of("llama"), spec(C), tiny(seed=3, layers=1))
    ids = run(model, IDS, 1, mask=MASK, lookahead_ids=AHEAD)
    embeds = answer(model, lookahead_ids=AHEAD, max_new_tokens=1)
    assert torch.equal(positions(embeds.past_key_values), positions(ids.cache))
    assert embeds.sequences.tolist() == ids.tokens
    report = specpass.report(model)
    assert not report.interpreted  # ids keep their graphs
    assert "inputs_embeds and a lookahead" in str(report)


def test_without_ids_both_fixes_are_named() -> None:
    draft = tiny(seed=3, layers=1)
    model = compile_eager(model_of("llama"), spec(C), draft)
    with pytest.raises(errors.UnsupportedCallError, match=r"lookahead_ids=\[B, L\].*SnapKV"):
        answer(model)
    with pytest.raises(errors.LookaheadError, match="has 1 rows and the batch has 2"):
        answer(model, lookahead_ids=AHEAD[:1])
    with pytest.raises(ValueError, match="lookahaed_ids"):
        answer(model, lookahaed_ids=AHEAD)
    specpass.compile(model, draft, specpass.SpecPC(budget=20, window=W), lowering="eager")
    with pytest.raises(errors.UnsupportedCallError, match="SpecPC chooses among token ids"):
        answer(model)
    specpass.compile(model, method=specpass.SnapKV(budget=C, window=W), lowering="eager")
    with pytest.raises(errors.LookaheadError, match="SnapKV looks at the prompt alone"):
        answer(model, lookahead_ids=AHEAD)
    specpass.restore(model)
    with pytest.raises(ValueError, match="lookahead_ids"):
        answer(model, lookahead_ids=AHEAD)
