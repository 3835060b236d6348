"""From Dynamo's graph to the IR that passes see: pre-dispatch ATen, symbolic sizes, inputs by their role."""

from __future__ import annotations

import re
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import fx
from torch._dynamo.exc import TensorifyScalarRestartAnalysis
from torch._dynamo.symbolic_convert import TensorifyState
from torch.fx.experimental.proxy_tensor import make_fx

from specpass.passes.graph import SPEC, find

# The order in which Hugging Face decoders take them, for callers that pass them by position.
ROLES = ("input_ids", "attention_mask", "position_ids")
_BY_NAME = re.compile(r"\['(input_ids|attention_mask|position_ids|inputs_embeds)'\]$")
_BY_ORDER = re.compile(r"\['args'\]\[(\d)\]$")
_BARE = re.compile(r"^L\['(\w+)'\]$")


def holds_cache_ops(gm: fx.GraphModule) -> bool:
    """Whether a BudgetCache was traced into this graph."""
    return bool(find(gm.graph, SPEC.fill, SPEC.append_kv))


def source_name(node: fx.Node) -> str:
    """Where Dynamo read an input from, e.g. L['kwargs']['input_ids']."""
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    if source is None:
        return ""
    name = source.name
    return name() if callable(name) else name


def role_of(name: str) -> str | None:
    """input_ids, attention_mask, position_ids or inputs_embeds; None for weights, sizes and the cache."""
    if found := _BY_NAME.search(name):
        return found.group(1)
    if (found := _BY_ORDER.search(name)) and int(found.group(1)) < len(ROLES):
        return ROLES[int(found.group(1))]
    return None


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
            prompt = role_of(source_name(node)) in ROLES and isinstance(example, torch.Tensor) and example.dim() == 2
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
    """Pre-dispatch ATen of Dynamo's graph, over its own fake inputs; placeholders keep their order."""
    inputs = [node for node in gm.graph.nodes if node.op == "placeholder"]
    values = [_value(node) for node in inputs]
    mode = next(value.fake_mode for value in values if isinstance(value, torch.Tensor))
    with mode, torch.no_grad(), fx_traceback.preserve_node_meta():
        traced = make_fx(lambda *args: fx.Interpreter(gm).run(*args), pre_dispatch=True)(*values)
    for old, new in zip(inputs, traced.graph.find_nodes(op="placeholder"), strict=True):
        new.meta.setdefault("val", _value(old))
        new.meta["specpass_source"] = source_name(old)
    return traced


def named_inputs(gm: fx.GraphModule) -> dict[str, fx.Node]:
    """Prompt inputs [B, S] by role; a mask that is not 2-D has no role."""
    found: dict[str, fx.Node] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        role = role_of(node.meta.get("specpass_source", ""))
        val = node.meta.get("val")
        if role == "inputs_embeds" or (role and isinstance(val, torch.Tensor) and val.dim() == 2):
            found[role] = node
    return found
