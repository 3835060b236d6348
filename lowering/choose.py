"""Ask the table of specpass.kernels.dispatch for each site of a PRUNED graph, and write down what it says."""

from __future__ import annotations

from torch import fx

from specpass.dialect.define import OPERATORS
from specpass.graph.walk import find, module_path
from specpass.kernels.dispatch import ATEN_OPERATORS, Choice, choose
from specpass.kernels.registry import operators


def choose_sites(gm: fx.GraphModule) -> list[tuple[str, Choice]]:
    """(module path, choice) of each operator that could be a kernel, in graph order; by fake tensors alone."""
    views = {OPERATORS[name].packet: OPERATORS[name] for name in (*operators(), *ATEN_OPERATORS)}
    calls = [views[node.target.overloadpacket](node) for node in find(gm.graph, *views)]
    return [(module_path(call.node), choose(call.name, call.fakes())) for call in calls]
