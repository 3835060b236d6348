"""specialize: what nobody reads goes, and layers are alike."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, text
from graphs import HANDLE, IDS, SNAPKV, SPECPC, assert_same, check_contract, stored
from traces import prompt_graph, step_graph

from specpass.dialect.cache import Advance, Size
from specpass.graph.edit import copy_module
from specpass.graph.walk import module_path
from specpass.passes.specialize import Specialize

TOKENS = torch.tensor([[5], [9]])


def test_text() -> None:
    state = step_graph(SNAPKV).before("specialize")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(Specialize()).gm),
        """\
-append_kv(key_buffer_0, value_buffer_0, lengths_0, add, transpose, handle)
+append_kv(key_buffer_0, value_buffer_0, lengths_0, add, transpose, None)""",
    )


def test_text_of_a_compressed_prompt() -> None:
    state = prompt_graph(SPECPC).before("specialize")
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, state.apply(Specialize()).gm),
        """\
-number_anew(select_prompt)
-sym_size(take_ids, 1)""",
    )


def test_count() -> None:
    state = step_graph(SNAPKV, layers=2).after("specialize")
    check_count(state.gm, append_kv=2, attend=2, advance=1)
    handle = state.gm.graph.find_nodes(op="placeholder")[1]
    assert (handle.target, len(handle.users)) == ("handle", 0)
    for view, traced in ((Size, prompt_graph(SNAPKV, layers=2)), (Advance, step_graph(SNAPKV, layers=2))):
        assert [module_path(call.node) for call in view.find(traced.after("specialize").gm.graph)] == [""]


def test_numbers_stay() -> None:
    state = prompt_graph(SNAPKV).before("specialize")
    before = state.run(IDS, HANDLE)
    assert_same(state.apply(Specialize()).run(IDS, HANDLE), before, tolerance=0.0)
    mine, theirs = ([TOKENS, HANDLE, torch.tensor(60), *stored(24, 24)] for _ in range(2))
    state = step_graph(SNAPKV).before("specialize")
    before = state.run(*theirs)
    assert_same(state.apply(Specialize()).run(*mine), before, tolerance=0.0)
    for ours, other in zip(mine, theirs, strict=True):  # what is written in place
        assert torch.equal(ours, other)


def test_leaves_what_writes_in_place_and_what_is_read() -> None:
    """append_kv and advance have no readers, and are no dead code; a second time there is nothing to do."""
    state = step_graph(SNAPKV).after("specialize")
    before = copy_module(state.gm)
    assert changes(before, state.apply(Specialize()).gm) == ""
    assert_expected_inline(
        text(state.gm),
        """\
append_kv(key_buffer_0, value_buffer_0, lengths_0, add, transpose, None)
advance(seen, None, 1)
attend(add, view, view, lengths_0, 0.25)""",
    )


def test_alone() -> None:
    check_count(check_contract(Specialize(), lambda: step_graph(SNAPKV).before("specialize")).gm, append_kv=1)
