"""Graphs as short text, for goldens that another version of a model's code leaves as they are."""

from __future__ import annotations

import difflib
import operator
from collections import Counter
from collections.abc import Sequence
from typing import Any

from torch import fx


def count(gm: fx.GraphModule) -> Counter[str]:
    """Operators by name without overloads, submodules by theirs."""
    names = Counter[str]()
    for node in gm.graph.nodes:
        if node.op == "call_function" and not is_item(node):
            names[str(getattr(node.target, "overloadpacket", node.target))] += 1
        elif node.op == "call_module":
            names[node.target] += 1
    return names


def check_count(gm: fx.GraphModule, gone: Sequence[str] = (), **there: int) -> None:
    """None of the operators `gone` (by name, without namespace), and so many of those that are `there`."""
    found = Counter[str]()
    for name, number in count(gm).items():
        found[name.split(".")[-1]] += number
    assert {name: found[name] for name in (*gone, *there)} == dict.fromkeys(gone, 0) | there


def text(gm: fx.GraphModule, *names: str) -> str:
    """Calls of these operators (all of specpass's where none is named), one a line, as `line` spells them."""
    calls = [node for node in gm.graph.nodes if node.op in ("call_function", "call_module")]
    return "\n".join(line(node) for node in calls if (short(node) in names if names else is_ours(node)))


def changes(before: fx.GraphModule, after: fx.GraphModule) -> str:
    """Calls that went (-) and came (+)."""
    texts = [
        [line(node) for node in gm.graph.nodes if node.op not in ("placeholder", "output") and not is_item(node)]
        for gm in (before, after)
    ]
    found = difflib.unified_diff(*texts, n=0, lineterm="")
    return "\n".join(row for row in found if not row.startswith(("---", "+++", "@@")))


def is_item(node: fx.Node) -> bool:
    return node.target is operator.getitem


def is_ours(node: fx.Node) -> bool:
    return node.op == "call_module" or str(node.target).startswith("specpass.")


def line(node: fx.Node) -> str:
    """`take_rows(add, score_rows)`: operands by the operator that makes them; a draft's many tensors are left out."""
    given = [operand for operand in node.args if not is_drafts(operand)]
    named = [f"{name}={render(operand)}" for name, operand in node.kwargs.items()]
    return f"{short(node)}({', '.join([*map(render, given), *named])})"


def is_drafts(operand: Any) -> bool:
    return isinstance(operand, fx.Node) and operand.op == "placeholder" and str(operand.target).startswith("draft_")


def render(operand: Any) -> str:
    if isinstance(operand, (list, tuple)):
        return f"[{', '.join(map(render, operand))}]"
    return short(operand) if isinstance(operand, fx.Node) else str(operand)


def short(node: fx.Node) -> str:
    """`select` of a call of specpass.select.default, `fill[0]` of one of several results, an input's name."""
    if is_item(node):
        return f"{short(node.args[0])}[{node.args[1]}]"
    if node.op != "call_function":
        return str(node.target)
    packet = getattr(node.target, "overloadpacket", None)
    return node.target.__name__ if packet is None else str(packet).split(".")[-1]
