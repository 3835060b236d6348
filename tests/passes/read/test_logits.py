"""Soft caps (Gemma 2) and attention sinks (gpt-oss): captured, pruned and equal to the models' own eager attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support import check_answer, check_rules, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward as attention_with_sinks
from transformers.models.llama import modeling_llama

import specpass
import specpass.testing.prompt as ep
from specpass.testing import eager

C, W, L = 24, 8, 5


def make(family: str, seed: int = 0) -> Any:
    """Gemma 2 with full attention and a cap that bends its logits; Llama with the sinks of gpt-oss."""
    if family == "gemma2":
        return tiny("gemma2", seed=seed, attn_logit_softcapping=0.5, layer_types=["full_attention"] * 2)
    model = tiny("llama", seed=seed, attention="eager")
    for number, layer in enumerate(model.model.layers):
        layer.self_attn.sinks = torch.nn.Parameter(torch.tensor([-1.0, 2.0, 0.0, 3.0]) + number, requires_grad=False)
    return model


@pytest.fixture(autouse=True, scope="module")
def llama_with_sinks() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_llama, "eager_attention_forward", attention_with_sinks)
        yield


@pytest.fixture(scope="module", params=["gemma2", "sinks"])
def family(request: pytest.FixtureRequest, llama_with_sinks: None) -> str:
    torch._dynamo.reset()
    return str(request.param)


@pytest.fixture(scope="module")
def compiled(family: str) -> Any:
    return compile_eager(make(family), specpass.SpecKV(budget=C, window=W, lookahead=L), make(family, seed=1000))


def test_the_changes_matter(family: str) -> None:
    """What follows would hold for plain attention too if caps and sinks did nothing here."""
    model, plain, ids = make(family), make(family), prompt(60, seed=1)
    for module in plain.modules():
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = None
        if hasattr(module, "sinks"):
            module.sinks.fill_(-1e4)
    assert (model(ids).logits - plain(ids).logits).abs().max() > 1e-2


def test_kept_sets_and_answers_are_the_eager_ones(family: str, compiled: Any) -> None:
    twin, draft, ids = make(family), make(family, seed=1000), prompt(60, seed=60)
    ours = run(compiled, ids)
    lookahead, _ = eager.draft_lookahead(draft, ids, L)
    assert torch.equal(ours.cache.lookahead_ids, lookahead)
    reference = eager.select(twin, ids, C, lookahead, eager.Scoring(window=W), route="output")
    check_rules(kept(ours.cache), 60, C, W)
    check_selection(kept(ours.cache), reference, W)
    check_answer(ours, twin, ids, kept(ours.cache))
    assert not specpass.report(compiled).refusals


def test_a_budget_that_holds_the_prompt_is_exact(family: str, compiled: Any) -> None:
    ids = prompt(C, seed=2)
    cache = specpass.BudgetCache(
        compiled.config, specpass.SpecKV(budget=C, window=W, lookahead=L), max_new_tokens=6, early_exit=False
    )
    ours, full = run(compiled, ids, past_key_values=cache), run(make(family), ids)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)


def test_a_padded_batch_equals_its_rows_alone(compiled: Any) -> None:
    rows = [prompt(length, seed=length) for length in (60, 33, 12)]
    ids, mask = padded(rows)
    together = run(compiled, ids, mask=mask)
    for row, own in enumerate(rows):
        alone = run(compiled, own)
        for ours, theirs in zip(kept(together.cache, row), kept(alone.cache), strict=True):
            assert torch.equal(ours, theirs)
        assert together.tokens[row] == alone.tokens[0]


def test_under_inductor_as_in_eager_and_a_second_turn(family: str) -> None:
    torch._dynamo.reset()
    method, ids = specpass.SnapKV(budget=C, window=W), prompt(60, seed=4)
    inductor = specpass.compile(make(family), method=method)
    plain = compile_eager(make(family), method)
    ours, theirs = run(inductor, ids), run(plain, ids)
    assert ours.tokens == theirs.tokens
    torch.testing.assert_close(ours.logits, theirs.logits, atol=1e-4, rtol=1e-4)
    more = torch.cat([ids, torch.tensor(ours.tokens), prompt(5, seed=9)], 1)
    second = [run(model, more, past_key_values=first.cache) for model, first in ((inductor, ours), (plain, theirs))]
    assert second[0].tokens == second[1].tokens


def test_prompt_tokens_are_chosen_with_the_cap_and_the_sinks(family: str) -> None:
    """SpecPC: the draft's own attention, whose logits are changed, scores the prompt."""
    torch._dynamo.reset()
    how = ep.PromptScoring(window=W, kernel=5, neighbours=3, lookahead=2, first_layer=0)
    method = specpass.SpecPC(budget=C, **dataclasses.asdict(how))
    draft, ids = make(family, seed=1000), prompt(60, seed=5)
    ours = run(compile_eager(make(family), method, make(family, seed=1000)), ids)
    read = ep.choose(ep.pooled(ep.prompt_scores(draft, ids, how), how), C, how)
    assert ours.cache.prompt_positions[0].tolist() == read
    theirs = ep.answer(make(family), ids, read, len(ours.tokens[0]))
    assert ours.tokens[0] == theirs.tokens
    torch.testing.assert_close(ours.logits[0], theirs.logits, atol=1e-4, rtol=1e-4)


@dataclasses.dataclass(frozen=True)
class OwnScore(specpass.SnapKV):
    """A score of one's own, which is given queries and keys, not what the model does to their product."""

    @staticmethod
    def score(query: Any, key: Any, value: Any, rows: Any, lengths: Any, scale: float) -> torch.Tensor:
        return key.float().norm(dim=-1)


def test_a_score_of_ones_own_is_refused_rather_than_left_uncapped(family: str) -> None:
    torch._dynamo.reset()
    model, ids = compile_eager(make(family), OwnScore(budget=C, window=W)), prompt(60, seed=6)
    assert run(model, ids).tokens == run(make(family), ids).tokens
    assert "not told of this layer's soft cap, sinks or bias" in str(specpass.report(model))
