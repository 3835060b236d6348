"""A rewritten graph with what its calls need to know of it, before it is lowered: what can be kept on disk."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from torch import Tensor, fx

from specpass.backend.calls import Call
from specpass.backend.facts import candidate_outputs, static_outputs
from specpass.cache.worth import Readers
from specpass.dialect.cache import Advance
from specpass.graph.operands import results_of
from specpass.graph.walk import value
from specpass.lowering.lower import Lowered
from specpass.parallel.shards import Ranks
from specpass.passes.draft import DraftGraphs
from specpass.passes.facts import Ahead, Drafted
from specpass.reports.record import SiteRecord
from specpass.reports.report import Report
from specpass.rewrite import Facts, Request
from specpass.rewrite.base import PROMPTS
from specpass.rewrite.sites import Rotation, Site, Sites
from specpass.sizes import Span


@dataclasses.dataclass
class Pruned:
    """A graph as the last pass left it.

    Attributes:
        lifted: names of the inputs behind Dynamo's own, which are the draft's tensors.
        sites, notes: for the report.
        drafted: whether the draft's graphs stand in it.
        context, vocab, and those behind them: see Call.
    """

    graph: fx.GraphModule
    request: Request
    places: dict[str, int]
    lifted: tuple[str, ...]
    sites: list[SiteRecord]
    notes: list[str]
    drafted: bool
    static: dict[int, int | tuple[int, ...]]
    alike: bool
    spans: dict[int, Span]
    biased: frozenset[int]
    unquantized: dict[int, str]
    readers: dict[int, Readers]
    rotations: dict[int, Rotation | str]
    counts: bool
    ahead: tuple[int, ...] | None
    replays: bool
    candidates: Sequence[Mapping[str, int]]
    drafts: int
    context: int | None = None
    vocab: int | None = None

    @classmethod
    def of(cls, graph: fx.GraphModule, request: Request, facts: Facts, places: dict[str, int], spread: str) -> Pruned:
        """Before lowering replaces the operators that say so. Unlike budgets stay symbols: one region serves all."""
        found, drafted, ahead = facts.get(Sites), facts.get(Drafted), facts.get(Ahead)
        sites = () if found is None else found.sites
        records = [SiteRecord.of(site, spread) for site in sites]
        alike = len({record.budget for record in records if not record.exact}) <= 1
        return cls(
            graph,
            request,
            places,
            lifted=() if drafted is None else tuple(drafted.lifted),
            sites=records,
            notes=[f"no verified lookahead: {ahead.why}"] if ahead is not None and ahead.why else [],
            drafted=DraftGraphs in facts,
            static=static_outputs(graph, alike),
            alike=alike,
            spans={site.layer: site.span for site in sites},
            biased=frozenset(site.layer for site in sites if site.alibi is not None),
            unquantized={site.layer: site.unquantized for site in sites if site.unquantized},
            readers={site.layer: readers_of(site) for site in sites if not site.reads},
            rotations={site.layer: site.rotation for site in sites if site.rotation and not site.reads},
            counts=any(len(advance.seen.users) > 1 for advance in Advance.find(graph.graph)),
            ahead=request.eos_ids if ahead is not None and ahead.tokens else None,
            replays=request.kind == "decode" and "attention_mask" not in places and len(results_of(graph.graph)) == 1,
            candidates=candidate_outputs(graph),
            drafts=0 if drafted is None else len(drafted.caches) * request.goes_on,
        )

    def call(
        self, lowered: Lowered, lifted: tuple[Tensor, ...], sizes: set[int], report: Report, ranks: Ranks | None = None
    ) -> Call:
        """What runs it. Args: lifted: by their names above. sizes, report, ranks: the backend's."""
        return Call(
            lowered.run,
            self.request.kind,
            self.places,
            lifted,
            self.static,
            self.alike,
            sizes,
            self.context,
            self.vocab,
            self.request.lookahead,
            packed="attention_mask" in self.places and self.request.kind in PROMPTS,
            spans=self.spans,
            biased=self.biased,
            unquantized=self.unquantized,
            readers=self.readers,
            rotations=self.rotations,
            counts=self.counts,
            ahead=self.ahead,
            replays=self.replays,
            came_free=report.came_free,
            candidates=self.candidates,
            chose=report.chose,
            drafts=self.drafts,
            work=lowered.work,
            ranks=ranks,
        )


def readers_of(site: Site) -> Readers:
    query = value(site.query)
    return Readers(int(query.shape[1]), int(query.shape[3]), query.dtype, site.softcap)
