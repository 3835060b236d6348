"""Operators without an ONNX form become those that have one, node by node.

torch.onnx asks the exported program for it, and torch's own traces the whole graph twice more, which is most of the
time of a translation. This graph is functional ATen already, so that the nodes in question are all that is traced.

before: unbind(x)
after:  select(x, 0), select(x, 1)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.utils._pytree as pytree
from onnxscript.function_libs.torch_lib.registration import default_registry
from torch import fx
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.fx.experimental.proxy_tensor import make_fx

from specpass.graph.edit import fake_mode_of, quiet
from specpass.graph.operands import GetItem, results_of
from specpass.graph.walk import value

Table = Mapping[Any, Callable[..., Any]]  # operator -> its decomposition


class FlatProgram(ExportedProgram):
    """A flat graph in functional ATen, with fake values, as torch.onnx takes it."""

    @classmethod
    def of(cls, gm: fx.GraphModule) -> FlatProgram:
        """As torch.export would give it: every input a user's, nothing mutated."""
        inputs, outputs = gm.graph.find_nodes(op="placeholder"), results_of(gm.graph)
        values = tuple(node.meta["val"] for node in inputs)
        signature = ExportGraphSignature(
            [InputSpec(InputKind.USER_INPUT, TensorArgument(node.name), None) for node in inputs],
            [OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(node.name), None) for node in outputs],
        )
        call = ModuleCallSignature([], [], pytree.tree_flatten((values, {}))[1], pytree.tree_flatten(tuple(outputs))[1])
        return cls(
            root=gm,
            graph=gm.graph,
            graph_signature=signature,
            state_dict={},
            range_constraints={},
            module_call_graph=[ModuleCallEntry("", call)],
            constants={},
        )

    def run_decompositions(
        self, decomp_table: Any = None, decompose_custom_triton_ops: bool = False
    ) -> ExportedProgram:
        """The program without calls of what the table decomposes; this one's graph is changed. Args: as torch's own."""
        table: Table = decomp_table or {}
        graphs = [module for module in self.graph_module.modules() if isinstance(module, fx.GraphModule)]
        if all(decompose(graph, table) for graph in graphs):  # the graph, and the body of the draft's loop
            return FlatProgram.of(self.graph_module)
        whole = FlatProgram.of(self.graph_module)
        return ExportedProgram.run_decompositions(whole, decomp_table, decompose_custom_triton_ops)


def decompose(gm: fx.GraphModule, table: Table) -> bool:
    """Write out what `table` decomposes, and composite operators that may return their operand (aten.to), which no
    table names, where ONNX has none. Returns: whether all of it was: a node whose decomposition makes a tensor of its
    own stays."""
    done = True
    pending = list(gm.graph.nodes)
    while pending:
        node = pending.pop()
        rule = rule_of(node, table)
        if rule is not None:
            new = write_out(gm, node, dict(table) | {node.target: rule})
            done = done and new is not None
            pending += new or ()
    gm.graph.eliminate_dead_code()
    gm.recompile()
    return done


def rule_of(node: fx.Node, table: Table) -> Callable[..., Any] | None:
    """How the node's operator is written out; None: it stays."""
    if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
        return None
    if node.target in table:
        return table[node.target]
    if node.target.name() in default_registry:  # kept as they are: their sizes stay those that the graph has already
        return None
    aliases = any(argument.alias_info is not None for argument in node.target._schema.arguments)
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(node.target.name(), "CompositeImplicitAutograd")
    return node.target.decompose if aliases and composite else None


def write_out(gm: fx.GraphModule, node: fx.Node, table: Table) -> list[fx.Node] | None:
    """The nodes of one call's decomposition in its place; None where that cannot be."""
    inputs = node.all_input_nodes

    def call(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda own: given[own])
        return node.target(*args, **kwargs)

    with quiet(fake_mode_of(gm)):
        body = make_fx(call, table, pre_dispatch=True)(*map(value, inputs))
    if body.graph.find_nodes(op="get_attr"):
        return None
    env: dict[fx.Node, fx.Node] = dict(zip(body.graph.find_nodes(op="placeholder"), inputs, strict=True))
    new = []
    with gm.graph.inserting_before(node):
        for own in body.graph.nodes:
            if own.op == "call_function":
                env[own] = gm.graph.node_copy(own, lambda inner: env[inner])
                env[own].meta = {**node.meta, "val": own.meta.get("val")}
                new.append(env[own])
    results = [env[own] for own in results_of(body.graph)]
    if isinstance(value(node), (list, tuple)):
        for user in list(node.users):
            item = GetItem.match(user)
            assert item is not None, f"{user} takes {node}, a list, as it is"
            user.replace_all_uses_with(results[item.index])
            gm.graph.erase_node(user)
    else:
        node.replace_all_uses_with(results[0])
    gm.graph.erase_node(node)
    return [each for each in new if each.target is not node.target]
