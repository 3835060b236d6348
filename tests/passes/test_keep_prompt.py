"""keep_prompt: of a prompt that fits, the target reads everything."""

from __future__ import annotations

from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, MASK, SNAPKV, SPECPC, C, assert_same, check_contract
from traces import prompt_graph

from specpass.graph.edit import copy_module
from specpass.passes.gather_prompt import KeepPrompt
from specpass.rewrite import Request

IDS, MASK = IDS[:, -20:], MASK[:, -20:].clone()
MASK[1, :7] = 0


def test_text() -> None:
    state = prompt_graph(SPECPC, kind="short").before("keep_prompt")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(KeepPrompt()).gm),
        """\
+keep_all(full_lengths, 1, 24)
+select(keep_all, 1, 0)
+zeros_like(full_lengths)
-read_prompt(add)""",
    )


def test_count() -> None:
    state = prompt_graph(SPECPC, kind="short", layers=2).after("keep_prompt")
    check_count(state.gm, ["read_prompt", "select_prompt"], keep_all=1, fill=2)


def test_numbers() -> None:
    state = prompt_graph(SPECPC, kind="short", mask=True).before("keep_prompt")
    before = state.run(IDS, HANDLE, MASK)
    found = state.apply(KeepPrompt()).run(IDS, HANDLE, MASK)
    assert found.pop("prompt_positions").tolist() == [
        [*range(length), *([-1] * (C - length))] for length in MASK.sum(1).tolist()
    ]
    assert found["shift"].tolist() == [0, 0]
    del before["prompt_positions"]
    assert_same(found, before, tolerance=0.0)


def test_leaves_prompts_that_do_not_fit_and_methods_that_read_everything() -> None:
    assert not KeepPrompt().applies(Request("short", SNAPKV))
    for state in (prompt_graph(SPECPC).before("keep_prompt"), prompt_graph(SNAPKV, kind="short").before("keep_prompt")):
        before = copy_module(state.gm)
        assert changes(before, state.apply(KeepPrompt()).gm) == ""


def test_alone() -> None:
    state = check_contract(KeepPrompt(), lambda: prompt_graph(SPECPC, kind="short", mask=True).before("keep_prompt"))
    check_count(state.gm, ["read_prompt"], keep_all=1)
