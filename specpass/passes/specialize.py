"""specialize: what is constant becomes a constant, what nobody reads goes.

decode:  sdpa(q, view(keys), view(values), mask) -> attend(q, keys, values, lengths, scale); the mask's subgraph dies
all:     the handle and unused inputs lose their readers; dead code is erased
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.cache import AppendKv
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, is_op
from specpass.passes.base import Pass, Site, State


@dataclasses.dataclass(frozen=True)
class Specialize(Pass):
    name: ClassVar[str] = "specialize"
    stage: ClassVar[str] = "PRUNED"

    def run(self, gm: fx.GraphModule, state: State) -> None:
        if state.kind in ("decode", "append"):
            attend_slots(Editor(gm), state)
        for append in AppendKv.find(gm.graph):
            append.update(handle=None)
        for node in gm.graph.nodes:  # bookkeeping of the cache, traced inside a layer, belongs to no layer
            if is_op(node, SPEC.size, SPEC.lookahead, SPEC.advance):
                node.meta.pop("nn_module_stack", None)
        gm.graph.eliminate_dead_code()


def attend_slots(editor: Editor, state: State) -> None:
    """Every site's attention becomes `attend`: over the slots that the lengths say are in use."""
    for site in state.sites:
        site.key, site.value = (own_slots(editor, node, site) for node in (site.key, site.value))
        new = editor.call(
            SPEC.attend,
            site.query,
            site.key,
            site.value,
            site.cache.args[2],
            site.scale,
            *site.changes,
            before=site.attention,
            like=site.attention,
        )
        editor.replace(site.attention, new)
        site.attention = new


def own_slots(editor: Editor, node: fx.Node, site: Site) -> fx.Node:
    """The layer's own slots [B, K, P, D] where the model was shown those of the widest layer."""
    if not is_op(node, SPEC.widen):
        return node
    return editor.call(
        ATEN.unflatten.int, node.args[0], 1, [node.args[1], -1], before=site.attention, like=site.attention
    )
