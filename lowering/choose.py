"""Ask the table of specpass.kernels.dispatch for each site of a PRUNED graph, and write down what it says."""

from __future__ import annotations

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.walk import find, module_path, value
from specpass.kernels.dispatch import ATEN_OPERATORS, KERNELS, Choice, choose


def choose_sites(gm: fx.GraphModule) -> list[tuple[str, Choice]]:
    """(module path, choice) of each operator that could be a kernel, in graph order; by fake tensors alone."""
    operators = {getattr(SPEC, name): name for name in (*KERNELS, *ATEN_OPERATORS)}
    return [
        (module_path(node), choose(operators[node.target.overloadpacket], tuple(value(arg) for arg in node.args)))
        for node in find(gm.graph, *operators)
    ]
