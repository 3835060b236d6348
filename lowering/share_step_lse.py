"""share_step_lse: in a draft's step, attention hands its log-sum-exp to the same token's scores, which read K once.

before: out = append_attend(keys, values, lengths, q, k, v, scale); scores = importance(q, view(keys), rows, ...)
after:  out, lse = append_attend_lse(keys, values, lengths, q, k, v, scale); scores = importance(..., lse)

What scores in such a step is the token that it appends, whose row sees all slots in use, which attention has read: so
passes/score_draft.py has it (StepRows), and this pass looks at no other graph.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.attention import AppendAttend, AppendAttendLse
from specpass.dialect.define import SPEC
from specpass.dialect.select import Importance
from specpass.graph.edit import Editor
from specpass.graph.walk import value
from specpass.kernels.dispatch import choose
from specpass.lowering.fuse_append import storage_of
from specpass.rewrite import Facts, Kind, Pass, Request


@dataclasses.dataclass(frozen=True)
class ShareStepLse(Pass):
    name: ClassVar[str] = "share_step_lse"
    stage: ClassVar[str] = "LOWERED"
    kinds: ClassVar[tuple[Kind, ...]] = ("decode",)

    def applies(self, request: Request) -> bool:
        return request.model == "draft"

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        for importance in Importance.find(gm.graph):
            attention = appending_attention(importance)
            if attention is None:
                continue
            operands = {name: each for name, each in attention.operands().items() if name in AppendAttendLse.names}
            fakes = {name: value(operand) for name, operand in operands.items()}
            if choose("append_attend_lse", fakes).kernel is None:
                continue
            node = attention.node
            both = editor.call(SPEC.append_attend_lse, *operands.values(), before=node, like=node)
            out, lse = (editor.item(both, index, node) for index in (0, 1))
            editor.replace(node, out)
            importance.update(lse=lse)


def appending_attention(importance: Importance) -> AppendAttend | None:
    """The attention of the query that scores, over the slots that are scored, in front of the scores.

    None also where a cap, sinks or a bias change the log-sum-exp, or only a part of the slots is read.
    """
    keys = storage_of(importance.key)
    for user in keys.users:
        attention = AppendAttend.match(user)
        if attention is None or (attention.keys, attention.query) != (keys, importance.query):
            continue
        changed = attention.softcap or attention.sinks is not None or importance.bias is not None
        bounded = attention.sliding or attention.chunk
        if not (changed or bounded) and attention.scale == importance.scale and user < importance.node:
            return attention
    return None
