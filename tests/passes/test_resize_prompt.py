"""resize_prompt: the target reads the gathered tokens, whose number is a constant."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, IDS, MASK, SPECKV, SPECPC, C, W, by_head, check_contract
from support import call
from tiny import tiny
from traces import prompt_graph

import specpass
from specpass.graph.edit import copy_module
from specpass.graph.walk import depends, value
from specpass.passes.facts import Drafted, Inputs
from specpass.passes.resize_prompt import ResizePrompt
from specpass.rewrite import Refusal, Request

ORIGINAL = dataclasses.replace(SPECPC, positions="original")
BOTH = specpass.SpecKVPC(budget=12, prompt_budget=C, window=W, prompt_window=W, lookahead=3)


def test_text() -> None:
    assert_expected_inline(
        text(prompt_graph(SPECPC).after("resize_prompt").gm),
        """\
full_lengths(input_ids)
draft_prefill(input_ids, full_lengths, 3)
next_token(draft_prefill[0], to, 128, 0.0, 0, 0, [], 0)
draft_step(next_token[0], unsqueeze, masked_fill, full_lengths, draft_prefill[1], draft_prefill[2], draft_prefill[3])
merge_step(draft_prefill[4], draft_step[1], max)
next_token(draft_step[0], next_token[1], 128, 0.0, 0, 1, [], 0)
draft_step(next_token[0], unsqueeze, masked_fill, full_lengths, draft_prefill[1], draft_prefill[2], draft_prefill[3])
merge_step(merge_step, draft_step[1], max)
next_token(draft_step[0], next_token[1], 128, 0.0, 0, 2, [], 0)
select_prompt(merge_step, full_lengths, 24, 8, 6, 5, max)
count_kept(select_prompt)
take_ids(input_ids, select_prompt)
number_anew(select_prompt)
fill(add, transpose, handle, 24, 64, 0, False)
size(input_ids, 1)
prefill_attention(add, add, transpose, 0.25)
take_positions(slice, unsqueeze)""",
    )


def test_text_with_a_lookahead_and_given_positions() -> None:
    state = prompt_graph(BOTH, positions=True).before("resize_prompt")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(ResizePrompt()).gm),
        """\
-embedding(model_embed_tokens_weight, input_ids, 0)
-sym_size(input_ids, 1)
-unsqueeze(position_ids, 2)
+take_ids(input_ids, select_prompt)
+append_ids(take_ids, cat, count_kept)
+number_anew(select_prompt)
+append_positions(number_anew, count_kept, 3)
+embedding(model_embed_tokens_weight, append_ids, 0)
+sym_size(append_ids, 1)
+unsqueeze(append_positions, 2)
-sym_size(input_ids, 0)
-view(linear, [sym_size, sym_size, -1, 16])
+sym_size(append_ids, 0)
+view(linear, [sym_size, 27, -1, 16])
-view(linear, [sym_size, sym_size, -1, 16])
+view(linear, [sym_size, 27, -1, 16])
-view(linear, [sym_size, sym_size, -1, 16])
+view(linear, [sym_size, 27, -1, 16])
-reshape(prefill_attention, [sym_size, -1, sym_size, 16])
+reshape(prefill_attention, [sym_size, -1, 27, 16])
-reshape(transpose, [sym_size, sym_size, -1])
+reshape(transpose, [sym_size, 27, -1])""",
    )


def test_count() -> None:
    state = prompt_graph(SPECPC, mask=True, layers=2).after("resize_prompt")
    check_count(state.gm, ["append_ids"], take_ids=1, number_anew=1, prefill_attention=2, fill=2)
    state = prompt_graph(BOTH, layers=2).after("resize_prompt")
    check_count(state.gm, take_ids=1, append_ids=1, prefill_attention=2, fill=2)


def test_no_size_of_the_prompt_is_left_in_the_target() -> None:
    state = prompt_graph(SPECPC, mask=True, layers=2).after("resize_prompt")
    size, anchor = value(state.facts[Inputs].tokens).shape[1], state.facts[Drafted].anchor
    inside = [node for node in state.gm.graph.nodes if node >= anchor and "val" in node.meta]
    sized = [node.name for node in inside if depends(node.meta["val"], size) and "size" not in node.name]
    assert sized == []


@pytest.mark.parametrize("positions", [False, True])
def test_numbers_are_those_of_the_tokens_read_alone(positions: bool) -> None:
    told = [torch.arange(IDS.shape[1])[None]] if positions else []
    state = prompt_graph(SPECPC, positions=positions).after("resize_prompt")
    found = state.run(IDS[:1], HANDLE, *told)
    read = IDS[:1].gather(1, found["prompt_positions"])
    torch.testing.assert_close(found["logits"], call(tiny(layers=1), read, None), atol=1e-4, rtol=1e-4)
    assert by_head(found["key_buffer.0"]).shape[2] == C + 64
    assert int(found["seen"]) == IDS.shape[1]  # the cache counts the caller's tokens


def test_numbers_of_positions_that_keep_their_numbers() -> None:
    state = prompt_graph(ORIGINAL, positions=True).after("resize_prompt")
    found = state.run(IDS[:1], HANDLE, torch.arange(IDS.shape[1])[None])
    where = found["prompt_positions"]
    expected = call(tiny(layers=1), IDS[:1].gather(1, where), None, position_ids=where)
    torch.testing.assert_close(found["logits"], expected, atol=1e-4, rtol=1e-4)


def test_leaves_methods_that_read_the_whole_prompt() -> None:
    assert not ResizePrompt().applies(Request("prefill", SPECKV, 4))
    state = prompt_graph(SPECKV).before("resize_prompt")
    before = copy_module(state.gm)
    assert changes(before, state.apply(ResizePrompt()).gm) == ""


def test_leaves_a_model_that_cannot_be_told_positions() -> None:
    def make() -> Any:
        return prompt_graph(ORIGINAL).before("resize_prompt")

    with pytest.raises(Refusal, match="positions='original' needs position_ids"):
        make().apply(ResizePrompt())


def test_alone() -> None:
    state = check_contract(ResizePrompt(), lambda: prompt_graph(SPECPC, mask=True).before("resize_prompt"))
    check_count(state.gm, take_ids=1)
    found = state.run(IDS, HANDLE, MASK)
    assert found["logits"].shape == (2, 1, 128)
