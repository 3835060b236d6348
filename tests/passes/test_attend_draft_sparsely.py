"""attend_draft_sparsely: the draft's own prompt is scored by its last rows, and then read in part."""

from __future__ import annotations

import dataclasses

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import IDS, LENGTHS, MASK, SPECKV, State, W, check_contract
from traces import draft_graphs

from specpass.dialect.sparse import PrefillAttentionSparse
from specpass.graph.edit import copy_module
from specpass.methods.speckvpc import SpecKVPC
from specpass.ops.rows import pack_ids, pack_order
from specpass.ops.sparse import prefill_attention_sparse_onnx
from specpass.passes.attend_sparsely import AttendDraftSparsely
from specpass.passes.pipeline import draft_prefill_passes

V = 12  # prompts of more than 24 tokens are read sparsely
SPARSE = dataclasses.replace(SPECKV, sparse_prefill=V)
PASS = AttendDraftSparsely(V, W)


def before() -> State:
    return draft_graphs(SPARSE)["prefill"].before("attend_draft_sparsely")


def test_text() -> None:
    state = before()
    own = copy_module(state.gm)
    assert_expected_inline(
        changes(own, state.apply(PASS).gm),
        """\
+score_rows(prompt_lengths, None, 8, [])
-prefill_attention(add, add, transpose, 0.25)
-reshape(prefill_attention, [sym_size, -1, sym_size, 16])
+take_rows(add, score_rows)
+importance(take_rows, add, score_rows, prompt_lengths, 8, 0.25, max)
+select(importance, prompt_lengths, 12, 0, 1, max)
+prefill_attention_sparse(add, add, transpose, select, prompt_lengths, 0.25, 8, 0, 12)
+reshape(prefill_attention_sparse, [sym_size, -1, sym_size, 16])""",
    )


def test_count() -> None:
    state = draft_graphs(SPARSE, 2)["prefill"].after("attend_draft_sparsely")
    check_count(state.gm, ["prefill_attention"], prefill_attention_sparse=2, importance=2, score_rows=1, keep_kv=2)


def test_numbers() -> None:
    order, lengths = pack_order(MASK, IDS)
    state = draft_graphs(SPARSE)["prefill"].after("attend_draft_sparsely")
    (site,) = PrefillAttentionSparse.find(state.gm.graph)
    parts = {name: getattr(site, name) for name in ("query", "key", "value", "columns")}
    found = state.returning(out=site.node, scores=site.columns.args[0], **parts).run(pack_ids(IDS, order), lengths, 4)
    for row, length in enumerate(LENGTHS):
        for head, each in enumerate(found["scores"][row]):
            best = sorted(range(length), key=lambda at, each=each: (-float(each[at]), at))[:V]
            assert found["columns"][row, head].tolist() == sorted(best)
    given = (*(found[name] for name in parts), lengths)
    expected = prefill_attention_sparse_onnx(*given, site.scale, W, 0, V)
    for row, length in enumerate(LENGTHS):
        torch.testing.assert_close(found["out"][row, :, :length], expected[row, :, :length], atol=1e-5, rtol=1e-4)


def test_leaves_a_draft_whose_target_reads_all() -> None:
    assert not [item for item in draft_prefill_passes(1, SPECKV) if isinstance(item, AttendDraftSparsely)]


def test_what_is_compressed_is_scored_behind_it() -> None:
    """By the queries and keys of layers that read sparsely."""
    method = SpecKVPC(budget=24, window=W, lookahead=4, prompt_budget=40, prompt_window=W, sparse_prefill=V)
    state = draft_graphs(method, 3)["prefill"].after("score_draft_prefill")
    check_count(state.gm, ["prefill_attention"], prefill_attention_sparse=3, importance=5, merge_layer=2)


def test_alone() -> None:
    check_contract(PASS, before)
