"""note_queries: a step leaves its queries to evictions that ask what tokens are worth to them.

before: append_kv(keys, values, lengths, k, v, ..., queries); o = attend(q, keys, values, lengths, scale)
after:  append_kv(keys, values, lengths, k, v); o = attend(q, keys, values, lengths, scale)
        note_queries(queries, q, scale)                 behind it; with the number of masked tokens where some may be

Queries are what attention reads, rotary phases included; of layers that share one cache it is the owner's. Only a
cache whose policy asks has such an operand.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import fx

from specpass.dialect.cache import AppendKv, TakeBack
from specpass.dialect.cascade import attend_of
from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import STEPS
from specpass.rewrite.sites import Sites


@dataclasses.dataclass(frozen=True)
class NoteQueries(Pass):
    name: ClassVar[str] = "note_queries"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = STEPS
    requires: ClassVar[tuple[type, ...]] = (Sites,)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        padding = {back.lengths: back.padding for back in TakeBack.find(gm.graph)}
        for site in facts[Sites].owners:
            append = AppendKv.of(site.cache)
            if append.queries is None:
                continue
            attend = attend_of(site.attention)
            operands: tuple[Any, ...] = (append.queries, attend.query, attend.scale)
            if append.lengths in padding:
                operands = (*operands, padding[append.lengths])
            behind = max(node for node in (attend.node, *operands[3:]) if node is not None).next
            editor.call(SPEC.note_queries, *operands, before=behind, like=attend.node)
            append.update(queries=None)
