"""The oracle itself, checked by identities that need no second implementation, and route against route."""

from __future__ import annotations

import pytest
import torch
from tiny import ALIBI, FULL, OTHERS, PAD, prompt, tiny, tiny_pair
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from specpass.testing.eager import (
    SNAPKV,
    SPECKV,
    Scoring,
    draft_lookahead,
    everything,
    generate,
    generate_full,
    kv_heads_of,
    pooled_scores,
    prefill,
    probabilities_by_capture,
    probabilities_by_output,
    score_margin,
    select,
    select_shared,
    select_streaming,
    top_positions,
)

SMALL = Scoring(window=8)


@pytest.mark.parametrize("family", [*FULL, *(family for family in OTHERS if family not in ("lfm2", "doge", *ALIBI))])
def test_tiny_models_attend_unevenly(family: str) -> None:
    model = tiny(family)
    layers = probabilities_by_output(model, prompt(40), rows=8)
    assert len(layers) == 2
    assert layers[0].shape == (kv_heads_of(model), 8 * 4 // kv_heads_of(model), 40)
    assert torch.stack(layers).amax(-1).mean() > 0.15  # uniform attention would give 1/37 on average


@pytest.mark.parametrize("family", FULL)
def test_both_routes_see_the_same_probabilities(family: str) -> None:
    model, ids = tiny(family), prompt(50, seed=1)
    for output, capture in zip(
        probabilities_by_output(model, ids, 12), probabilities_by_capture(model, ids, 12), strict=True
    ):
        torch.testing.assert_close(output, capture, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(capture.sum(-1), torch.ones_like(capture[..., 0]))
    assert model.config._attn_implementation == "sdpa"


def test_capture_leaves_the_registry_as_it_was() -> None:
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    with pytest.raises(IndexError):
        probabilities_by_capture(tiny(), torch.full((1, 9), 4096), 2)  # an id outside the vocabulary
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    assert "sdpa" not in ALL_ATTENTION_FUNCTIONS._local_mapping


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_full_budget_is_the_full_model(family: str) -> None:
    target, ids = tiny(family, layers=3), prompt(45, seed=2)
    full = generate_full(target, ids, 12)
    reference = target.generate(ids, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(ids))
    assert full.tokens == reference[0, 45:].tolist()
    kept = generate(target, ids, everything(target, 45, 2).positions, 12)
    assert kept.tokens == full.tokens
    torch.testing.assert_close(kept.logits, full.logits)
    assert torch.equal(select(target, ids, 45).positions[0][0], torch.arange(45))


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_pruned_cache_equals_a_mask_over_the_dropped_positions(family: str) -> None:
    """Decoding from a pruned cache is decoding in place with the dropped columns masked."""
    target, ids = tiny(family, layers=1, num_key_value_heads=1), prompt(40, seed=3)
    kept = select(target, ids, 16, how=SMALL).positions
    pruned = generate(target, ids, kept, 5)
    seen = torch.ones(45, 45, dtype=torch.bool).tril()
    dropped = torch.ones(40, dtype=torch.bool)
    dropped[kept[0][0]] = False
    seen[40:, :40] &= ~dropped
    both = torch.cat([ids, torch.tensor([pruned.tokens])], dim=1)
    logits = target(input_ids=both, attention_mask=seen[None, None]).logits[0, 39:-1]
    torch.testing.assert_close(pruned.logits, logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_draft_equal_to_target_keeps_what_the_oracle_keeps(family: str) -> None:
    target, ids = tiny(family, layers=3), prompt(60, seed=4)
    answer = torch.tensor([generate_full(target, ids, 6).tokens])
    lookahead, valid = draft_lookahead(target, ids, 6)
    assert valid == 6
    ours, oracle = (select(target, ids, 20, rows, SMALL) for rows in (lookahead, answer))
    assert all(torch.equal(a, b) for a, b in zip(ours.positions, oracle.positions, strict=True))


def test_draft_stops_at_its_first_eos_and_pads() -> None:
    _, draft = tiny_pair()
    ids = prompt(30, seed=5)
    free = draft_lookahead(draft, ids, 8)[0][0].tolist()
    stop = next(i for i, token in enumerate(free) if i and token not in free[:i])
    draft.generation_config.eos_token_id = [free[stop], 127]
    lookahead, valid = draft_lookahead(draft, ids, 8, PAD)
    assert valid == stop + 1
    assert lookahead[0].tolist() == free[: stop + 1] + [PAD] * (7 - stop)
    assert max(free) >= 64 > int(draft_lookahead(draft, ids, 8, vocab_size=64)[0].max())


@pytest.mark.parametrize("route", ["capture", "output"])
@pytest.mark.parametrize("how", [SPECKV, SNAPKV, Scoring(window=5, kernel=3, reduce="mean")])
def test_kept_positions_obey_the_rules(route: str, how: Scoring) -> None:
    target, ids = tiny("qwen2"), prompt(70, seed=6)
    chosen = select(target, ids, 40, None if how is SNAPKV else prompt(5, seed=7), how, route)
    for kept, scores in zip(chosen.positions, chosen.scores, strict=True):
        assert kept.shape == (2, 40)
        assert scores.shape == (2, 70 - how.window)
        assert (kept.diff(dim=-1) > 0).all()
        assert torch.equal(kept[0, -how.window :], torch.arange(70 - how.window, 70))
        assert score_margin(scores, kept, how.window) >= 0
        assert score_margin(-scores, kept, how.window) < 0


@pytest.mark.parametrize("lookahead", [None, 5])
def test_a_shared_prefill_changes_nothing(lookahead: int | None) -> None:
    target, ids = tiny("qwen2"), prompt(70, seed=8)
    rows = None if lookahead is None else prompt(lookahead, seed=9)
    start = prefill(target, ids, 8)
    for budget in (20, 70):
        alone, shared = select(target, ids, budget, rows, SMALL), select_shared(start, budget, rows, SMALL)
        for a, b in zip(alone.positions, shared.positions, strict=True):
            assert torch.equal(a, b)
        apart = generate(target, ids, alone.positions, 6)
        together = generate(target, ids, shared.positions, 6, start=start)
        assert apart.tokens == together.tokens
        torch.testing.assert_close(apart.logits, together.logits)
    assert start.cache.get_seq_length() == 70


def test_ties_go_to_the_lower_position() -> None:
    scores = torch.tensor([[1.0, 3.0, 3.0, 3.0, 1.0, 2.0, 2.0]])
    assert top_positions(scores, 9, 4, 2).tolist() == [[1, 2, 7, 8]]
    assert top_positions(scores, 9, 6, 2).tolist() == [[1, 2, 3, 5, 7, 8]]


def test_pooling_by_hand() -> None:
    rows = torch.tensor([[[0.0, 0.6, 0.0, 0.0, 0.4], [0.3, 0.0, 0.0, 0.0, 0.7]]])  # K 1, G * rows 2, T 5
    largest = pooled_scores(rows, 5, Scoring(window=1, kernel=3))
    torch.testing.assert_close(largest, torch.tensor([[0.6, 0.6, 0.6, 0.0]]))
    average = pooled_scores(rows, 5, Scoring(window=1, kernel=3, reduce="mean", pool="avg"))
    torch.testing.assert_close(average, torch.tensor([[0.15, 0.15, 0.1, 0.0]]))


def test_streaming_keeps_sinks_and_tail() -> None:
    kept = select_streaming(tiny(), 50, 10).positions[1][0]
    assert kept.tolist() == [0, 1, 2, 3, 44, 45, 46, 47, 48, 49]
    assert select_streaming(tiny(), 8, 10).positions[0].shape == (2, 8)
