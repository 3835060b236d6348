"""attend_sparsely: a layer is scored first, and its queries then read a part of the prompt ("vertical and slash").

before: out = prefill_attention(q, k, v, scale); scores [B, K, T] = importance(...)
after:  scores [B, K, T] = importance(...)
        columns [B, K, V] = select(scores, lengths, V, 0, 1, "max")        the top V, not pooled
        out = prefill_attention_sparse(q, k, v, columns, lengths, scale, W, L, V)

Sites that are not scored (windows, chunks, another's keys), whose logits are changed (soft caps, sinks, ALiBi) or whose
heads share one latent (MLA) stay as they are.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.passes.facts import Rows, Scores
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.sites import Sites


@dataclasses.dataclass(frozen=True)
class AttendSparsely(Pass):
    name: ClassVar[str] = "attend_sparsely"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Sites, Rows, Scores)

    def applies(self, request: Request) -> bool:
        return bool(request.pruning.sparse_prefill)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, method = Editor(gm), request.pruning
        read = method.sparse_prefill
        rewritten = []
        for site, scores in zip(facts[Sites].sites, facts[Scores].nodes, strict=True):
            if scores is None or site.changes or not site.heads_apart:
                rewritten.append(site)
                continue
            before, like = scores.next, site.attention
            lengths = editor.beside(facts[Rows].lengths, site.key, before)
            columns = editor.call(SPEC.select, scores, lengths, read, 0, 1, "max", before=before, like=like)
            tensors = (site.query, site.key, site.value, columns, lengths, site.scale)
            sizes = (method.window, request.lookahead, read)
            new = editor.call(SPEC.prefill_attention_sparse, *tensors, *sizes, before=before, like=like)
            editor.replace(site.attention, new)
            rewritten.append(dataclasses.replace(site, attention=new))
        facts.add(Sites(tuple(rewritten)))
