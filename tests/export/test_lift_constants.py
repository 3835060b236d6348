"""lift_constants: tensors that were made of numbers become inputs."""

from __future__ import annotations

from typing import Any

import torch
from expecttest import assert_expected_inline
from graph_text import changes, check_count
from graphs import State, alone, check_contract, small_graph

from specpass.export.lift_constants import Constants, LiftConstants
from specpass.graph.edit import copy_module

X = torch.arange(3.0)


def shifted(x: Any) -> Any:
    return x + torch.tensor([1.0, 2.0, 3.0]) * torch.tensor(2.0)


def lifted(state: State) -> State:
    alone(LiftConstants(), state)
    return state


def test_text() -> None:
    state = small_graph(shifted, X)
    before = copy_module(state.gm)
    assert_expected_inline(
        changes(before, lifted(state).gm),
        """\
-_tensor_constant0()
-lift_fresh_copy(_tensor_constant0)
-detach_(lift_fresh_copy)
-_tensor_constant1()
-lift_fresh_copy(_tensor_constant1)
-detach_(lift_fresh_copy)
-mul(detach_, detach_)
+mul(constant__tensor_constant0, constant__tensor_constant1)""",
    )


def test_count() -> None:
    state = lifted(small_graph(shifted, X))
    check_count(state.gm, ["lift_fresh_copy", "detach_"], add=1, mul=1)
    assert not state.gm.graph.find_nodes(op="get_attr")
    inputs = [node.target for node in state.gm.graph.find_nodes(op="placeholder")]
    assert inputs[1:] == [f"constant_{name}" for name in state.facts[Constants].tensors]


def test_numbers_stay() -> None:
    state = small_graph(shifted, X)
    expected = state.gm(X)
    lifted(state)
    assert torch.equal(state.gm(X, *state.facts[Constants].tensors.values()), expected)


def test_leaves_graphs_without_constants() -> None:
    state = small_graph(lambda x: x + 1, X)
    before = copy_module(state.gm)
    assert changes(before, lifted(state).gm) == ""
    assert not state.facts[Constants].tensors


def test_leaves_the_body_of_a_loop() -> None:
    """An attribute that is a graph is no tensor, and stays one."""
    state = small_graph(shifted, X)
    state.gm.add_submodule("body", copy_module(state.gm))
    first = next(node for node in state.gm.graph.nodes if node.op == "call_function")
    with state.gm.graph.inserting_before(first):
        body = state.gm.graph.get_attr("body")
    alone(LiftConstants(), state)
    assert state.gm.graph.find_nodes(op="get_attr") == [body]


def test_alone() -> None:
    state = check_contract(LiftConstants(), lambda: small_graph(shifted, X))
    assert len(state.facts[Constants].tensors) == 2
