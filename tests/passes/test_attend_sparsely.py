"""attend_sparsely: a layer is scored first, and its queries then read a part of the prompt."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import HANDLE, IDS, LENGTHS, MASK, SPECKV, L, W, assert_same, check_contract
from traces import prompt_graph

from specpass.dialect.sparse import PrefillAttentionSparse
from specpass.graph.edit import copy_module
from specpass.ops.sparse import prefill_attention_sparse_onnx
from specpass.passes.attend_sparsely import AttendSparsely
from specpass.passes.facts import Scores
from specpass.rewrite import Request

V = 12  # prompts of more than 24 tokens are read sparsely
SPARSE = dataclasses.replace(SPECKV, sparse_prefill=V)


def difference(method: Any, **options: Any) -> str:
    state = prompt_graph(method, **options).before("attend_sparsely")
    before = copy_module(state.gm)
    return changes(before, state.apply(AttendSparsely()).gm)


def test_text() -> None:
    assert_expected_inline(
        difference(SPARSE, mask=True),
        """\
-prefill_attention(add, add, transpose, 0.25)
-reshape(prefill_attention, [sym_size, -1, sym_size, 16])
+select(importance, pack_order[1], 12, 0, 1, max)
+prefill_attention_sparse(add, add, transpose, select, pack_order[1], 0.25, 8, 4, 12)
+reshape(prefill_attention_sparse, [sym_size, -1, sym_size, 16])""",
    )


def test_count() -> None:
    state = prompt_graph(SPARSE, layers=2).after("gather_prune")
    check_count(state.gm, ["prefill_attention"], prefill_attention_sparse=2, importance=2, select=4, gather_kv=2)


def test_numbers() -> None:
    state = prompt_graph(SPARSE, mask=True).after("attend_sparsely")
    (site,) = PrefillAttentionSparse.find(state.gm.graph)
    scores = state.facts[Scores].nodes[0]
    parts = {name: getattr(site, name) for name in ("query", "key", "value", "columns", "lengths")}
    found = state.returning(scores=scores, out=site.node, **parts).run(IDS, HANDLE, MASK)
    assert found["lengths"].tolist() == list(LENGTHS)
    for row, length in enumerate(LENGTHS):
        for head, each in enumerate(found["scores"][row]):
            best = sorted(range(length), key=lambda at, each=each: (-float(each[at]), at))[:V]
            assert found["columns"][row, head].tolist() == sorted(best)
    expected = prefill_attention_sparse_onnx(*(found[name] for name in parts), site.scale, W, L, V)
    for row, length in enumerate(LENGTHS):
        own = slice(0, length + L)
        torch.testing.assert_close(found["out"][row, :, own], expected[row, :, own], atol=1e-5, rtol=1e-4)


def test_numbers_stay_where_all_is_read() -> None:
    wide = dataclasses.replace(SPECKV, sparse_prefill=LENGTHS[0])
    found, exact = (prompt_graph(method).after("specialize").run(IDS[:1], HANDLE) for method in (wide, SPECKV))
    assert_same(found, exact)


def test_leaves_what_reads_otherwise() -> None:
    assert not AttendSparsely().applies(Request("prefill", SPECKV))
    assert difference(SPARSE, family="gemma2", layer_types=("full_attention",)) == ""
    assert difference(SPARSE, kind="short") == ""


def test_alone() -> None:
    check_contract(AttendSparsely(), lambda: prompt_graph(SPARSE).before("attend_sparsely"))
