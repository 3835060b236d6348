"""lookahead="self": the target writes its own lookahead from a pruned cache, and it scores against all keys."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import (
    call,
    check_answer,
    check_rules,
    check_same,
    check_selection,
    compile_eager,
    kept,
    padded,
    run,
    second_way,
)
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass import errors
from specpass.testing import eager

C, W, NEW = 24, 8, 6
HOW = specpass.SpecKV(budget=C, window=W, lookahead="self")
LOOK, KEEP = dataclasses.replace(eager.SNAPKV, window=W), dataclasses.replace(eager.SPECKV, window=W)
DOCUMENT, PROMPTS = prompt(60), [prompt(70, seed=1), prompt(41, seed=2), prompt(55, seed=3)]


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(), HOW)


@pytest.fixture(scope="module")
def twin() -> Any:
    return tiny()


def reference(target: Any, ids: Tensor, length: int = NEW) -> tuple[list[int], eager.Selection]:
    """The lookahead that the target writes from what SnapKV keeps, and what it keeps by that, with all KV."""
    start = eager.prefill(target, ids, W)
    cheap = eager.select_shared(start, C, None, LOOK)
    tokens = eager.generate(target, ids, cheap.positions, length, eos_ids=(), start=start).tokens
    return tokens, eager.select_shared(start, C, torch.tensor([tokens]), KEEP)


def check(ours: Any, target: Any, ids: Tensor, row: int = 0) -> None:
    tokens, selection = reference(target, ids)
    assert ours.cache.lookahead_ids[row].tolist() == tokens
    check_rules(kept(ours.cache, row), ids.shape[1], C, W)
    check_selection(kept(ours.cache, row), selection, W)
    check_answer(ours, target, ids, kept(ours.cache, row), row)


def test_prompts_alone_and_as_a_batch(model: Any, twin: Any) -> None:
    """Positions, lookahead, tokens and logits are those of plain transformers; in a padded batch too."""
    for ids in PROMPTS:
        check(run(model, ids, NEW), twin, ids)
    ids, mask = padded(PROMPTS)
    ours = run(model, ids, NEW, mask)
    for row, own in enumerate(PROMPTS):
        check(ours, twin, own, row)
    report = specpass.report(model)
    assert report.replayed  # the answer begins as the lookahead does
    assert {record.kind for record in report.graphs} == {"decode"}
    assert len(report.graphs) == 2, "one for a row, one for several: the lookahead's steps are the answer's"


def test_the_lookahead_is_another_than_the_answer_and_than_snapkvs_choice(twin: Any) -> None:
    """Else the tests above would pass without a second look."""
    tokens, selection = reference(twin, PROMPTS[0], 12)
    cheap = eager.select(twin, PROMPTS[0], C, None, LOOK)
    assert tokens != eager.generate_full(twin, PROMPTS[0], 12, ()).tokens
    assert any(not torch.equal(*pair) for pair in zip(selection.positions, cheap.positions, strict=True))


def test_what_is_held_meanwhile(model: Any) -> None:
    run(model, PROMPTS[0], NEW)
    whole = specpass.report(model).whole
    number = 2 * 2 * 2 * 16 * 4  # layers, keys and values, KV heads, D, bytes
    assert (whole.rows, whole.tokens, whole.lookahead) == (1, 70, NEW)
    assert whole.whole_bytes == 70 * number
    assert (C + 64) * number < whole.slots_bytes < (C + 67) * number  # lengths and positions beside them
    assert "keys and values of 70 tokens lay on the device" in str(specpass.report(model))
    assert specpass.report(model).data()["whole"]["whole_bytes"] == whole.whole_bytes


def test_direct_calls_and_turns(twin: Any) -> None:
    """Logits of all rows, ids of the caller's, a short prompt, and tokens behind a pruned one."""
    model = second_way(tiny(), HOW)
    cache = specpass.BudgetCache(model.config, HOW, max_new_tokens=NEW)
    logits = call(model, PROMPTS[0], cache, logits_to_keep=0)
    torch.testing.assert_close(logits, call(twin, PROMPTS[0], None, logits_to_keep=0), atol=1e-4, rtol=1e-4)
    first = run(model, PROMPTS[0], NEW)
    turn = torch.cat([PROMPTS[0], torch.tensor(first.tokens), prompt(7, seed=6)], 1)
    before = kept(first.cache)
    second = run(model, turn, NEW, past_key_values=first.cache)
    assert all(torch.equal(*pair) for pair in zip(before, kept(second.cache), strict=True))
    given = prompt(NEW, seed=9)
    ours = run(model, PROMPTS[0], NEW, lookahead_ids=given)
    check_selection(kept(ours.cache), eager.select(twin, PROMPTS[0], C, given, KEEP), W)
    short = run(model, prompt(C), NEW)
    assert short.tokens == run(twin, prompt(C), NEW).tokens


def test_questions_behind_a_document_and_what_is_dropped() -> None:
    """They keep what one prompt keeps, and so does a turn that chooses among all of a conversation."""
    model = second_way(tiny(), HOW)
    prefix = specpass.read(model, DOCUMENT)
    for size in (11, 3):
        question = prompt(size, seed=size)
        whole = run(model, torch.cat([DOCUMENT, question], 1), NEW)
        check_same(whole, run(model, question, NEW, prefix=prefix))
    cache = specpass.BudgetCache(model.config, HOW, max_new_tokens=NEW, dropped="host")
    first = run(model, PROMPTS[0], NEW, past_key_values=cache)
    check_same(run(model, PROMPTS[0], NEW), first)
    turn = torch.cat([PROMPTS[0], torch.tensor(first.tokens), prompt(7, seed=6)], 1)
    check_same(run(model, turn, NEW), run(model, turn, NEW, past_key_values=cache))


@pytest.mark.parametrize("family", ["mistral-sliding", "gpt2", "qwen3"])
def test_families_and_sampling(family: str) -> None:
    """Windows, fused projections; and two samples of one seed are alike, those of another are not."""
    ids, twin = PROMPTS[1], tiny(family)
    model = second_way(tiny(family), HOW)
    ours = run(model, ids, NEW)
    if family != "mistral-sliding":  # whose oracle reads no windows
        tokens, selection = reference(twin, ids)
        assert ours.cache.lookahead_ids[0].tolist() == tokens
        check_selection(kept(ours.cache), selection, W)
    drawn = []
    for seed in (3, 3, 4):
        how = dataclasses.replace(HOW, temperature=2.0, seed=seed)
        drawn.append(run(second_way(tiny(family), how), ids, NEW).cache.lookahead_ids.tolist())
    assert drawn[0] == drawn[1] != drawn[2]


def test_bits_a_bound_and_no_verification(twin: Any) -> None:
    how = dataclasses.replace(HOW, verify=False)
    model = second_way(tiny(), how)
    ours = run(model, PROMPTS[1], NEW)
    check(ours, twin, PROMPTS[1])
    assert not specpass.report(model).replayed
    bound = specpass.BudgetCache(model.config, how, max_new_tokens=NEW, generated=8)
    assert run(model, PROMPTS[1], NEW, past_key_values=bound).tokens == ours.tokens
    few = specpass.BudgetCache(model.config, how, max_new_tokens=NEW, cache_bits=8)
    run(model, PROMPTS[1], NEW, past_key_values=few)
    assert few.budgeted[0].quantized


def test_what_it_does_not_go_with(model: Any) -> None:
    def named(*texts: str) -> Any:
        return pytest.raises(errors.LookaheadError, match="(?s)" + ".*".join(texts))

    with named("lookahead='self'", "spread='heads'", "Use a draft"):
        compile_eager(tiny(), dataclasses.replace(HOW, spread="heads"))
    with named("state cannot be taken back"):
        compile_eager(tiny("lfm2"), HOW)
    cache = specpass.BudgetCache(model.config, HOW, max_new_tokens=NEW)
    embeds = model.get_input_embeddings()(PROMPTS[0])
    with named("inputs_embeds"), torch.no_grad():
        model(inputs_embeds=embeds, past_key_values=cache)
    with named("position_ids"):
        call(model, PROMPTS[0], cache, position_ids=torch.arange(70)[None] + 5)
    assert not cache.filled
    plain = tiny(layers=1)
    plain.compile(backend=specpass.Backend(None, HOW, lowering="eager"), dynamic=True)
    with named("plain door", "specpass.compile"):
        run(plain, PROMPTS[0], NEW, past_key_values=specpass.BudgetCache(plain.config, HOW, max_new_tokens=NEW))
    with named("lookahead='self'", "written by the target", "a draft is given"):
        compile_eager(tiny(), HOW, tiny(seed=1))
    with named("an exported prefill", "ngram"):
        specpass.export_onnx(tiny(), None, HOW, "never")
