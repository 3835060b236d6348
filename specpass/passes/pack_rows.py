"""pack_rows: turn padding into one length per row, early.

before: ids [B, S] (or embeddings), position_ids [B, S], a 2-D mask that nothing but attention read
after:  order, lengths = pack_order(mask); ids and position_ids packed: row b's tokens stand at 0 .. lengths[b] - 1

With packed rows one rotary phase per column serves the whole batch, so a row computes what it computes alone.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.cache import Size
from specpass.dialect.define import SPEC
from specpass.dialect.rows import PackOrder
from specpass.graph.aten import Passive
from specpass.graph.edit import Editor
from specpass.graph.walk import first_call, value
from specpass.passes.facts import Inputs, Rows
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.base import PROMPTS


@dataclasses.dataclass(frozen=True)
class PackRows(Pass):
    name: ClassVar[str] = "pack_rows"
    stage: ClassVar[str] = "TRACED"
    kinds: ClassVar[tuple[Kind, ...]] = PROMPTS
    requires: ClassVar[tuple[type, ...]] = (Inputs,)
    provides: ClassVar[tuple[type, ...]] = (Inputs, Rows)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, inputs = Editor(gm), facts[Inputs]
        ids, mask = inputs.tokens, inputs.mask
        for size in Size.find(gm.graph):  # the cache's logical length: the caller's columns
            size.update(x=ids, dim=1)
            editor.refresh(size.node)
        first = first_call(gm.graph)
        if mask is None:
            facts.add(Rows(editor.call(SPEC.full_lengths, ids, before=first), full=True))
            return
        drop_unread_casts(gm.graph, mask)
        if mask.users:
            raise Refusal(f"attention_mask is read outside attention (by {next(iter(mask.users)).target})")
        packed = editor.call(SPEC.pack_order, mask, ids, before=first)
        order, lengths = (editor.item(packed, index, first) for index in (0, 1))
        ids, positions = pack(editor, ids, ids, order, first), inputs.positions
        if positions is not None:
            wide = editor.call(SPEC.expand_rows, positions, order, before=first)
            positions = pack(editor, positions, wide, order, first)
        packed_inputs = {"ids": ids} if inputs.embeds is None else {"ids": None, "embeds": ids}
        facts.add(Inputs(mask=mask, positions=positions, **packed_inputs))
        facts.add(Rows(lengths, order))


def drop_unread_casts(graph: fx.Graph, mask: fx.Node) -> None:
    """Casts of the mask that nobody reads are no use of it."""
    for user in list(mask.users):
        if Passive.is_call(user):
            drop_unread_casts(graph, user)
            if not user.users:
                graph.erase_node(user)


def pack(editor: Editor, source: fx.Node, rows: fx.Node, order: fx.Node, first: fx.Node) -> fx.Node:
    """Let the model read `rows` packed by `order` where it read `source`."""
    users = [user for user in source.users if user is not rows and not PackOrder.is_call(user)]
    operator = SPEC.pack_ids if value(rows).dim() == 2 else SPEC.take_positions
    new = editor.call(operator, rows, order, before=first)
    for user in users:
        user.replace_input_with(source, new)
    return new
