"""Methods: who supplies the query rows, how scores become indices, how the budget is spread.

A method is a frozen dataclass: its fields are its hyperparameters, checked when it is made. Names and defaults:
"Draft-based Approximate Inference for LLMs" (arXiv 2506.08373), SnapKV (2404.14469), StreamingLLM (2309.17453),
PyramidKV (2406.02069).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

from specpass.errors import BudgetError, LookaheadError

if TYPE_CHECKING:
    from specpass.methods.specpc import SpecPC

LOOKAHEAD = 32  # tokens that a draft writes where nobody said how many
NGRAM = "ngram"  # a lookahead that is copied from the prompt
SELF = "self"  # one that the target writes, from what its window keeps
DRAFTLESS = (NGRAM, SELF)
BUDGET_STEP = 64  # ratios are resolved to multiples of this at least
SPREADS = ("uniform", "heads", "global")  # who shares budgets: nobody, a layer's KV heads, those of all layers
CANDIDATES = 3  # times its even share that a layer may have of what all layers share
AUTO = "auto"  # a budget that is chosen for each prompt, by what it would keep of the attention
LADDER = (128, 256, 512, 1024, 2048, 4096)  # the budgets that it is chosen from: few sizes, few graphs
SHARE = 0.95  # of the attention that it keeps
FLOOR = 0.2  # of its even share that each KV head keeps at least, where budgets are spread (AdaKV, arXiv 2407.11550)


def check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise BudgetError(f"{name}={value!r}: expected an integer >= {low}.")


def check_temperature(temperature: float) -> None:
    if not temperature >= 0.0:
        raise BudgetError(f"temperature={temperature}: expected 0.0 (greedy) or more.")


def check_asked(draft: Any, method: Method) -> None:
    """Raises: LookaheadError: there is a draft, and the lookahead is the prompt's or the target's own."""
    if draft is not None and (method.looks_up or method.writes_itself):
        what = "copies tokens of the prompt" if method.looks_up else "is written by the target itself"
        raise LookaheadError(
            f"lookahead={method.lookahead!r} {what}, and a draft is given, which would have nothing to do: leave one "
            "of them out."
        )


def is_builtin(cls: type) -> bool:
    """Whether a method's class is one of specpass's own."""
    return cls.__module__.startswith(f"{__package__}.")


class Traits:
    """What the rest of specpass asks of a method, with what holds where a method says nothing.

    No dataclass: a method makes a field of what its user may choose (`window: int = 32`).
    """

    scored: ClassVar[bool] = False  # whether query rows are scored against the keys
    drafts: ClassVar[bool] = False  # whether a draft (or given ids, or the prompt itself) looks ahead of the prompt
    appends: ClassVar[bool] = False  # whether the target reads the lookahead tokens, which then supply query rows

    window: int = 0  # last prompt tokens W that are always kept, and whose queries score
    sinks: int = 0  # first prompt tokens that are always kept
    reduce: str = "max"  # over query rows: "max" or "mean"
    pool: str = "max"  # along the sequence: "max" or "avg"
    kernel: int = 1  # the pooling's width
    lookahead: int | str | None = 0  # tokens L that the draft writes; None, NGRAM, SELF: see look_ahead
    lookahead_ids: tuple[tuple[int, ...], ...] | None = None  # [B, L] token ids in the draft's place
    verify: bool = False  # whether the answer follows the lookahead by the logits of the target's own prefill
    temperature: float = 0.0  # of the draft's sampling; 0.0 is greedy
    seed: int = 0  # of the draft's sampling
    futures: int = 1  # branches M of L tokens that the draft writes, each of which scores
    value_norms: bool = False  # whether scores are weighed by the norms of the columns' values
    reconstruction: bool = False  # whether scores are what the rows' outputs would lose, and no attention
    spread: str = "uniform"  # whether KV heads share their budgets: see SPREADS
    share: float | None = None  # of the attention that a budget has to keep, where the smallest of a few is chosen
    sparse_prefill: int = 0  # top columns that a prompt's queries read, and last positions besides; 0: all

    recommended: ClassVar[Mapping[str, Any]] = {}  # fields that measured better than the paper's: see Method.best

    # A method of one's own replaces these by methods; None stands for the operators `importance` and `select`.
    # score(query [B, H, R, D], key [B, K, T, D], value [B, K, T, Dv], rows [B, R], lengths [B], scale)
    #   -> [B, K, T] float32 >= 0; rows are the positions of the R = W + L queries, -1 where there is none
    # select(scores [B, K, T], lengths [B], budget) -> positions [B, K, C] int64, ascending; unused slots last, -1
    score: ClassVar[Callable[..., Any] | None] = None
    select: ClassVar[Callable[..., Any] | None] = None


@dataclasses.dataclass(frozen=True)
class Method(Traits):
    """What every method has: a budget C of KV slots per KV head and layer.

    Args:
        budget: slots as an int, or a ratio of the prompt length as a float in (0, 1]; "auto": see Scored.
    """

    budget: int | float | str

    def __post_init__(self) -> None:
        self._check_budget()

    @classmethod
    def best(cls, budget: int | float | str, **options: Any) -> Self:
        """The method with the fields that measured best here, where a class's own are its paper's.

        Args: options: other fields, or other values of these.
        """
        return cls(budget, **{**cls.recommended, **options})

    def _check_budget(self) -> None:
        budget, least = self.budget, max(self.window, self.sinks)
        if budget == AUTO:
            if self.share is None:
                raise BudgetError(
                    f"budget={budget!r}: {self.name} keeps no share of scored attention that could choose it; give a "
                    "number of KV slots, e.g. budget=1024, or use SpecKV or SnapKV."
                )
            budget = LADDER[-1]
        if isinstance(budget, float):
            if not 0.0 < budget <= 1.0:
                raise BudgetError(f"budget={budget}: a ratio must be in (0, 1]; give a count as an int.")
            return
        if isinstance(budget, bool) or not isinstance(budget, int) or budget <= 0:
            raise BudgetError(f"budget={budget!r}: expected a positive number of KV slots, e.g. budget=1024.")
        if budget <= least:
            part = "window" if least == self.window else "sinks"
            raise BudgetError(
                f"budget={budget} is not larger than {part}={least}: nothing would be selected; "
                f"raise budget above {least} or lower {part}."
            )

    def _check_reductions(self) -> None:
        chosen = (("reduce", self.reduce, ("max", "mean")), ("pool", self.pool, ("max", "avg")))
        for name, value, allowed in chosen:
            if value not in allowed:
                raise BudgetError(f"{name}={value!r}: expected one of {allowed}.")

    def resolve(self, prompt_length: int | None) -> Method:
        """This method with its budget as a count for a prompt of `prompt_length` tokens.

        A ratio is rounded up to a multiple of 64 slots, or of an eighth of its power of two, so that prompts of all
        lengths share few graphs (eight for each doubling); it is never below window + 1. "auto" is the smallest size of
        the ladder that holds the prompt, or the largest one: what is kept of it is chosen when it was read (see rungs).
        """
        if isinstance(self.budget, int):
            return self
        if isinstance(self.budget, str):
            sizes = [size for size in LADDER if size > self.window]
            fits = (size for size in sizes if prompt_length is not None and size >= prompt_length)
            return dataclasses.replace(self, budget=next(fits, sizes[-1]))
        if prompt_length is None:
            raise BudgetError(
                f"budget={self.budget} is a ratio and the prompt length is not known here: pass prompt_length= to "
                "BudgetCache, call generate() on a model from specpass.compile, or give the budget as a count."
            )
        slots = int(self.budget * prompt_length)
        step = max(BUDGET_STEP, (1 << slots.bit_length()) // 16)
        slots = -(-slots // step) * step
        return dataclasses.replace(self, budget=max(slots, max(self.window, self.sinks) + 1))

    def look_ahead(self, max_new_tokens: int | None = None) -> int:
        """Tokens L that stand behind the prompt in a generation of `max_new_tokens` (None: nobody said how many).

        `lookahead=None` is min(32, max_new_tokens), and so are "ngram" and "self": L is a constant of the prefill's
        graph, which all answers of 32 tokens or more share, whatever their number; a shorter one has a graph of its
        own L.
        """
        if not self.drafts:
            return 0
        if isinstance(self.lookahead, int):
            return self.lookahead
        return LOOKAHEAD if max_new_tokens is None else min(LOOKAHEAD, max_new_tokens)

    @property
    def rungs(self) -> tuple[int, ...]:
        """Sizes of which a prompt's budget is the smallest that keeps `share` of the attention, or the last.

        Powers of two up to the budget; () where the budget is what it is.
        """
        if self.share is None or not isinstance(self.budget, int):
            return ()
        return (*(size for size in LADDER if self.window < size < self.budget), self.budget)

    @property
    def looks_up(self) -> bool:
        """Whether the lookahead is copied from the prompt."""
        return self.drafts and self.lookahead == NGRAM

    @property
    def writes_itself(self) -> bool:
        """Whether the target writes the lookahead, from what its window alone keeps of the prompt."""
        return self.drafts and self.lookahead == SELF

    @property
    def needs_draft(self) -> bool:
        """Whether a draft writes the lookahead: nobody gave it, and it is neither the prompt's nor the target's own."""
        return self.drafts and self.lookahead_ids is None and self.lookahead not in DRAFTLESS

    def layer_budgets(self, num_layers: int) -> tuple[int, ...]:
        """Budget C of each of `num_layers` layers; equal unless a method spreads it."""
        if not isinstance(self.budget, int):
            raise BudgetError(f"budget={self.budget!r} depends on the prompt: call resolve(prompt_length) first.")
        return (self.budget,) * num_layers

    def floor(self, budget: int) -> int:
        """Scored positions that each KV head keeps at least of a layer's budget C, beside the window."""
        return int(FLOOR * (budget - self.window))

    def candidates(self, budget: int) -> int:
        """Slots of a head, in the mean, that a layer may have of a budget C that all layers share, window included."""
        return self.window + CANDIDATES * (budget - self.window)

    def most(self, budget: int, ranks: int) -> int:
        """Slots of a head, in the mean, of one of several `ranks`, where the others' heads keep their floor alone.

        C of one process.
        """
        return ranks * budget - (ranks - 1) * (self.window + self.floor(budget))

    def longest(self, budget: int, kv_heads: int, layers: int) -> int:
        """Slots M that one KV head may have of a layer's budget C for a prompt: all that the others' floors leave.

        Args: layers: so many share one storage.
        """
        if self.spread == "uniform":
            return budget

        def left(each: int, heads: int) -> int:
            return self.window + heads * (each - self.window) - (heads - 1) * self.floor(budget)

        if self.spread == "heads":
            return left(budget, kv_heads)
        return min(left(self.candidates(budget), kv_heads), left(budget, layers * kv_heads))

    @property
    def prompt(self) -> SpecPC | None:
        """How the prompt itself is compressed before the target reads it; None where it is read whole."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def key(self) -> str:
        """Stable text that names the method and all its hyperparameters, for cache keys and reports.

        A method of one's own is named with its module: two classes of one name are two methods.
        """
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        cls = type(self)
        name = self.name if is_builtin(cls) else f"{cls.__module__}.{cls.__qualname__}"
        return f"{name}({fields})"


@dataclasses.dataclass(frozen=True)
class Scored(Method):
    """Methods that keep the window and the top C - W positions by pooled attention scores.

    value_norms: scores are weighed by the norm of each position's value (arXiv 2406.12335), before they are pooled.
    reconstruction: a score is how far the outputs of the rows that score would move without a position, and not the
    attention that it gets (ReST-KV, arXiv 2605.08840).
    spread: "uniform" gives each KV head C slots. "heads": a layer's K heads share K * C, by one choice of the best
    scores of all of them, where each keeps its window and a fifth of C - W at least (AdaKV, arXiv 2407.11550).
    "global": the same for the heads of all layers, none of which has more than three times C - W for each of its heads.
    share: each prompt gets the smallest budget of 128, 256, 512, ..., 4096 that keeps this share of the attention of
    the rows that score, in the mean over layers, and `budget` at most: "auto" stands for 4096, with share=0.95.
    """

    window: int = 32
    reduce: str = "max"
    pool: str = "max"
    kernel: int = 7
    spread: str = dataclasses.field(default="uniform", kw_only=True)
    value_norms: bool = dataclasses.field(default=False, kw_only=True)
    reconstruction: bool = dataclasses.field(default=False, kw_only=True)
    share: float | None = dataclasses.field(default=None, kw_only=True)

    scored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        self._check_values()
        self._check_spread()
        self._check_share()
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise BudgetError(f"kernel={self.kernel}: pooling keeps the length only for odd kernels, e.g. kernel=7.")
        self._check_reductions()
        self._check_budget()

    def _check_values(self) -> None:
        """Raises: BudgetError: values count in two ways, or in a function of the method's own."""
        chosen = [name for name in ("value_norms", "reconstruction") if getattr(self, name)]
        if chosen and self.score is not None:
            raise BudgetError(
                f"{chosen[0]}=True: {self.name} scores by a function of its own, which is handed the values; leave "
                f"{chosen[0]} out."
            )
        if len(chosen) == 2:
            raise BudgetError(
                "value_norms=True and reconstruction=True: the second has the values in it already; leave one of them "
                "out."
            )

    def _check_spread(self) -> None:
        if self.spread not in SPREADS:
            raise BudgetError(f"spread={self.spread!r}: expected one of {SPREADS}.")
        if self.spread != "uniform" and self.select is not None:
            raise BudgetError(
                f"spread={self.spread!r}: {self.name} selects by a function of its own, which chooses for each KV "
                "head; leave spread out."
            )

    def _check_share(self) -> None:
        """Raises: BudgetError: no share, or one that nothing can be chosen by."""
        if self.share is None:
            if self.budget != AUTO:
                return
            object.__setattr__(self, "share", SHARE)
        share = self.share
        asked = f"budget={self.budget!r}" if self.budget == AUTO else f"share={share!r}"
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not 0.0 < share <= 1.0:
            raise BudgetError(f"share={share!r}: expected a part of the attention in (0, 1], e.g. share={SHARE}.")
        reasons = (
            (type(self).layer_budgets is not Method.layer_budgets, "gives its layers budgets of their own"),
            (self.prompt is not None, "reads a part of the prompt"),
            (self.spread != "uniform", f"spreads budgets over KV heads (spread={self.spread!r})"),
            (self.select is not None, "selects by a function of its own"),
        )
        for found, reason in reasons:
            if found:
                raise BudgetError(
                    f"{asked}: {self.name} {reason}, and one budget for all KV heads is what can be chosen: give a "
                    "number of KV slots, e.g. budget=1024, or use SpecKV or SnapKV."
                )
