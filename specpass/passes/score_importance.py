"""score_importance: in each layer the last W prompt queries and the lookahead queries are scored against the keys.

before: out = prefill_attention(q, k, v, scale)
after:  the same, and scores [B, K, S + L] = importance(take_rows(q, rows), k, rows, lengths)     never [S, S]

Where several futures score, attention has the log-sum-exp of their rows already (see attend_branches).

With value_norms they are weighed: weigh_values(scores, v). With reconstruction they are no attention, but how far what
the rows read would move: reconstruction(take_rows(q, rows), k, v, rows, lengths).

Where a budget is chosen by the attention that it keeps (`share`), its mean over rows and heads is scored as well.

A method with its own `score` has that function's nodes in the operator's place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, ClassVar

import torch
from torch import fx

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, value
from specpass.passes.facts import Attention, Branches, Drafted, Rows, Scores
from specpass.passes.inline import Inline, check_result
from specpass.rewrite import Facts, Kind, Pass, Refusal, Request
from specpass.rewrite.sites import Site, Sites


@dataclasses.dataclass(frozen=True)
class ScoreImportance(Pass):
    name: ClassVar[str] = "score_importance"
    stage: ClassVar[str] = "PRUNED"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Sites, Rows)
    provides: ClassVar[tuple[type, ...]] = (Attention, Scores)

    def applies(self, request: Request) -> bool:
        return request.pruning.scored

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor, method = Editor(gm), request.pruning
        lengths, drafted = facts[Rows].lengths, facts.get(Drafted)
        ahead = None if drafted is None else drafted.read
        branches, count = facts.get(Branches), () if method.futures == 1 else (method.futures,)
        anchor = (lengths if ahead is None else max(ahead, lengths)).next  # behind both
        rows = editor.call(SPEC.score_rows, lengths, ahead, method.window, list(request.eos_ids), *count, before=anchor)
        own = OwnScores(editor, request)
        scores: list[fx.Node | None] = []
        means: list[fx.Node | None] = []
        for index, site in enumerate(facts[Sites].sites):
            if not site.is_full or site.reads:  # an owner's queries choose for all who read its cache
                scores.append(None)
                means.append(None)
                continue
            lse = None if branches is None else branches.lse[index]
            before, like = (lse or site.attention).next, site.attention
            at, until = (editor.beside(node, site.query, before) for node in (rows, lengths))
            taken = editor.call(SPEC.take_rows, site.query, at, before=before, like=like)
            changes = (None, lse, *site.changes) if site.changes or lse is not None else ()  # no weights
            operands = (taken, site.key, at, until, method.window, site.scale)
            importance = functools.partial(editor.call, SPEC.importance, *operands, before=before, like=like)
            plain = None if method.score is not None or method.reconstruction else importance(method.reduce, *changes)
            means.append(None)
            if method.rungs:
                mean = plain if plain is not None and method.reduce == "mean" else importance("mean", *changes)
                means[-1] = mean if site.heads_apart else shared(editor, mean, site, "mean")
            if method.score is not None:
                scores.append(own(site, (taken, site.key, site.value, at, until), before))
                continue
            if method.reconstruction:
                tensors = (taken, site.key, site.value, at, until, method.window, site.scale, method.reduce)
                length = 0 if branches is None else request.lookahead
                plain = editor.call(SPEC.reconstruction, *tensors, length, *site.changes, before=before, like=like)
            assert plain is not None
            if method.value_norms:
                plain = editor.call(SPEC.weigh_values, plain, site.value, before=before, like=like)
            scores.append(plain if site.heads_apart else shared(editor, plain, site, method.reduce))
        facts.add(Scores(tuple(scores)))
        facts.add(Attention(tuple(means)))


def shared(editor: Editor, scores: fx.Node, site: Site, reduce: str) -> fx.Node:
    """[B, H, T] of heads that read one choice of positions -> [B, K, T] of the cached heads, all alike."""
    place: dict[str, Any] = {"before": scores.next, "like": site.attention}
    how = (ATEN.amax, [1]) if reduce == "max" else (ATEN.mean.dim, [1])
    one = editor.call(how[0], scores, how[1], True, **place)
    place["before"] = one.next
    return editor.call(ATEN.repeat, one, [1, site.kv_heads, 1], **place)


class OwnScores:
    """The nodes of a method's own `score` at each site."""

    def __init__(self, editor: Editor, request: Request) -> None:
        self.editor, self.method = editor, request.pruning
        self.name = f"{self.method.name}.score"
        self.score = self.method.score
        self.inlines: dict[float, Inline] = {}  # by scale, which is a constant of the site

    def __call__(self, site: Site, tensors: tuple[fx.Node, ...], before: fx.Node) -> fx.Node:
        """Scores [B, K, T] of the queries that score [B, H, R, D], the site's keys and values, rows and lengths."""
        if not site.heads_apart:
            raise Refusal(f"{self.name} scores KV heads, and this layer's keys are made of one latent", site.module)
        if site.changes:
            raise Refusal(f"{self.name} is not told of this layer's soft cap, sinks or bias", site.module)
        assert self.score is not None
        if site.scale not in self.inlines:
            function = functools.partial(self.score, scale=site.scale)
            self.inlines[site.scale] = Inline(self.editor, function, self.name)
        scores = self.inlines[site.scale](*tensors, before=before, like=site.attention)
        shape = tuple(value(site.key).shape[:3])
        return check_result(scores, shape, torch.float32, self.name, "scores [B, K, T]")
