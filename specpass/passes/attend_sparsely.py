"""attend_sparsely: a layer is scored first, and its queries then read a part of the prompt ("vertical and slash").

before: out = prefill_attention(q, k, v, scale); scores [B, K, T] = importance(...)
after:  scores [B, K, T] = importance(...)
        columns [B, K, V] = select(scores, lengths, V, 0, 1, "max")        the top V, not pooled
        out = prefill_attention_sparse(q, k, v, columns, lengths, scale, W, L, V)

Sites that are not scored (windows, chunks, another's keys), whose logits are changed (soft caps, sinks, ALiBi) or whose
heads share one latent (MLA) stay as they are.

attend_draft_sparsely: the same in the draft's own prompt, whose last W rows score; nothing stands behind it.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import first_call
from specpass.passes.facts import Rows, Scores
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.sites import Site, Sites


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
        sparsely = Sparsely(editor, facts[Rows].lengths, method.sparse_prefill, method.window, request.lookahead)
        scored = zip(facts[Sites].sites, facts[Scores].nodes, strict=True)
        facts.add(Sites(tuple(sparsely(site, scores) if serves(site) else site for site, scores in scored)))


@dataclasses.dataclass(frozen=True)
class AttendDraftSparsely(Pass):
    """Args: read: V. window: W."""

    read: int
    window: int

    name: ClassVar[str] = "attend_draft_sparsely"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Sites, Rows)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, lengths, window = Editor(gm), facts[Rows].lengths, self.window
        rows = editor.call(SPEC.score_rows, lengths, None, window, [], before=first_call(gm.graph))
        sparsely = Sparsely(editor, lengths, self.read, window, 0)
        sites = []
        for site in facts[Sites].sites:
            if serves(site):
                before, like = site.attention.next, site.attention
                taken = editor.call(SPEC.take_rows, site.query, rows, before=before, like=like)
                operands = (taken, site.key, rows, lengths, window, site.scale, "max")
                site = sparsely(site, editor.call(SPEC.importance, *operands, before=before, like=like))
            sites.append(site)
        facts.add(Sites(tuple(sites)))


def serves(site: Site) -> bool:
    return site.is_full and not (site.reads or site.changes) and site.heads_apart


@dataclasses.dataclass(frozen=True)
class Sparsely:
    """The site, attending to the columns that its scores [B, K, T] choose.

    Args: read: V. window, ahead: W and L, the rows that score, and read all.
    """

    editor: Editor
    lengths: fx.Node
    read: int
    window: int
    ahead: int

    def __call__(self, site: Site, scores: fx.Node) -> Site:
        editor, before, like = self.editor, scores.next, site.attention
        lengths = editor.beside(self.lengths, site.key, before)
        columns = editor.call(SPEC.select, scores, lengths, self.read, 0, 1, "max", before=before, like=like)
        tensors = (site.query, site.key, site.value, columns, lengths, site.scale)
        sizes = (self.window, self.ahead, self.read)
        new = editor.call(SPEC.prefill_attention_sparse, *tensors, *sizes, before=before, like=like)
        editor.replace(site.attention, new)
        return dataclasses.replace(site, attention=new)
