"""Methods that shorten the prompt itself: the target reads only the tokens that the draft attends to.

Names and defaults: "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

from specpass.errors import BudgetError, LookaheadError, PromptBudgetError
from specpass.methods import Method, SpecKV, check_count, check_temperature

POSITIONS = ("renumber", "original")


@dataclasses.dataclass(frozen=True)
class SpecPC(Method):
    """The target reads the C prompt tokens that the draft's own attention shows to matter, and no others.

    Args:
        budget: prompt tokens C, or a ratio of the prompt length.
        window: the last W prompt tokens are always read; their queries score, later ones with more weight.
        lookahead: L tokens that the draft writes; each after the first adds a row.
        kernel, pool: pooling along the sequence.
        neighbours: tokens taken around each peak, itself included.
        first_layer: draft layers from this one on score; None is min(8, layers // 3).
        reduce: over heads and rows, then layers, then steps: "max", or "mean" (a plain sum).
        positions: "renumber" counts the tokens read 0 .. C - 1; "original" keeps the prompt's numbers.
        temperature, seed: as in SpecKV.

    Source: arXiv 2506.08373, Algorithm 2; "original" as in Speculative Prefill (2502.02789).
    """

    window: int = 64  # type: ignore[misc]
    lookahead: int = 1
    kernel: int = 64
    neighbours: int = 64
    first_layer: int | None = None
    reduce: str = "max"
    pool: str = "max"
    positions: str = "renumber"
    temperature: float = 0.0
    seed: int = 0

    drafts: ClassVar[bool] = True

    def __post_init__(self) -> None:
        for name in ("window", "lookahead", "kernel", "neighbours"):
            check_count(name, getattr(self, name), 1)
        if self.first_layer is not None:
            check_count("first_layer", self.first_layer, 0)
        if self.positions not in POSITIONS:
            raise BudgetError(f"positions={self.positions!r}: expected one of {POSITIONS}.")
        check_temperature(self.temperature)
        self._check_reductions()
        self._check_budget()

    @property
    def prompt(self) -> SpecPC:
        return self

    def scoring_layers(self, layers: int) -> range:
        """The draft's layers that score, of `layers`."""
        first = min(8, layers // 3) if self.first_layer is None else self.first_layer
        return range(first, layers)


@dataclasses.dataclass(frozen=True)
class SpecKVPC(SpecKV):
    """SpecPC to `prompt_budget` tokens, then SpecKV on what is left, with one draft run for both.

    Args:
        prompt_budget: prompt tokens C1 that the target reads.
        prompt_window, prompt_kernel, neighbours, first_layer, positions: as window, kernel, ... of SpecPC.

    The other arguments are SpecKV's; `reduce` is used by both steps. Source: arXiv 2506.08373, section on SpecKV-PC.
    """

    prompt_budget: int = 2048
    prompt_window: int = 64
    prompt_kernel: int = 32
    neighbours: int = 32
    first_layer: int | None = None
    positions: str = "renumber"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lookahead_ids is not None:
            raise LookaheadError("SpecKVPC needs the draft's attention, which lookahead_ids cannot give: use SpecKV.")
        check_count("prompt_budget", self.prompt_budget, 1)
        if isinstance(self.budget, int) and self.prompt_budget < self.budget:
            raise PromptBudgetError(
                f"prompt_budget={self.prompt_budget} is smaller than budget={self.budget}: the target would read fewer "
                "tokens than it may keep; raise prompt_budget or lower budget."
            )
        if self.window > self.prompt_window:
            raise PromptBudgetError(
                f"window={self.window} is larger than prompt_window={self.prompt_window}: the window might not be read "
                "whole; raise prompt_window."
            )
        self.prompt  # its own checks  # noqa: B018

    @property
    def prompt(self) -> SpecPC:
        return SpecPC(
            budget=self.prompt_budget,
            window=self.prompt_window,
            kernel=self.prompt_kernel,
            neighbours=self.neighbours,
            first_layer=self.first_layer,
            reduce=self.reduce,
            positions=self.positions,
        )
