"""score_importance: the attention that each prompt column gets from the rows that score."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, short
from graphs import HANDLE, IDS, LENGTHS, MASK, SNAPKV, SPECKV, C, L, State, W, check_contract
from tiny import tiny
from traces import prompt_graph

import specpass
from specpass.graph.edit import copy_module
from specpass.passes.facts import Drafted, Scores
from specpass.passes.score_importance import ScoreImportance
from specpass.rewrite import Refusal, Request
from specpass.testing.attention import probabilities_by_capture


class LastRow(specpass.SnapKV):
    """A method with a score of its own: the last row's dot products."""

    def score(self, query: Any, key: Any, value: Any, rows: Any, lengths: Any, scale: float) -> Any:
        grouped = query[:, :, -1:].unflatten(1, (key.shape[1], -1)).amax(2)
        return (grouped @ key.transpose(2, 3) * scale).squeeze(2).exp()


OWN = LastRow(budget=C, window=W)


def difference(method: Any, **options: Any) -> str:
    state = prompt_graph(method, **options).before("score_importance")
    before = copy_module(state.gm)
    return changes(before, state.apply(ScoreImportance()).gm)


def with_scores(state: State) -> State:
    return state.returning(scores=state.facts[Scores].nodes[0])


def test_text() -> None:
    assert_expected_inline(
        difference(SPECKV, mask=True),
        """\
+score_rows(pack_order[1], cat, 8, [])
+take_rows(add, score_rows)
+importance(take_rows, add, score_rows, pack_order[1], 8, 0.25, max)""",
    )


def test_numbers_of_weighed_scores() -> None:
    """Each column's score times the norm of its value."""
    weighed = specpass.SnapKV(budget=C, window=W, value_norms=True)
    found, plain = (
        with_scores(prompt_graph(method, mask=True).after("score_importance")).run(IDS, HANDLE, MASK)
        for method in (weighed, SNAPKV)
    )
    norms = plain["value_buffer.0"].unflatten(1, (2, -1))[:, :, : IDS.shape[1]].norm(dim=-1)
    torch.testing.assert_close(found["scores"], plain["scores"] * norms)


def test_text_of_what_outputs_lose() -> None:
    method = specpass.SpecKV(budget=C, window=W, lookahead=L, reconstruction=True)
    assert_expected_inline(
        difference(method, mask=True),
        """\
+score_rows(pack_order[1], cat, 8, [])
+take_rows(add, score_rows)
+reconstruction(take_rows, add, transpose, score_rows, pack_order[1], 8, 0.25, max, 0)""",
    )


def test_text_of_capped_logits() -> None:
    assert_expected_inline(
        difference(SNAPKV, family="gemma2", layer_types=("full_attention",)),
        """\
+score_rows(full_lengths, None, 8, [])
+take_rows(add, score_rows)
+importance(take_rows, add, score_rows, full_lengths, 8, 0.25, mean, None, None, 50.0, None)""",
    )


def test_text_of_a_methods_own_score() -> None:
    assert_expected_inline(
        difference(OWN),
        """\
+score_rows(full_lengths, None, 8, [])
+take_rows(add, score_rows)
+slice(take_rows, 0, 0, 9223372036854775807)
+slice(slice, 2, -1, 9223372036854775807)
+unflatten(slice, 1, [2, -1])
+amax(unflatten, [2])
+transpose(add, 2, 3)
+matmul(amax, transpose)
+mul(matmul, 0.25)
+squeeze(mul, 2)
+exp(squeeze)""",
    )


def test_count() -> None:
    state = prompt_graph(SPECKV, mask=True, layers=2).after("score_importance")
    check_count(state.gm, ["select"], score_rows=1, take_rows=2, importance=2, prefill_attention=2)
    state = prompt_graph(OWN, layers=2).after("score_importance")
    check_count(state.gm, ["importance"], score_rows=1, take_rows=2, exp=2)


def test_numbers_are_the_probabilities_of_the_window() -> None:
    found = with_scores(prompt_graph(SNAPKV, mask=True).after("score_importance")).run(IDS, HANDLE, MASK)
    for row, length in enumerate(LENGTHS):
        probabilities = probabilities_by_capture(tiny(layers=1), IDS[[row], -length:], W)[0]
        expected = probabilities.mean(1)[:, : length - W]
        torch.testing.assert_close(found["scores"][row, :, : length - W], expected, atol=1e-5, rtol=1e-4)
        assert not found["scores"][row, :, length - W :].any()  # the window is kept anyway, padding never


def test_numbers_are_the_probabilities_of_window_and_lookahead() -> None:
    ids, columns = IDS[:1], IDS.shape[1] - W
    found = with_scores(prompt_graph(SPECKV).after("score_importance")).run(ids, HANDLE)
    tokens = torch.cat([ids, found["lookahead_ids"]], 1)
    expected = probabilities_by_capture(tiny(layers=1), tokens, W + L)[0].amax(1)[:, :columns]
    torch.testing.assert_close(found["scores"][0, :, :columns], expected, atol=1e-5, rtol=1e-4)


def test_numbers_of_a_methods_own_score() -> None:
    state = prompt_graph(OWN).after("score_importance")
    site = state.facts[Scores].nodes[0]
    taken = next(node for node in state.gm.graph.nodes if short(node) == "take_rows")
    with_scores(state).returning(taken=taken, key=next(n for n in site.graph.nodes if short(n) == "fill").args[0])
    found = state.run(IDS, HANDLE)
    expected = OWN.score(found["taken"], found["key"], None, None, None, 0.25)
    torch.testing.assert_close(found["scores"], expected)


def test_leaves_methods_that_do_not_score_and_prompts_that_fit() -> None:
    streaming = specpass.StreamingLLM(budget=C)
    assert not ScoreImportance().applies(Request("prefill", streaming))
    assert difference(streaming) == ""
    assert difference(SNAPKV, kind="short") == ""


def test_leaves_capped_logits_to_methods_that_know_of_them() -> None:
    """A method's own score is told of no soft cap, and would score something else than attention."""
    state = prompt_graph(OWN, family="gemma2", layer_types=("full_attention",)).before("score_importance")
    with pytest.raises(Refusal, match=r"model.layers.0.self_attn: LastRow.score is not told of this layer's soft cap"):
        state.apply(ScoreImportance())


def test_alone() -> None:
    state = check_contract(ScoreImportance(), lambda: prompt_graph(SPECKV).before("score_importance"), Drafted)
    assert [short(node) for node in state.facts[Scores].nodes] == ["importance"]
