"""functionalize: nothing is written in place; references save memory so, and ONNX cannot say it.

before: x.mul_(2); ... x ...
after:  y = x.mul(2); ... y ...
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.errors import ExportError
from specpass.graph.aten import MemoryView, Written
from specpass.graph.walk import ATEN, is_op, module_path
from specpass.rewrite import Facts, Pass, Request


@dataclasses.dataclass(frozen=True)
class Functionalize(Pass):
    """Raises ExportError where the tensor below x has another reader that would see the change."""

    name: ClassVar[str] = "functionalize"

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        for written in Written.find(gm.graph):
            if not is_op(written.node, ATEN.detach_):
                write_nothing(gm.graph, written)
        gm.graph.eliminate_dead_code()


def write_nothing(graph: fx.Graph, call: Written) -> None:
    """The functional operator of the same name in the place of one call that writes its first operand."""
    node, written = call.node, call.input
    schema = node.target._schema
    source = written
    while (view := MemoryView.match(source)) is not None:
        source = view.input
    if not schema.name.endswith("_") or (source is not written and any(user > node for user in source.users)):
        raise ExportError(f"{module_path(node)}: {node.target} writes a tensor that is read elsewhere.")
    name = schema.name.split("::")[1]
    name = name.replace("__i", "__", 1) if name.endswith("__") else name.removesuffix("_")  # __ior__, relu_
    target = getattr(getattr(ATEN, name), schema.overload_name or "default")
    with graph.inserting_before(node):
        new = graph.call_function(target, node.args, dict(node.kwargs))
    new.meta = dict(node.meta)
    written.replace_all_uses_with(new, delete_user_cb=lambda user: user > node)
    node.replace_all_uses_with(new)
    graph.erase_node(node)
