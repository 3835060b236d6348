"""The exactness rules, on tiny random models in float32, against the eager reference beside this file."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import call, check_answer, check_rules, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass
from specpass.testing import eager

C, W, L = 24, 8, 5
METHODS = {
    "speckv": specpass.SpecKV(budget=C, window=W, lookahead=L),
    "snapkv": specpass.SnapKV(budget=C, window=W),
    "streaming": specpass.StreamingLLM(budget=C),
}
SCORING = {"speckv": eager.Scoring(window=W), "snapkv": eager.Scoring(window=W, reduce="mean", pool="avg")}


class Subject:
    """A compiled target, an uncompiled twin with the same weights, and the draft."""

    def __init__(self, family: str, name: str, layers: int = 2) -> None:
        self.name, self.method = name, METHODS[name]
        self.twin, self.draft = tiny(family, layers=layers), tiny(family, seed=1000, layers=1)
        self.model = compile_eager(tiny(family, layers=layers), self.method, self.draft if name == "speckv" else None)
        self.window = getattr(self.method, "window", 0) or C - 4

    def cache(self, **kwargs: Any) -> specpass.BudgetCache:
        return specpass.BudgetCache(self.model.config, self.method, max_new_tokens=6, **kwargs)

    def select(self, ids: torch.Tensor) -> eager.Selection:
        """What the formulas keep."""
        if self.name == "streaming":
            return eager.select_streaming(self.twin, ids.shape[1], C)
        lookahead = None
        if self.name == "speckv":
            lookahead = eager.draft_lookahead(self.draft, ids, L)[0]
        return eager.select(self.twin, ids, C, lookahead, SCORING[self.name])


@pytest.fixture(scope="module", params=METHODS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject("qwen2", request.param, layers=2 if request.param == "speckv" else 1)


@pytest.mark.parametrize("early_exit", [True, False])
@pytest.mark.parametrize("length", [C, C - 5])
def test_a_budget_that_holds_the_prompt_is_exact(subject: Subject, length: int, early_exit: bool) -> None:
    """early_exit=False sends the prompt through selection and gather, which must then be the identity."""
    ids = prompt(length, seed=length)
    ours = run(subject.model, ids, past_key_values=subject.cache(early_exit=early_exit))
    full = run(subject.twin, ids)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)
    for layer in kept(ours.cache):
        assert torch.equal(layer, torch.arange(length).expand(2, -1))


@pytest.mark.parametrize("length", [C + 1, 60, 61])
def test_kept_sets_and_tokens_are_the_eager_ones(subject: Subject, length: int) -> None:
    """C = S - 1, where one slot is dropped, and long prompts of one graph."""
    ids = prompt(length, seed=length)
    ours = run(subject.model, ids)
    assert ours.cache.get_seq_length() == length + 5  # the sixth token is not stored yet
    check_rules(kept(ours.cache), length, C, subject.window)
    check_selection(kept(ours.cache), subject.select(ids), subject.window)
    check_answer(ours, subject.twin, ids, kept(ours.cache))


@pytest.mark.parametrize("early_exit", [True, False])
def test_a_padded_batch_equals_its_rows_alone(subject: Subject, early_exit: bool) -> None:
    """Rows longer than the budget, shorter than it, and shorter than the window."""
    rows = [prompt(length, seed=length) for length in (60, 33, C, 12, W - 3)]
    ids, mask = padded(rows)
    together = run(subject.model, ids, mask=mask, past_key_values=subject.cache(early_exit=early_exit))
    for row, own in enumerate(rows):
        alone = run(subject.model, own)
        check_rules(kept(together.cache, row), own.shape[1], C, subject.window)
        for ours, theirs in zip(kept(together.cache, row), kept(alone.cache), strict=True):
            assert torch.equal(ours, theirs)
        assert together.tokens[row] == alone.tokens[0]
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
        if subject.name == "speckv" and own.shape[1] > C:
            assert torch.equal(together.cache.lookahead_ids[row], alone.cache.lookahead_ids[0])
            assert torch.equal(together.cache.lookahead_ids[[row]], eager.draft_lookahead(subject.draft, own, L)[0])


def test_a_padded_batch_that_fits_the_budget_is_exact(subject: Subject) -> None:
    rows = [prompt(length, seed=length) for length in (20, 9)]
    ids, mask = padded(rows)
    ours, full = run(subject.model, ids, mask=mask), run(subject.twin, ids, mask=mask)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)
    for row, own in enumerate(rows):
        check_rules(kept(ours.cache, row), own.shape[1], C, subject.window)


def test_the_first_logits_are_those_of_the_full_prefill(subject: Subject) -> None:
    ids = prompt(60, seed=60)
    full = call(subject.twin, ids, None, logits_to_keep=0)
    torch.testing.assert_close(call(subject.model, ids, subject.cache()), full[:, -1:], atol=1e-4, rtol=1e-4)
    for count in (0, 3) if subject.name == "speckv" else (0,):  # of all positions, of the last three
        ours = call(subject.model, ids, subject.cache(), logits_to_keep=count)
        torch.testing.assert_close(ours, full[:, -count:], atol=1e-4, rtol=1e-4)


def test_all_logits_of_a_padded_batch_stand_where_the_caller_put_the_tokens(subject: Subject) -> None:
    ids, mask = padded([prompt(60, seed=1), prompt(37, seed=2)])
    full = call(
        subject.twin, ids, None, attention_mask=mask, logits_to_keep=0, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
    )
    ours = call(subject.model, ids, subject.cache(), attention_mask=mask, logits_to_keep=0)
    assert ours.shape == full.shape
    real = mask.bool()
    torch.testing.assert_close(ours[real], full[real], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen3", "smollm", "mistral"])
@pytest.mark.parametrize("name", METHODS)
def test_families(family: str, name: str) -> None:
    torch._dynamo.reset()
    subject, ids = Subject(family, name, layers=2 if name == "speckv" else 1), prompt(57, seed=3)
    if name == "speckv":  # decoding is the same graph for all methods
        ours = run(subject.model, ids, 4)
        cache = ours.cache
        check_answer(ours, subject.twin, ids, kept(cache))
        assert torch.equal(cache.lookahead_ids, eager.draft_lookahead(subject.draft, ids, L)[0])
    else:
        cache = subject.cache()
        torch.testing.assert_close(call(subject.model, ids, cache), call(subject.twin, ids, None), atol=1e-4, rtol=1e-4)
    assert not specpass.report(subject.model).refusals
    check_rules(kept(cache), 57, C, subject.window)
    check_selection(kept(cache), subject.select(ids), subject.window)


@pytest.mark.parametrize(("reduce", "pool", "kernel"), [("mean", "avg", 7), ("max", "avg", 3), ("mean", "max", 1)])
def test_scoring_options_are_the_eager_ones(reduce: str, pool: str, kernel: int) -> None:
    ids, ahead, twin = prompt(57, seed=4), prompt(L, seed=5), tiny()
    method = specpass.SpecKV(budget=C, window=W, reduce=reduce, pool=pool, kernel=kernel, lookahead_ids=ahead)
    model = compile_eager(tiny(), method)
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=4)
    call(model, ids, cache)
    how = eager.Scoring(window=W, kernel=kernel, reduce=reduce, pool=pool)
    check_selection(kept(cache), eager.select(twin, ids, C, ahead, how), W)


def test_each_site_keeps_its_own_scale() -> None:
    """Scales that no head size explains, another in each layer, in the target and in its draft."""
    target, draft, twin = tiny(), tiny(seed=1000), tiny()
    for model in (target, draft, twin):
        for layer, scale in zip(model.model.layers, (0.4, 0.15), strict=True):
            layer.self_attn.scaling = scale
    model, ids = compile_eager(target, METHODS["speckv"], draft), prompt(57, seed=12)
    ours = run(model, ids)
    lookahead = eager.draft_lookahead(draft, ids, L)[0]
    assert torch.equal(ours.cache.lookahead_ids, lookahead)
    check_selection(kept(ours.cache), eager.select(twin, ids, C, lookahead, SCORING["speckv"]), W)
    check_answer(ours, twin, ids, kept(ours.cache))


def test_the_draft_that_is_the_target_keeps_what_the_oracle_keeps() -> None:
    target, twin, ids = tiny(), tiny(), prompt(60, seed=6)
    model = compile_eager(target, METHODS["speckv"], draft=target)
    ours = run(model, ids, L)
    answer = eager.generate_full(twin, ids, L, eos_ids=()).tokens
    assert ours.cache.lookahead_ids.tolist() == [answer]
    cache = specpass.BudgetCache(model.config, METHODS["speckv"], max_new_tokens=L, lookahead_ids=[answer])
    oracle = run(model, ids, L, past_key_values=cache)
    for a, b in zip(kept(ours.cache), kept(oracle.cache), strict=True):
        assert torch.equal(a, b)
    assert ours.tokens == oracle.tokens
    check_selection(kept(ours.cache), eager.select(twin, ids, C, torch.tensor([answer]), SCORING["speckv"]), W)


@pytest.fixture(scope="module")
def padded_vocab() -> Any:
    """A draft of another depth, width and vocabulary padding than its target's."""
    draft = tiny("qwen2", seed=7, layers=1, vocab=160, num_attention_heads=2, num_key_value_heads=1)
    return compile_eager(tiny(), METHODS["speckv"], draft), draft


def test_a_draft_with_a_padded_vocabulary_never_proposes_its_padding(padded_vocab: Any) -> None:
    model, draft = padded_vocab
    ids = torch.cat([prompt(57, seed=seed) for seed in (8, 9)])
    beyond = 0
    cache = specpass.BudgetCache(model.config, METHODS["speckv"], max_new_tokens=4)
    call(model, ids, cache)
    for row in range(2):
        own = ids[[row]]
        beyond += int((eager.draft_lookahead(draft, own, L)[0] >= 128).sum())
        lookahead = eager.draft_lookahead(draft, own, L, vocab_size=128)[0]
        assert torch.equal(cache.lookahead_ids[[row]], lookahead)
        check_selection(kept(cache, row), eager.select(tiny(), own, C, lookahead, SCORING["speckv"]), W)
    assert beyond > 0  # unmasked, this draft does leave the target's vocabulary


def test_rows_behind_the_drafts_eos_do_not_score() -> None:
    ids = torch.cat([prompt(57, seed=seed) for seed in (10, 11)])
    draft, twin = tiny(seed=1000), tiny()
    free = [eager.draft_lookahead(draft, ids[[row]], L)[0][0].tolist() for row in range(2)]
    draft.generation_config.eos_token_id = [free[0][1], free[1][2], 127]  # each row ends inside its lookahead
    draft.generation_config.pad_token_id = pad = 77  # a token that would score: the pad id's embedding is zero
    model = compile_eager(tiny(), METHODS["speckv"], draft)
    cache = specpass.BudgetCache(model.config, METHODS["speckv"], max_new_tokens=4)
    call(model, ids, cache)
    for row in range(2):
        lookahead, valid = eager.draft_lookahead(draft, ids[[row]], L, pad)
        assert valid < L
        assert torch.equal(cache.lookahead_ids[[row]], lookahead)
        check_selection(kept(cache, row), eager.select(twin, ids[[row]], C, lookahead[:, :valid], SCORING["speckv"]), W)
        alone = specpass.BudgetCache(model.config, METHODS["speckv"], max_new_tokens=4)
        call(model, ids[[row]], alone)
        assert all(torch.equal(a, b) for a, b in zip(kept(cache, row), kept(alone), strict=True))
