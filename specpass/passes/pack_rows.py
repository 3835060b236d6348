"""pack_rows: turn padding into one length per row, early.

before: ids [B, S] with a 2-D mask, a [B, 1, S, S] boolean mask at every site
after:  order, lengths = pack_order(mask); ids and position_ids packed: row b's tokens stand at 0 .. lengths[b] - 1;
        every site is `prefill_attention(q, k, v, scale)`, causal, without a mask: a row never sees what follows it

With packed rows one rotary phase per column serves the whole batch, so a row computes what it computes alone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import find
from specpass.passes.base import Pass, Refusal, State


@dataclasses.dataclass(frozen=True)
class PackRows(Pass):
    name: ClassVar[str] = "pack_rows"
    stage: ClassVar[str] = "TRACED"
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "short")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        editor = Editor(gm)
        attend_packed(editor, state)
        gm.graph.eliminate_dead_code()
        ids, mask = state.inputs["input_ids"], state.inputs.get("attention_mask")
        for node in find(gm.graph, SPEC.size):  # the cache's logical length: the caller's columns
            node.args = (ids, 1)
        first = next(node for node in gm.graph.nodes if node.op != "placeholder")
        if mask is None:
            state.lengths = editor.call(SPEC.full_lengths, ids, before=first)
            return
        if mask.users:
            raise Refusal(f"attention_mask is read outside attention (by {next(iter(mask.users)).target})")
        packed = editor.call(SPEC.pack_order, mask, ids, before=first)
        state.order, state.lengths = (editor.item(packed, index, first) for index in (0, 1))
        for name in ("input_ids", "position_ids"):
            source = state.inputs.get(name)
            if source is not None:
                self._pack(editor, source, state.order, first, state, name)

    @staticmethod
    def _pack(editor: Editor, source: fx.Node, order: fx.Node, first: fx.Node, state: State, name: str) -> None:
        users = [user for user in source.users if user is not order.args[0]]  # all but pack_order
        rows = editor.call(SPEC.expand_rows, source, order, before=first) if name == "position_ids" else source
        new = editor.call(SPEC.pack_ids, rows, order, before=first)
        for user in users:
            user.replace_input_with(source, new)
        state.inputs[name] = new


def attend_packed(editor: Editor, state: State) -> None:
    """Every site's attention becomes `prefill_attention`: causal over packed rows, without a mask."""
    for site in state.sites:
        new = editor.call(
            SPEC.prefill_attention,
            site.query,
            site.key,
            site.value,
            site.scale,
            *site.changes,
            before=site.attention,
            like=site.attention,
        )
        editor.replace(site.attention, new)
        site.attention = new
