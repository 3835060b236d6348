"""few_rows: a step's linear layers are read at the rate of memory, those of the same input in one call.

before: q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv, bv)
after:  q, k, v = linear_rows(x, [wq, wk, wv], [bq, bk, bv])

Of weights on a CPU in a dtype for which the kernels have a library. A step has few rows, but in which graph a batch is
a number, and in which symbolic, is Dynamo's choice: the operator looks at the rows that come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import ClassVar

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.dialect.linear import LinearRows
from specpass.graph.aten import Linear
from specpass.graph.edit import Editor
from specpass.graph.walk import value
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.linear import few_rows, serves
from specpass.lowering.regions import layer_of
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import STEPS


@dataclasses.dataclass(frozen=True)
class FewRows(Pass):
    name: ClassVar[str] = "few_rows"
    stage: ClassVar[str] = "LOWERED"
    kinds: ClassVar[tuple[Kind, ...]] = STEPS

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        for group in served(gm.graph):
            if isinstance(few_rows(dtype_of(group[0])), Unbuilt):
                continue
            one_call(editor, group)


def one_call(editor: Editor, group: Sequence[Linear]) -> None:
    """linear_rows in the place of linear layers of one input."""
    first = group[0].node
    weights, biases = [each.weight for each in group], [each.bias for each in group]
    call = editor.call(SPEC.linear_rows, group[0].input, weights, biases, before=first, like=first)
    for index, each in enumerate(group):
        editor.replace(each.node, editor.item(call, index, each.node))


def linear_notes(gm: fx.GraphModule) -> list[str]:
    """How a step's linear layers run, for the report; nothing where none could be a library's."""
    calls, left = LinearRows.find(gm.graph), [linear for group in served(gm.graph) for linear in group]
    dtypes, notes = [value(call.weights[0]).dtype for call in calls], []
    for dtype in dict.fromkeys([*dtypes, *map(dtype_of, left)]):
        rows, own = few_rows(dtype), [call for call, each in zip(calls, dtypes, strict=True) if each == dtype]
        count = sum(len(call.weights) for call in own)
        if isinstance(rows, Unbuilt):
            count += sum(dtype_of(linear) == dtype for linear in left)
            notes.append(f"{count} linear layers are torch's: {rows}")
        elif own:
            notes.append(f"{count} linear layers in {len(own)} calls: {rows.how}, for up to {rows.most} rows")
    return notes


def dtype_of(linear: Linear) -> torch.dtype:
    return value(linear.weight).dtype


def served(graph: fx.Graph) -> list[list[Linear]]:
    """Linear layers that could be linear_rows, together where they can be one call."""
    return together(filter(is_served, Linear.find(graph)))


def is_served(linear: Linear) -> bool:
    return is_of_one_dtype(linear) and serves(value(linear.weight), value(linear.bias))


def is_of_one_dtype(linear: Linear) -> bool:
    """Autocast, which only torch's own operator obeys, is seen by its results: they are not of the weight's dtype."""
    return len({value(node).dtype for node in (linear.input, linear.weight, linear.node)}) == 1


def together(linears: Iterable[Linear]) -> list[list[Linear]]:
    """Those of one input and decoder layer, where their weights stand in front of the first."""
    groups: dict[tuple[fx.Node, str | None], list[Linear]] = {}
    for linear in linears:
        group = groups.setdefault((linear.input, layer_of(linear.node)), [])
        given = [source for source in (linear.weight, linear.bias) if source is not None]
        if not group or all(source < group[0].node for source in given):
            group.append(linear)
        else:
            groups[linear.node, None] = [linear]
    return list(groups.values())
