"""What one backend compiled, what it refused and why: data, which text, tables and JSON are made from."""

from __future__ import annotations

import dataclasses
from typing import Any

from specpass.cache.choose import Kept
from specpass.cache.evict import Bound
from specpass.kernels.dispatch import Choice
from specpass.lowering.lower import Lowered
from specpass.methods.base import Method
from specpass.reports.cost import Costs, costs_of
from specpass.rewrite import Kind
from specpass.rewrite.sites import Site
from specpass.sizes import Decoder


@dataclasses.dataclass(frozen=True)
class SiteRecord:
    """One attention site.

    Attributes:
        module: its path.
        budget: slots C of each KV head, 0 where the graph prunes nothing.
        exact: why it keeps all that it reads; "" where it is pruned.
        reads: the site whose keys and values it reads, where it has none of its own.
        spread: who shares the budget (see methods/base.py).
        unquantized: why its cache stays in the model's dtype where others are in fewer bits.
    """

    module: str
    budget: int
    exact: str = ""
    reads: str = ""
    spread: str = "uniform"
    unquantized: str = ""

    @classmethod
    def of(cls, site: Site, spread: str) -> SiteRecord:
        if not site.is_full:
            return cls(site.module, site.budget, str(site.span), site.reads)
        return cls(site.module, site.budget, reads=site.reads, spread=spread, unquantized=site.unquantized)


@dataclasses.dataclass
class GraphRecord:
    """One compiled graph. Seconds are wall-clock."""

    kind: Kind
    exact: bool = False
    sites: list[SiteRecord] = dataclasses.field(default_factory=list)
    trace_seconds: float = 0.0
    pass_seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    lower_seconds: float = 0.0
    seconds: float = 0.0
    regions: int = 0
    distinct_regions: int = 0
    notes: list[str] = dataclasses.field(default_factory=list)
    choices: list[tuple[str, Choice]] = dataclasses.field(default_factory=list)  # (module path, kernel or aten and why)

    def add(self, lowered: Lowered) -> None:
        """Write down what the lowering did."""
        self.choices = list(lowered.choices)
        self.regions, self.distinct_regions = lowered.regions, lowered.distinct_regions
        self.notes += lowered.notes
        self.pass_seconds |= lowered.pass_seconds
        self.lower_seconds = lowered.seconds


@dataclasses.dataclass(frozen=True)
class PromptRecord:
    """What became of a prompt that was read uncompiled.

    Args:
        short: it fits the budget and was kept whole.
        sites: its attention, with budget 0 where everything is kept in the model's own columns.
        states: layers with a state, which is exact; state_bytes: of all of them, a row.
        two_phases: the lookahead went through the target behind the prompt: until then keys and values were whole.
    """

    short: bool
    sites: list[SiteRecord]
    states: int
    state_bytes: int
    two_phases: bool


@dataclasses.dataclass(frozen=True)
class HeldRecord:
    """What is held in host memory of a batch of conversations (`dropped="host"`).

    Args: tokens: of the longest. target_bytes, draft_bytes: of either model's keys and values.
    """

    rows: int
    tokens: int
    target_bytes: int
    draft_bytes: int


@dataclasses.dataclass(eq=False)
class BackendRecord:
    """Everything that one backend has compiled.

    Attributes:
        pruned_by: the method.
        draft_config: the draft's, where there is a draft.
        target_configs: of the targets seen, each once.
        decoders: sizes of target and draft, where they are not to be read from the configs.
        foreign: graphs without a BudgetCache.
        interpreted: why the model's own forward runs uncompiled and is pruned around it; "" where graphs serve.
        prompts: what became of prompts then, each outcome once.
        devices: what computes on which, of models that are spread over several; a layer's cache lies with it.
        notes: what else there is to say of calls.
        replayed: tokens that came free: the answer followed the lookahead (verified lookahead).
        kept: the budget that was chosen last, and the attention that it keeps.
        bound: of the slots for generated tokens, as it was last; None: caches grow.
        held: in host memory, behind the turn that was read last; None: nothing.
        bits: of prompts in the cache; 0: the model's dtype.
        proposed, accepted: tokens that the draft proposed behind its lookahead, and those that the answer took.
    """

    pruned_by: Method
    lowering: str
    draft_config: Any = dataclasses.field(default=None, repr=False)
    graphs: list[GraphRecord] = dataclasses.field(default_factory=list)
    refusals: list[str] = dataclasses.field(default_factory=list)
    foreign: int = 0
    interpreted: str = ""
    prompts: list[PromptRecord] = dataclasses.field(default_factory=list)
    devices: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)
    replayed: int = 0
    proposed: int = 0
    accepted: int = 0
    kept: Kept | None = None
    bound: Bound | None = None
    held: HeldRecord | None = None
    bits: int = 0
    draft_seconds: float = 0.0
    target_configs: list[Any] = dataclasses.field(default_factory=list, repr=False)
    decoders: tuple[Decoder | None, Decoder | None] | None = dataclasses.field(default=None, repr=False)

    @property
    def method(self) -> str:
        """The method's key: its name and hyperparameters."""
        return self.pruned_by.key

    def saw(self, config: Any) -> None:
        """Remember a target by its config."""
        if not self.has_seen(config):
            self.target_configs.append(config)

    def has_seen(self, config: Any) -> bool:
        return any(config is seen for seen in self.target_configs)

    def refuse(self, reason: str) -> None:
        if reason not in self.refusals:
            self.refusals.append(reason)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def came_free(self, tokens: int, proposed: bool) -> None:
        """So many tokens were not computed one by one."""
        if proposed:
            self.accepted += tokens
        else:
            self.replayed += tokens

    def chose(self, kept: Kept) -> None:
        """A prompt got a budget of its own."""
        self.kept = kept

    def read(self, prompt: PromptRecord) -> None:
        """Remember what became of a prompt, if it is new."""
        if prompt not in self.prompts:
            self.prompts.append(prompt)

    def costs(self) -> Costs | None:
        """Closed forms of what the method costs; None before the first call, or where none is known."""
        target, draft = self.decoders or (None, None)
        if self.decoders is None and self.target_configs:
            target = Decoder.of(self.target_configs[-1])
            draft = None if self.draft_config is None else Decoder.of(self.draft_config)
        return None if target is None else costs_of(self.pruned_by, target, draft, self.bits)
