"""specialize: what nobody reads goes.

before: append_kv(..., handle); size, lookahead and advance as nodes of a layer
after:  append_kv(..., None); bookkeeping of the cache belongs to no layer, so that layers are alike; no dead code
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.cache import Advance, AppendKv, Lookahead, Size
from specpass.rewrite import Facts, Pass, Request


@dataclasses.dataclass(frozen=True)
class Specialize(Pass):
    name: ClassVar[str] = "specialize"
    stage: ClassVar[str] = "PRUNED"

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        for append in AppendKv.find(gm.graph):
            append.update(handle=None)
        for node in gm.graph.nodes:
            if any(view.is_call(node) for view in (Size, Lookahead, Advance)):
                node.meta.pop("nn_module_stack", None)
        gm.graph.eliminate_dead_code()
