"""attend_branches: where several futures stand behind a prompt, none of them sees the others.

before: out = prefill_attention(q, k, v, scale)                 columns: prompt, L of each of M futures; padding
after:  out, lse = attend_branches(prefill_attention(q, k, v, scale), q, k, v, lengths, W, L, M, scale)

The prompt and the first future are attended to as ever; the rows of the others are attended anew. Their log-sum-exp
goes to the scores, which so read all rows against the same keys.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.passes.facts import Branches, Rows
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.sites import Sites


@dataclasses.dataclass(frozen=True)
class AttendBranches(Pass):
    name: ClassVar[str] = "attend_branches"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Sites, Rows)
    provides: ClassVar[tuple[type, ...]] = (Branches,)

    def applies(self, request: Request) -> bool:
        return request.lookahead > 0 and request.pruning.futures > 1

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, method = Editor(gm), request.pruning
        sums: list[fx.Node] = []
        for site in facts[Sites].sites:
            if site.alibi is not None:
                raise Refusal(
                    "attention adds a bias by positions (ALiBi), which several futures go without", site.module
                )
            plain, before, like = site.attention, site.attention.next, site.attention
            lengths = editor.beside(facts[Rows].lengths, site.key, before)
            tensors = (plain, site.query, site.key, site.value, lengths)
            sizes = (method.window, request.lookahead, method.futures)
            operands = (*tensors, *sizes, site.scale, *site.options)
            both = editor.call(SPEC.attend_branches, *operands, before=before, like=like)
            out, lse = (editor.item(both, index, before) for index in (0, 1))
            plain.replace_all_uses_with(out, delete_user_cb=lambda user, both=both: user is not both)
            sums.append(lse)
        facts.add(Branches(tuple(sums)))
