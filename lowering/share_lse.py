"""share_lse: attention hands its log-sum-exp to the importance of the same queries and keys, which reads K once less.

before: out = prefill_attention(q, k, v, scale); scores = importance(take_rows(q, rows), k, rows, ...)
after:  out, lse = prefill_attention_lse(q, k, v, rows, scale); scores = importance(..., lse)
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.attention import PrefillAttention
from specpass.dialect.define import SPEC
from specpass.dialect.rows import TakeRows
from specpass.dialect.select import Importance
from specpass.graph.edit import Editor
from specpass.graph.walk import value
from specpass.kernels.dispatch import shares_lse
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import PROMPTS


@dataclasses.dataclass(frozen=True)
class ShareLse(Pass):
    name: ClassVar[str] = "share_lse"
    stage: ClassVar[str] = "LOWERED"
    kinds: ClassVar[tuple[Kind, ...]] = PROMPTS

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        for importance in Importance.find(gm.graph):
            attention = shared_attention(importance)
            if attention is None:
                continue
            tensors = (attention.query, attention.key, attention.value)
            if not shares_lse(*map(value, tensors)):
                continue
            node = attention.node
            operands = (*tensors, importance.rows, importance.scale)
            both = editor.call(SPEC.prefill_attention_lse, *operands, before=node, like=node)
            out, lse = (editor.item(both, index, node) for index in (0, 1))
            editor.replace(node, out)
            importance.update(lse=lse)


def shared_attention(importance: Importance) -> PrefillAttention | None:
    """The attention of the queries and keys that are scored, in front of the scores and behind their rows.

    None also where a cap, sinks or a bias change the log-sum-exp, or the scores have it already (several futures).
    """
    taken = TakeRows.match(importance.query)
    if importance.lse is not None or taken is None or taken.rows is not importance.rows:
        return None
    for user in taken.query.users:
        attention = PrefillAttention.match(user)
        if attention is None or attention.key is not importance.key or attention.scale != importance.scale:
            continue
        bounded = attention.sliding or attention.chunk
        changed = attention.softcap or attention.sinks is not None or attention.bias is not None
        if not (bounded or changed) and importance.rows < user < importance.node:
            return attention
    return None
