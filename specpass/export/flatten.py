"""From a PRUNED graph to plain, functional ATen: what ONNX operators can say.

before: select(scores, lengths, C, W, 7, "max"); append_kv(keys, values, lengths, k, v) in place; draft_step(...)
after:  max_pool1d, pad, sort, ...;              keys = scatter(keys, ...);                     the step's own nodes

specpass's operators become their ONNX forms (`specpass/ops/`), plain aten that writes nothing in place. A node is
named by its module's path and the operator it comes from: `model.layers.3.self_attn.select`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from specpass.dialect.cache import Advance, AppendKv
from specpass.dialect.define import NAMESPACE
from specpass.export.forms import by_head, write_slots
from specpass.export.functionalize import Functionalize
from specpass.graph.edit import fake_mode_of, quiet
from specpass.ops import IMPLEMENTATIONS
from specpass.rewrite import Facts, Kind, Pass, Pipeline, Request


class Inliner(fx.Interpreter):
    """Runs a graph with plain ATen in the place of specpass's operators; what it calls is traced by make_fx.

    A storage that `append_kv` writes has a new value from there on. `stores` holds each as [B, K, P, D].
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.stores: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        if n.target is torch._C._set_grad_enabled or Advance.is_call(n):
            return None  # nothing is differentiated; the caller counts what the cache has seen
        if AppendKv.is_call(n):
            return self.append(n)
        if n.op == "call_module":
            return self.call_graph(n)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if getattr(target, "namespace", "") == NAMESPACE:
            return IMPLEMENTATIONS[target._schema.name.split("::")[1]].onnx(*args, **kwargs)
        return super().call_function(target, args, kwargs)

    def append(self, node: fx.Node) -> None:
        write = AppendKv.of(node)
        lengths = write.lengths
        new = [self.env[item] for item in (write.key, write.value)]
        for store, states in zip((write.keys, write.values), new, strict=True):
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


FLAT: tuple[Pass, ...] = (Functionalize(),)


def flatten(gm: fx.GraphModule, run: Callable[..., Any], inputs: list[Any], kind: Kind) -> fx.GraphModule:
    """ATen of `run(*inputs)`, over fake inputs of the mode of `gm`'s values; `run` interprets `gm` with an Inliner."""
    with quiet(fake_mode_of(gm)), fx_traceback.preserve_node_meta():
        flat = make_fx(run, pre_dispatch=True)(*inputs)
    for module in flat.modules():
        if isinstance(module, fx.GraphModule):  # the graph, and the body of the draft's loop
            Pipeline(FLAT, entry="").run(module, Request(kind), Facts())
    return flat
