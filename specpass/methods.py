"""Methods: who supplies the query rows, how scores become indices, how the budget is spread.

A method is a frozen dataclass: its fields are its hyperparameters, checked when it is made. Names and defaults:
"Draft-based Approximate Inference for LLMs" (arXiv 2506.08373), SnapKV (2404.14469), StreamingLLM (2309.17453),
PyramidKV (2406.02069). Methods that shorten the prompt itself are in `prompt_methods`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from specpass.errors import BudgetError, LookaheadError

if TYPE_CHECKING:
    from specpass.prompt_methods import SpecPC

BUDGET_STEP = 64  # ratios are resolved to multiples of this, so that near prompt lengths share one decode graph


def check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise BudgetError(f"{name}={value!r}: expected an integer >= {low}.")


def check_temperature(temperature: float) -> None:
    if not temperature >= 0.0:
        raise BudgetError(f"temperature={temperature}: expected 0.0 (greedy) or more.")


@dataclasses.dataclass(frozen=True)
class Method:
    """What every method has: a budget C of KV slots per KV head and layer.

    Args:
        budget: slots as an int, or a ratio of the prompt length as a float in (0, 1].
    """

    budget: int | float

    scored: ClassVar[bool] = False  # whether query rows are scored against the keys
    window: ClassVar[int] = 0
    sinks: ClassVar[int] = 0
    drafts: ClassVar[bool] = False  # whether a draft (or given ids) looks ahead of the prompt
    appends: ClassVar[bool] = False  # whether the target reads the lookahead tokens, which then supply query rows

    # A method of one's own replaces these by methods; None stands for the operators `importance` and `select`.
    # score(query [B, H, R, D], key [B, K, T, D], value [B, K, T, Dv], rows [B, R], lengths [B], scale)
    #   -> [B, K, T] float32 >= 0; rows are the positions of the R = W + L queries, -1 where there is none
    # select(scores [B, K, T], lengths [B], budget) -> positions [B, K, C] int64, ascending; unused slots last, -1
    score: ClassVar[Callable[..., Any] | None] = None
    select: ClassVar[Callable[..., Any] | None] = None

    def __post_init__(self) -> None:
        self._check_budget()

    def _check_budget(self) -> None:
        budget, least = self.budget, max(self.window, self.sinks)
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
        for name, allowed in (("reduce", ("max", "mean")), ("pool", ("max", "avg"))):
            if getattr(self, name) not in allowed:
                raise BudgetError(f"{name}={getattr(self, name)!r}: expected one of {allowed}.")

    def resolve(self, prompt_length: int | None) -> Method:
        """This method with its budget as a count for a prompt of `prompt_length` tokens.

        A ratio is rounded up to a multiple of 64 slots, and never below window + 1.
        """
        if isinstance(self.budget, int):
            return self
        if prompt_length is None:
            raise BudgetError(
                f"budget={self.budget} is a ratio and the prompt length is not known here: pass prompt_length= to "
                "BudgetCache, call generate() on a model from specpass.compile, or give the budget as a count."
            )
        slots = -(-int(self.budget * prompt_length) // BUDGET_STEP) * BUDGET_STEP
        return dataclasses.replace(self, budget=max(slots, max(self.window, self.sinks) + 1))

    def layer_budgets(self, num_layers: int) -> tuple[int, ...]:
        """Budget C of each of `num_layers` layers; equal unless a method spreads it."""
        if not isinstance(self.budget, int):
            raise BudgetError(f"budget={self.budget} is a ratio: call resolve(prompt_length) first.")
        return (self.budget,) * num_layers

    @property
    def prompt(self) -> SpecPC | None:
        """How the prompt itself is compressed before the target reads it; None where it is read whole."""
        return None

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def key(self) -> str:
        """Stable text that names the method and all its hyperparameters, for cache keys and reports."""
        fields = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in dataclasses.fields(self))
        return f"{self.name}({fields})"


@dataclasses.dataclass(frozen=True)
class _Scored(Method):
    """Methods that keep the window and the top C - W positions by pooled attention scores."""

    window: int = 32  # type: ignore[misc]
    reduce: str = "max"
    pool: str = "max"
    kernel: int = 7

    scored: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_count("window", self.window, 1)
        check_count("kernel", self.kernel, 1)
        if self.kernel % 2 == 0:
            raise BudgetError(f"kernel={self.kernel}: pooling keeps the length only for odd kernels, e.g. kernel=7.")
        self._check_reductions()
        self._check_budget()


@dataclasses.dataclass(frozen=True)
class SpecKV(_Scored):
    """The target keeps the KV pairs that the window and the draft's L lookahead tokens attend to.

    Args:
        budget: KV slots C per KV head and layer, or a ratio of the prompt length.
        window: the last W prompt tokens are always kept and always score.
        lookahead: L tokens that the draft writes; None means max_new_tokens of the generation.
        reduce, pool, kernel: reduction over rows, pooling along the sequence and its odd width.
        temperature, seed: 0.0 drafts greedily; above, the draft samples from a counter-based generator.
        lookahead_ids: [B, L] token ids that take the draft's place; no draft is needed then.

    Source: arXiv 2506.08373, Algorithm 1.
    """

    lookahead: int | None = None
    temperature: float = 0.0
    seed: int = 0
    lookahead_ids: tuple[tuple[int, ...], ...] | None = None

    drafts: ClassVar[bool] = True
    appends: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lookahead is not None:
            check_count("lookahead", self.lookahead, 1)
        check_temperature(self.temperature)
        if self.lookahead_ids is not None:
            rows = as_id_rows(self.lookahead_ids)
            object.__setattr__(self, "lookahead_ids", rows)
            if self.lookahead not in (None, len(rows[0])):
                raise LookaheadError(
                    f"lookahead={self.lookahead} but lookahead_ids has {len(rows[0])} tokens a row; leave one out."
                )
            object.__setattr__(self, "lookahead", len(rows[0]))


def as_id_rows(ids: Any) -> tuple[tuple[int, ...], ...]:
    """[B, L] token ids (a tensor or nested sequences) as nested tuples.

    Raises:
        LookaheadError: not two-dimensional, empty, or rows of different lengths.
    """
    rows = ids.tolist() if hasattr(ids, "tolist") else ids
    if not isinstance(rows, Sequence) or not rows or not all(isinstance(row, Sequence) for row in rows):
        raise LookaheadError(f"lookahead_ids={ids!r}: expected [B, L] token ids.")
    lengths = {len(row) for row in rows}
    if len(lengths) != 1 or 0 in lengths:
        raise LookaheadError(f"lookahead_ids has rows of lengths {sorted(lengths)}: expected one length L >= 1.")
    return tuple(tuple(int(token) for token in row) for row in rows)


@dataclasses.dataclass(frozen=True)
class SnapKV(_Scored):
    """The last W prompt queries score alone (no draft): mean over rows, average pool. Source: arXiv 2404.14469."""

    reduce: str = "mean"
    pool: str = "avg"


@dataclasses.dataclass(frozen=True)
class PyramidKV(SnapKV):
    """SnapKV with a budget that falls linearly with depth, C on average. Source: arXiv 2406.02069.

    Args:
        beta: the last layer selects (C - W) / beta positions, the first as many more than C - W.
    """

    beta: int = 20

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("beta", self.beta, 1)

    def layer_budgets(self, num_layers: int) -> tuple[int, ...]:
        """Falling budgets whose sum is num_layers * C."""
        (mean, *_), window = super().layer_budgets(num_layers), self.window
        free = mean - window
        least = max(free / self.beta, 1.0)
        step = 2 * (free - least) / max(num_layers - 1, 1)
        ideal = [2 * free - least - index * step for index in range(num_layers)] if num_layers > 1 else [free]
        ends = [round(sum(ideal[: index + 1])) for index in range(num_layers)]  # rounding never drifts
        return tuple(window + end - start for start, end in zip([0, *ends], ends, strict=False))


@dataclasses.dataclass(frozen=True)
class StreamingLLM(Method):
    """The first `sinks` positions and the last C - sinks. Source: arXiv 2309.17453."""

    sinks: int = 4  # type: ignore[misc]

    def __post_init__(self) -> None:
        check_count("sinks", self.sinks, 0)
        self._check_budget()
