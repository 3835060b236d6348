"""fuse_append: attention writes the tokens that it attends to, in one call, where the kernels' table says so.

On a GPU only a step of one token has a kernel for it.

before: append_kv(keys, values, lengths, k, v); out = attend(q, view(keys), view(values), lengths, scale)
after:  out = append_attend(keys, values, lengths, q, k, v, scale)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.attention import Attend
from specpass.dialect.cache import AppendKv
from specpass.dialect.define import SPEC
from specpass.graph.aten import StorageView
from specpass.graph.edit import Editor
from specpass.graph.walk import value
from specpass.kernels.dispatch import choose
from specpass.rewrite import Facts, Pass, Request


@dataclasses.dataclass(frozen=True)
class FuseAppend(Pass):
    name: ClassVar[str] = "fuse_append"
    stage: ClassVar[str] = "LOWERED"

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        for attend in Attend.find(gm.graph):
            append = append_of(attend)
            query = value(attend.query)
            tokens = query.shape[2]
            few = (isinstance(tokens, int) and tokens == 1) or query.device.type == "cpu"  # a symbol: any number
            if append is None or not few or attend.bias is not None or attend.quantized is not None:  # no kernel does
                continue
            operands = {
                "keys": append.keys,
                "values": append.values,
                "lengths": append.lengths,
                "query": attend.query,
                "key": append.key,
                "value": append.value,
                "scale": attend.scale,
                "softcap": attend.softcap,
                "sinks": attend.sinks,
                "sliding": attend.sliding,
                "chunk": attend.chunk,
            }
            if attend.offsets is not None:
                operands |= {"offsets": attend.offsets, "layers": attend.layers}
            fakes = {name: value(operand) for name, operand in operands.items()}
            if choose("append_attend", fakes).kernel is None:
                continue
            node = attend.node
            fused = editor.call(SPEC.append_attend, *operands.values(), before=node, like=node)
            editor.replace(node, fused)
            gm.graph.erase_node(append.node)


def append_of(attend: Attend) -> AppendKv | None:
    """The write of the slots that are attended to, where nothing reads them in between."""
    keys, values = storage_of(attend.keys), storage_of(attend.values)
    storage = {keys, values, attend.lengths}
    for user in keys.users:
        append = AppendKv.match(user)
        if append is None or (append.keys, append.values, append.lengths) != (keys, values, attend.lengths):
            continue
        if user < attend.node and not any(reads(node, storage) for node in between(user, attend.node)):
            return append
    return None


def storage_of(node: fx.Node) -> fx.Node:
    """The tensor that `node` is a view of."""
    while (view := StorageView.match(node)) is not None:
        node = view.input
    return node


def between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Nodes after `first` and before `last`."""
    found, node = [], first.next
    while node is not last:
        found.append(node)
        node = node.next
    return found


def reads(node: fx.Node, storage: set[fx.Node]) -> bool:
    """Whether a node reads one of the tensors (a view of it reads nothing)."""
    return not StorageView.is_call(node) and any(storage_of(source) in storage for source in node.all_input_nodes)
