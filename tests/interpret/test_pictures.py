"""Prompts with images: the text decoder is pruned around the model's own forward, text alone keeps its graphs."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from pictures import IMAGE, PICTURES, Seen, vlm, with_pictures
from support import Run, call, compile_eager, padded, run
from tiny import prompt, tiny
from transformers import DynamicCache

import specpass
from specpass import errors
from specpass.cache.prompt import positions_of

W, C = 8, 24
COVERING, SNAP = specpass.SnapKV(budget=96, window=W), specpass.SnapKV(budget=C, window=W)
SPEC = specpass.SpecKV(budget=96, window=W, lookahead=4)
TEXTS = [prompt(30, vocab=110), prompt(20, seed=3, vocab=110)]


def answer(model: Any, seen: Seen, **kwargs: Any) -> Run:
    mask = kwargs.pop("mask", seen.beside["attention_mask"])
    beside = {name: given for name, given in seen.beside.items() if name != "attention_mask"}
    return run(model, seen.ids, mask=mask, **beside, **kwargs)


def gathered(model: Any, method: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, method, 6, early_exit=False)


@pytest.mark.parametrize("family", PICTURES)
def test_exact_at_a_covering_budget(family: str) -> None:
    seen, plain = with_pictures(family, TEXTS), vlm(family)
    model = compile_eager(vlm(family), COVERING)
    ours, theirs = answer(model, seen, past_key_values=gathered(model, COVERING)), answer(plain, seen)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    report = specpass.report(model)
    sites = report.prompts[0].sites
    assert len(sites) == 2
    assert all("vision" not in site.module and "visual" not in site.module for site in sites)
    assert all(site.exact in ("", "sliding window 24") for site in sites)
    assert "read by the model's own forward" in str(report)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "gemma3"])
def test_a_draft_that_sees_the_images(family: str) -> None:
    """The model itself: its lookahead is its own answer."""
    seen, target = with_pictures(family, TEXTS), vlm(family)
    theirs = answer(vlm(family), seen)
    model = compile_eager(target, SPEC, target)
    ours = answer(model, seen, past_key_values=gathered(model, SPEC))
    assert ours.tokens == theirs.tokens
    ends = [row.index(0) if 0 in row[:4] else 4 for row in theirs.tokens]  # 0 is the padding, a random answer holds it
    for row, end in enumerate(ends):
        assert ours.cache.lookahead_ids[row, :end].tolist() == theirs.tokens[row][:end]


def test_a_draft_of_text() -> None:
    seen, method = with_pictures("smolvlm", TEXTS), dataclasses.replace(SPEC, budget=C)
    model = compile_eager(vlm("smolvlm"), method, tiny(seed=3))
    together = answer(model, seen)
    assert all(layer.positions.shape == (2, 2, C) for layer in together.cache.layers)
    assert "it reads their placeholders as plain tokens" in str(specpass.report(model))


@pytest.mark.parametrize("spread", ["uniform", "global"])
def test_padded_rows_as_alone(spread: str) -> None:
    method = dataclasses.replace(SNAP, spread=spread)
    seen, model = with_pictures("qwen3_vl", TEXTS), compile_eager(vlm("qwen3_vl"), method)
    together, pixels = answer(model, seen), seen.beside["pixel_values"].chunk(2)
    for row, text in enumerate(TEXTS):
        own = with_pictures("qwen3_vl", [text])
        own.beside["pixel_values"] = pixels[row]
        assert answer(model, own).tokens[0] == together.tokens[row]
    counts = torch.stack([layer.prompt_slots for layer in together.cache.layers])  # [n, B, K]
    assert (counts.sum((0, 2)) == counts[:, 0].numel() * C).all()
    assert (counts == C).all() == (spread == "uniform")


@torch.no_grad()
def test_direct_calls_count_as_the_model_does() -> None:
    """Without position_ids: behind an image they are fewer than the tokens."""
    seen, found = with_pictures("qwen2_5_vl", TEXTS[:1]), []
    plain, model = vlm("qwen2_5_vl"), compile_eager(vlm("qwen2_5_vl"), COVERING)
    for each, cache in ((plain, DynamicCache(config=plain.config)), (model, gathered(model, COVERING))):
        rows = [each(input_ids=seen.ids, past_key_values=cache, **seen.beside).logits[:, -1]]
        rows += [each(input_ids=prompt(1, seed=i), past_key_values=cache).logits[:, -1] for i in (1, 2)]
        found.append(torch.stack(rows))
    torch.testing.assert_close(found[1], found[0], atol=1e-4, rtol=1e-4)


def test_text_keeps_its_graphs() -> None:
    ids, mask = padded(TEXTS)
    model, kinds = compile_eager(vlm("qwen2_5_vl", layers=1), COVERING), {"mm_token_type_ids": torch.zeros_like(ids)}
    ours = run(model, ids, 3, mask=mask, past_key_values=gathered(model, COVERING), **kinds)
    assert ours.tokens == run(vlm("qwen2_5_vl", layers=1), ids, 3, mask=mask, **kinds).tokens
    report = specpass.report(model)
    assert not report.interpreted
    assert not report.refusals
    assert {graph.kind for graph in report.graphs} == {"prefill", "decode"}


@pytest.mark.parametrize("family", ["gemma3", "paligemma"])
def test_text_with_types_that_masks_are_made_of(family: str) -> None:
    """Zeros are text to the one and a prefix that sees itself to the other: the model's masks say it."""
    ids, mask = padded(TEXTS)
    model, types = compile_eager(vlm(family), COVERING), {"token_type_ids": torch.zeros_like(ids)}
    ours = run(model, ids, mask=mask, past_key_values=gathered(model, COVERING), **types)
    assert ours.tokens == run(vlm(family), ids, mask=mask, **types).tokens
    report = specpass.report(model)
    assert all(site.exact in ("", "sliding window 24") for site in report.prompts[0].sites)
    assert not report.interpreted


def test_what_is_refused_by_name() -> None:
    seen, plain = with_pictures("gemma3", TEXTS[:1]), vlm("gemma3")
    model = compile_eager(vlm("gemma3"), specpass.SpecPC(budget=20, window=W), tiny(seed=3))
    assert answer(model, seen).tokens == answer(plain, seen).tokens
    assert "SpecPC drops prompt tokens, and " in str(specpass.report(model))
    specpass.compile(model, method=SNAP, lowering="eager")
    with pytest.raises(errors.UnsupportedCallError, match=r"prefill_chunk_size with "):
        answer(model, seen, prefill_chunk_size=16)
    first = answer(model, seen, new=3)
    talk = torch.cat([seen.ids, torch.tensor(first.tokens), seen.ids], 1)
    again = Seen(talk, {**seen.beside, "token_type_ids": (talk == IMAGE).long()})
    with pytest.raises(errors.UnsupportedCallError, match=r"an image comes behind a prompt that was pruned"):
        answer(model, again, mask=torch.ones_like(talk), past_key_values=first.cache)


def test_plain_door_refuses_positions_of_several_axes() -> None:
    ids, mask = padded(TEXTS)
    model, plain = vlm("qwen2_5_vl", layers=1), vlm("qwen2_5_vl", layers=1)
    told = {"attention_mask": mask, "position_ids": positions_of(mask).expand(3, -1, -1)}
    torch._dynamo.reset()
    model.compile(backend=specpass.Backend(method=SNAP, lowering="eager"), dynamic=True)
    ours = call(model, ids, specpass.BudgetCache(model.config, SNAP, 6), **told)
    torch.testing.assert_close(ours, call(plain, ids, None, **told))
    assert "position_ids have several axes" in str(specpass.report(model))
