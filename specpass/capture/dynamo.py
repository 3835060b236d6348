"""From Dynamo's graph to the IR that passes see: pre-dispatch ATen with symbolic sizes."""

from __future__ import annotations

from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.fx.experimental.proxy_tensor import make_fx

from specpass.dialect.define import SPEC
from specpass.errors import PartialGraphError
from specpass.graph.roles import ROLES, role_of, source_name
from specpass.graph.walk import find


def holds_cache_ops(gm: fx.GraphModule) -> bool:
    """Whether a BudgetCache was traced into this graph."""
    return bool(find(gm.graph, SPEC.fill, SPEC.append_kv))


def restart_if_specialised(gm: fx.GraphModule, example_inputs: list[Any]) -> None:
    """Ask Dynamo to trace once more where its graph cannot be rewritten.

    Two cases: Python floats that became 0-d tensor inputs (they are made constants), and a prompt length that became
    a constant because the caller did not say dynamic=True (it is made a symbol).
    """
    restart = False
    floats = [node for node in gm.graph.nodes if node.op == "placeholder" and isinstance(_value(node), torch.SymFloat)]
    items = [node for node in gm.graph.nodes if node.op == "call_method" and node.target == "item"]
    for node in (*floats, *items):
        val = _value(node)
        if isinstance(val, torch.SymFloat):
            for symbol in val.node.expr.free_symbols:
                if not TensorifyState.should_specialize(symbol.name):
                    TensorifyState.specialize(symbol.name)
                    restart = True
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    if find(gm.graph, SPEC.fill):
        for node, example in zip(inputs, example_inputs, strict=True):
            role, dims = role_of(source_name(node)), example.dim() if isinstance(example, torch.Tensor) else 0
            prompt = (role in ROLES and dims == 2) or (role == "inputs_embeds" and dims == 3)
            constant = prompt and isinstance(_value(node).shape[1], int) and example.shape[1] > 1
            if constant and not getattr(example, "_specpass_marked", False):
                torch._dynamo.maybe_mark_dynamic(example, 1)
                example._specpass_marked = True
                restart = True
    if restart:
        raise TensorifyScalarRestartAnalysis


def _value(node: fx.Node) -> Any:
    return node.meta.get("example_value")


def trace_aten(gm: fx.GraphModule) -> fx.GraphModule:
    """Pre-dispatch ATen of Dynamo's graph, over its own fake inputs; placeholders keep their order.

    Raises: PartialGraphError: some operator is inside a vmap that is no part of the graph (masks of images' blocks).
    """
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [_value(node) for node in inputs]
    mode = next(value.fake_mode for value in values if isinstance(value, torch.Tensor))
    with mode, torch.no_grad(), fx_traceback.preserve_node_meta():
        traced = make_fx(lambda *args: fx.Interpreter(gm).run(*args), pre_dispatch=True)(*values)
    for node in traced.graph.find_nodes(op="get_attr"):
        held = getattr(traced, str(node.target))
        if isinstance(held, torch.Tensor) and torch._C._functorch.is_functorch_wrapped_tensor(held):
            raise PartialGraphError(
                f"{node.name} is a tensor inside a vmap (the model's mask is made so), which no graph can hold: use "
                "specpass.compile(model, ...), which prunes around the model's own forward."
            )
    for old, new in zip(inputs, traced.graph.find_nodes(op="placeholder"), strict=True):
        new.meta.setdefault("val", _value(old))
        new.meta["specpass_source"] = source_name(old)
    return traced
