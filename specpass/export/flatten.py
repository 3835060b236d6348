"""From a PRUNED graph to plain, functional ATen: what ONNX operators can say.

before: select(scores, lengths, C, W, 7, "max"); append_kv(keys, values, lengths, k, v) in place; draft_step(...)
after:  max_pool1d, pad, sort, ...;              keys = scatter(keys, ...);                     the step's own nodes

specpass's operators become their ONNX forms (`specpass/ops/`), plain aten that writes nothing in place. A node is
named by its module's path and the operator it comes from: `model.layers.3.self_attn.select`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from specpass.dialect.define import SPEC
from specpass.errors import ExportError
from specpass.export.forms import by_head, write_slots
from specpass.graph.edit import copy_module, fake_mode_of, quiet
from specpass.graph.walk import ATEN, VIEWS, is_op, module_path, output_of
from specpass.ops import IMPLEMENTATIONS

NAMESPACE = "specpass"


class Inliner(fx.Interpreter):
    """Runs a graph with plain ATen in the place of specpass's operators; what it calls is traced by make_fx.

    A storage that `append_kv` writes has a new value from there on. `stores` holds each as [B, K, P, D].
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.stores: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch._C._set_grad_enabled or is_op(n, SPEC.advance):
            return None  # nothing is differentiated; the caller counts what the cache has seen
        if is_op(n, SPEC.append_kv):
            return self.append(n)
        if n.op == "call_module":
            return self.call_graph(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == NAMESPACE:
            return IMPLEMENTATIONS[target._schema.name.split("::")[1]].onnx(*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def append(self, node: fx.Node) -> None:
        keys, values, lengths, key, value = node.args[:5]
        new = [self.env[item] for item in (key, value)]
        for store, states in zip((keys, values), new, strict=True):
            old = self.stores.get(store)
            if old is None:
                old = by_head(self.env[store], states.shape[1])
            self.stores[store] = write_slots(old, self.env[lengths], states)
            self.env[store] = self.stores[store].flatten(1, 2)
        self.env[lengths] = self.env[lengths] + new[0].shape[2]

    def call_graph(self, node: fx.Node) -> Any:
        """A subgraph's nodes in the call's place; what it appended to is seen by later readers of its arguments."""
        module = self.fetch_attr(node.target)
        args = self.fetch_args_kwargs_from_env(node)[0]
        if not isinstance(module, fx.GraphModule):
            return module.inline(*args)
        inner = Inliner(module)
        out = inner.run(*args)
        for given, place in zip(node.args, module.graph.find_nodes(op="placeholder"), strict=True):
            if isinstance(given, fx.Node) and place in inner.stores:
                self.stores[given] = inner.stores[place]
                self.env[given] = inner.env[place]
        return out


def flatten(gm: fx.GraphModule, run: Callable[..., Any], inputs: list[Any]) -> fx.GraphModule:
    """ATen of `run(*inputs)`, over fake inputs of the mode of `gm`'s values; `run` interprets `gm` with an Inliner."""
    with quiet(fake_mode_of(gm)), fx_traceback.preserve_node_meta():
        flat = make_fx(run, pre_dispatch=True)(*inputs)
    for module in flat.modules():
        if isinstance(module, fx.GraphModule):  # the graph, and the body of the draft's loop
            write_nothing(module.graph)
            module.graph.eliminate_dead_code()
            module.recompile()
    return flat


def write_nothing(graph: fx.Graph) -> None:
    """x.mul_(2) becomes y = x.mul(2), and what read x later reads y; references save memory so, ONNX cannot say it.

    Raises: ExportError where the tensor below x has another reader that would see the change.
    """
    for node in list(graph.nodes):
        schema = getattr(node.target, "_schema", None)
        if node.op != "call_function" or schema is None or not schema.is_mutable or is_op(node, ATEN.detach_):
            continue
        written = source = node.args[0]
        while is_op(source, *VIEWS, ATEN.unflatten, ATEN.transpose):
            source = source.args[0]
        if not schema.name.endswith("_") or (source is not written and any(user > node for user in source.users)):
            raise ExportError(f"{module_path(node)}: {node.target} writes a tensor that is read elsewhere.")
        name = schema.name.split("::")[1].removesuffix("_")
        target = getattr(getattr(ATEN, name), schema.overload_name or "default")
        with graph.inserting_before(node):
            new = graph.call_function(target, node.args, dict(node.kwargs))
        new.meta = dict(node.meta)
        written.replace_all_uses_with(new, delete_user_cb=lambda user, node=node: user > node)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def named(gm: fx.GraphModule, prefix: str = "") -> fx.GraphModule:
    """A copy whose nodes carry the path that their ONNX nodes will be named by."""
    twin = copy_module(gm)
    for node in twin.graph.nodes:
        if node.op != "call_function" or node.target is operator.getitem:
            continue
        parts = [prefix, module_path(node)]
        if getattr(node.target, "namespace", "") == NAMESPACE:
            parts.append(node.target._schema.name.split("::")[1])
        path = ".".join(part for part in parts if part)
        kind = next((kind for _, kind in (node.meta.get("nn_module_stack") or {}).values()), fx.GraphModule)
        node.meta["nn_module_stack"] = {path: (path, kind)}
        node.meta["stack_trace"] = path or node.name  # nodes without one cost a walk of Python's stack, again and again
    return twin


def outputs_of(gm: fx.GraphModule) -> list[fx.Node]:
    """The nodes that a graph returns."""
    result = output_of(gm.graph).args[0]
    return list(result) if isinstance(result, (tuple, list)) else [result]
