"""name_nodes: ONNX nodes will be named by a model's own paths."""

from __future__ import annotations

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count, is_item, short
from graphs import HANDLE, IDS, SNAPKV, State, assert_same, check_contract, small_graph
from torch import fx
from traces import prompt_graph

from specpass.export.name_nodes import NameNodes, named
from specpass.graph.edit import copy_module
from specpass.graph.walk import module_path


def pruned(layers: int = 1) -> State:
    return prompt_graph(SNAPKV, layers=layers).after("specialize")


def names(gm: fx.GraphModule) -> dict[str, str]:
    """Path of each of specpass's calls, by operator."""
    return {short(node): module_path(node) for node in gm.graph.nodes if str(node.target).startswith("specpass.")}


def test_text() -> None:
    found = names(pruned().apply(NameNodes("draft")).gm)
    assert_expected_inline(
        "\n".join(f"{operator}: {path}" for operator, path in found.items()),
        """\
full_lengths: draft.full_lengths
score_rows: draft.score_rows
size: draft.size
prefill_attention: draft.model.layers.0.self_attn.prefill_attention
take_rows: draft.model.layers.0.self_attn.take_rows
importance: draft.model.layers.0.self_attn.importance
select: draft.model.layers.0.self_attn.select
gather_kv: draft.model.layers.0.self_attn.gather_kv""",
    )


def test_count() -> None:
    """A name for every call; no node more and none less."""
    state = pruned(layers=2)
    before = copy_module(state.gm)
    state.apply(NameNodes())
    assert changes(before, state.gm) == ""
    check_count(state.gm, select=2, gather_kv=2, importance=2)
    calls = [node for node in state.gm.graph.nodes if node.op == "call_function" and not is_item(node)]
    assert all(node.meta["stack_trace"] for node in calls)


def test_numbers_stay() -> None:
    state = pruned()
    before = state.run(IDS, HANDLE)
    assert_same(state.apply(NameNodes()).run(IDS, HANDLE), before, tolerance=0.0)


def test_leaves_results_and_the_original() -> None:
    """Items of a call have no node in ONNX; a copy is named, other readers of the graph keep the model's paths."""
    state = pruned()
    items = [node for node in state.gm.graph.nodes if is_item(node)]
    before = [(dict(node.meta.get("nn_module_stack") or {}), node.meta.get("stack_trace")) for node in items]
    traced = names(state.gm)
    copied = named(state.gm, "prefill", "draft")
    assert names(state.gm) == traced != names(copied)
    state.apply(NameNodes("draft"))
    assert [(dict(node.meta.get("nn_module_stack") or {}), node.meta.get("stack_trace")) for node in items] == before


def test_alone() -> None:
    state = check_contract(NameNodes("draft"), lambda: small_graph(lambda x: x + 1, torch.zeros(2)))
    assert [module_path(node) for node in state.gm.graph.nodes if node.op == "call_function"] == ["draft"]
