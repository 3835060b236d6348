"""A rewritten graph as bytes, and back: of its shape environment what lowering asks for."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc

from specpass.backend.pruned import Pruned
from specpass.capture import stored
from specpass.graph.edit import copy_module
from specpass.graph.fakes import symbolic_mode

ENV = ("var_to_range", "backed_var_to_val", "var_to_val", "replacements", "divisible", "size_like", "counter")


class _Pickler(stored.Pickler):
    """A graph of Dynamo's: of its shape environment what a graph's further way asks for."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, ShapeEnv):
            return _env, ({name: getattr(obj, name) for name in ENV if name in vars(obj)}, self._unpickle_state)
        return super().reducer_override(obj)


def _env(held: dict[str, Any], state: Any) -> ShapeEnv:
    env = state.fake_mode.shape_env
    vars(env).update(held)
    env.var_to_range_sloc = {symbol: ValueRangesSLoc(None, None) for symbol in env.var_to_range}
    return env


def _dumps(held: Any) -> bytes:
    return _Pickler.dumps(held, stored.OPTIONS)


def _loads(data: bytes) -> Any:
    return stored.Pickler.loads(data, symbolic_mode())


def packed(pruned: Pruned) -> bytes:
    """A rewritten graph; the draft's, whose symbols are others, beside it.

    Raises: Undescribed: it holds tensors of its own.
    """
    graph = copy_module(pruned.graph)
    children = {name: child for name, child in graph.named_children() if isinstance(child, fx.GraphModule)}
    copies = {name: copy_module(child) for name, child in children.items()}
    for name, child in children.items():
        copies[name].meta["specpass_symbols"] = child.meta.get("specpass_symbols")
    if any(each.graph.find_nodes(op="get_attr") for each in (graph, *copies.values())):
        raise stored.Undescribed
    for each in (graph, *copies.values()):
        stored.share_values(each)
    for name in children:
        del graph._modules[name]
    return pickle.dumps((_dumps(copies), _dumps(dataclasses.replace(pruned, graph=graph))))


def unpacked(data: bytes) -> Pruned:
    drafts, own = pickle.loads(data)
    pruned = _loads(own)
    for name, child in _loads(drafts).items():
        pruned.graph.add_submodule(name, child)
    # A copy, whose code is written once, when it is lowered.
    return dataclasses.replace(pruned, graph=copy_module(pruned.graph))
