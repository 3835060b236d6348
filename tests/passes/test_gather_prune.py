"""gather_prune: each layer keeps its K/V at the positions that were chosen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, IDS, LENGTHS, MASK, ROOM, SNAPKV, SPECPC, C, W, by_head, check_contract
from traces import prompt_graph, step_graph

import specpass
from specpass.errors import MethodHookError
from specpass.graph.edit import copy_module
from specpass.parallel.shards import Ranks
from specpass.passes.facts import Scores
from specpass.passes.gather_prune import GatherPrune
from specpass.rewrite.sites import Sites
from specpass.testing import eager

STREAMING = specpass.StreamingLLM(budget=C)
HEADS, GLOBAL = (specpass.SnapKV(budget=C, window=W, spread=spread) for spread in ("heads", "global"))
AHEAD = specpass.SpecKV(budget=C, window=W, lookahead=4, spread="heads")
PYRAMID = specpass.PyramidKV(budget=C, window=W)
CHOSEN = specpass.SnapKV(budget=C, window=W, share=0.9, reduce="max")
SHORT_IDS, SHORT_MASK = IDS[:, -20:], MASK[:, -20:]


class EveryOther(specpass.SnapKV):
    """A method with a selection of its own."""

    def select(self, scores: torch.Tensor, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        return torch.arange(budget).mul(2).expand(*scores.shape[:2], -1).contiguous()


class TooFew(EveryOther):
    def select(self, scores: torch.Tensor, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        return super().select(scores, lengths, budget - 1)


OWN, WRONG = (kind(budget=C, window=W) for kind in (EveryOther, TooFew))


def difference(method: Any, **options: Any) -> str:
    state = prompt_graph(method, **options).before("gather_prune")
    before = copy_module(state.gm)
    return changes(before, state.apply(GatherPrune()).gm)


def test_text() -> None:
    assert_expected_inline(
        difference(SNAPKV, mask=True),
        """\
-fill(add, transpose, handle, 24, 64, 0, False)
+select(importance, pack_order[1], 24, 8, 7, avg)
+gather_kv(add, transpose, select, 64)""",
    )


def test_text_of_a_compressed_prompt() -> None:
    assert_expected_inline(
        difference(SPECPC),
        """\
-fill(add, transpose, handle, 24, 64, 0, False)
+keep_all(count_kept, 2, 24)
+gather_kv(add, transpose, keep_all, 64)
+map_positions(keep_all, select_prompt)""",
    )


def test_text_of_unlike_budgets() -> None:
    assert_expected_inline(
        difference(PYRAMID, mask=True, layers=2),
        """\
-fill(add, transpose, handle, 39, 64, 0, False)
+select(importance, pack_order[1], 39, 8, 7, avg)
+keep_short_rows(select, pack_order[1], 24)
+gather_kv(add, transpose, keep_short_rows, 64)
-fill(add, transpose, handle, 9, 64, 1, False)
+select(importance, pack_order[1], 9, 8, 7, avg)
+keep_short_rows(select, pack_order[1], 24)
+gather_kv(add, transpose, keep_short_rows, 64)""",
    )


def test_text_of_shared_budgets() -> None:
    """Of a layer's KV heads; where the answer may follow the lookahead, its columns are behind each of them."""
    assert_expected_inline(
        difference(AHEAD, mask=True),
        """\
-fill(add, transpose, handle, 24, 64, 0, False)
-head_offsets(fill[2], 64)
+select_heads(importance, pack_order[1], 24, 8, 7, max, 3)
+gather_ragged(add, transpose, select_heads, 48, 64)
+head_offsets(gather_ragged[2], 64)
+pack_heads(select_heads, 48)""",
    )
    assert_expected_inline(
        difference(GLOBAL, mask=True),
        """\
-fill(add, transpose, handle, 24, 64, 0, False)
-head_offsets(fill[2], 64)
+select_candidates(importance, pack_order[1], 56, 8, 7, avg, 3, 3)
+pack_heads(select_candidates[1], 112)
+gather_ragged(add, transpose, select_candidates[0], 112, 0)
+pack_heads(select_candidates[0], 112)
+share_layers([gather_ragged[0]], [gather_ragged[1]], [gather_ragged[2]], [pack_heads], [pack_heads], 24, 0, 64)""",
    )


def difference_of_ranks(method: Any) -> str:
    """Of the second of two processes."""
    state = prompt_graph(method, mask=True).before("gather_prune")
    before = copy_module(state.gm)
    state.facts.add(Ranks(None, "tp", 2, 1))
    return changes(before, state.apply(GatherPrune()).gm)


def test_text_of_budgets_that_several_processes_share() -> None:
    """Of two, each of which has these two heads: all candidates' worth goes around, and one rank may keep more."""
    assert_expected_inline(
        difference_of_ranks(HEADS),
        """\
-fill(add, transpose, handle, 24, 64, 0, False)
-head_offsets(fill[2], 64)
+select_candidates(importance, pack_order[1], 37, 8, 7, avg, 3, 3)
+all_gather_into_tensor(select_candidates[1], 2, tp)
+wait_tensor(all_gather_into_tensor)
+choose_heads(select_candidates[0], wait_tensor, 96, 1)
+gather_ragged(add, transpose, choose_heads, 74, 64)
+head_offsets(gather_ragged[2], 64)
+pack_heads(choose_heads, 74)""",
    )
    assert_expected_inline(
        difference_of_ranks(GLOBAL),
        """\
-fill(add, transpose, handle, 24, 64, 0, False)
-head_offsets(fill[2], 64)
+select_candidates(importance, pack_order[1], 56, 8, 7, avg, 3, 3)
+pack_heads(select_candidates[1], 112)
+gather_ragged(add, transpose, select_candidates[0], 112, 0)
+pack_heads(select_candidates[0], 112)
+stack([pack_heads])
+all_gather_into_tensor(stack, 2, tp)
+wait_tensor(all_gather_into_tensor)
+choose_shared([pack_heads], wait_tensor, 96, 1)
+share_layers([gather_ragged[0]], [gather_ragged[1]], [gather_ragged[2]], [choose_shared[0]], [], 37, 0, 64)""",
    )


def test_text_of_a_budget_that_is_chosen() -> None:
    assert_expected_inline(
        difference(CHOSEN, mask=True),
        """\
-fill(add, transpose, handle, 24, 64, 0, False)
+select_rungs(importance, importance, pack_order[1], 24, 8, 7, avg, [24])
+gather_kv(add, transpose, select_rungs[0], 64)""",
    )


def test_count() -> None:
    state = prompt_graph(SNAPKV, layers=2).after("gather_prune")
    check_count(state.gm, ["fill", "keep_all"], select=2, gather_kv=2, importance=2)
    state = prompt_graph(STREAMING, layers=2).after("gather_prune")
    check_count(state.gm, ["fill", "select", "importance"], select_recent=2, gather_kv=2)
    state = prompt_graph(OWN, layers=2).after("gather_prune")
    check_count(state.gm, ["fill", "select"], gather_kv=2, importance=2)


@pytest.mark.parametrize("method", [SNAPKV, STREAMING, OWN], ids=["SnapKV", "StreamingLLM", "own"])
def test_numbers_are_the_whole_prompts_at_the_kept_positions(method: Any) -> None:
    state = prompt_graph(method, mask=True).before("gather_prune")
    whole = state.run(IDS, HANDLE, MASK)
    found = state.apply(GatherPrune()).run(IDS, HANDLE, MASK)
    positions = found["positions.0"]
    assert positions.shape == (2, 2, C)
    assert (positions.diff(dim=-1) > 0).all()
    assert found["lengths.0"].tolist() == [[C, C], [C, C]]
    for part in ("key_buffer.0", "value_buffer.0"):
        kept, full = by_head(found[part]), by_head(whole[part])
        assert kept.shape[2] == C + ROOM
        index = positions[..., None].expand(-1, -1, -1, full.shape[3])
        assert torch.equal(kept[:, :, :C], full.gather(2, index))
    torch.testing.assert_close(found["logits"], whole["logits"], atol=0.0, rtol=0.0)


def test_numbers_of_the_positions_are_those_of_the_best_scores() -> None:
    state = prompt_graph(SNAPKV, mask=True).after("gather_prune")
    state.returning(scores=state.facts[Scores].nodes[0])
    found = state.run(IDS, HANDLE, MASK)
    for row, length in enumerate(LENGTHS):
        columns = found["scores"][row, :, None, :length]
        pooled = eager.pooled_scores(columns, length, eager.Scoring(W, SNAPKV.kernel, "max", SNAPKV.pool))
        assert eager.score_margin(pooled, found["positions.0"][row], W) >= -1e-6


def test_numbers_of_unlike_budgets() -> None:
    found = prompt_graph(PYRAMID, mask=True, layers=2).after("gather_prune").run(IDS, HANDLE, MASK)
    budgets = PYRAMID.layer_budgets(2)
    assert budgets[0] > C > budgets[1]
    for layer, budget in enumerate(budgets):
        kept = (found[f"positions.{layer}"] >= 0).sum(-1)
        assert kept.tolist() == [[min(budget, length)] * 2 for length in LENGTHS]


@pytest.mark.parametrize("method", [HEADS, GLOBAL], ids=["heads", "global"])
def test_numbers_of_shared_budgets(method: Any) -> None:
    """Every head's slots hold the whole prompt's keys and values at its positions, behind those of the head before."""
    layers = 2
    state = prompt_graph(method, mask=True, layers=layers).before("gather_prune")
    whole = state.run(IDS, HANDLE, MASK)
    found = state.apply(GatherPrune()).run(IDS, HANDLE, MASK)
    for row in range(2):
        begin = 0
        for layer in range(layers):
            begin = 0 if method is HEADS else begin
            starts, counts = (found[f"{part}.{layer}"][row].tolist() for part in ("starts", "counts"))
            assert found[f"lengths.{layer}"][row].tolist() == counts
            packed = found[f"kept_positions.{layer}"][row]
            for head, (start, count) in enumerate(zip(starts, counts, strict=True)):
                kept = packed[begin : begin + count]
                assert start == begin + ROOM * (head + (0 if method is HEADS else 2 * layer))
                begin += count
                assert (kept.diff() > 0).all()
                for part in ("key_buffer", "value_buffer"):
                    ours, full = found[f"{part}.{layer}"][row], by_head(whole[f"{part}.{layer}"])[row, head]
                    assert torch.equal(ours[start : start + count], full[kept])
        assert begin == 2 * C * (1 if method is HEADS else layers)


def test_leaves_a_prompt_that_fits_whole() -> None:
    """Nothing is chosen: every position is kept, whatever the method."""
    state = prompt_graph(SNAPKV, kind="short", mask=True).after("gather_prune")
    assert_expected_inline(
        text(state.gm, "keep_all", "select", "gather_kv"),
        """\
keep_all(pack_order[1], 2, 24)
gather_kv(add, transpose, keep_all, 64)""",
    )
    found = state.run(SHORT_IDS, HANDLE, SHORT_MASK)
    assert found["positions.0"].tolist() == [[[*range(20), *([-1] * (C - 20))]] * 2] * 2


def test_leaves_steps() -> None:
    state = step_graph(SNAPKV).before("gather_prune")
    before = copy_module(state.gm)
    assert changes(before, state.apply(GatherPrune()).gm) == ""


def test_leaves_a_method_that_selects_the_wrong_number() -> None:
    with pytest.raises(MethodHookError, match=r"TooFew.select returned .* expected positions \[B, K, C\]"):
        prompt_graph(WRONG).before("gather_prune").apply(GatherPrune())


def test_alone() -> None:
    state = check_contract(GatherPrune(), lambda: prompt_graph(SNAPKV, mask=True).before("gather_prune"), Scores)
    assert [site.cache.target.name() for site in state.facts[Sites].sites] == ["specpass::gather_kv"]
    state = check_contract(GatherPrune(), lambda: prompt_graph(STREAMING).before("gather_prune"))
    check_count(state.gm, select_recent=1)
