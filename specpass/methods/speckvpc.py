"""SpecKV-PC: SpecPC, then SpecKV on what is left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from specpass.errors import LookaheadError, PromptBudgetError
from specpass.methods.base import check_count
from specpass.methods.speckv import SpecKV
from specpass.methods.specpc import SpecPC


@dataclasses.dataclass(frozen=True)
class SpecKVPC(SpecKV):
    """SpecPC to `prompt_budget` tokens, then SpecKV on what is left, with one draft run for both.

    Args:
        prompt_budget: prompt tokens C1 that the target reads.
        prompt_window: `window` of SpecPC.
        prompt_kernel: `kernel` of SpecPC.
        neighbours: as in SpecPC.
        first_layer: as in SpecPC.
        positions: as in SpecPC.

    The other arguments are SpecKV's; `reduce` is used by both steps. Source: arXiv 2506.08373, section on SpecKV-PC.
    """

    prompt_budget: int = 2048
    prompt_window: int = 64
    prompt_kernel: int = 32
    neighbours: int = 32
    first_layer: int | None = None
    positions: str = "renumber"

    recommended: ClassVar[Mapping[str, Any]] = {**SpecKV.recommended, "prompt_kernel": 16, "neighbours": 16}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lookahead_ids is not None:
            raise LookaheadError("SpecKVPC needs the draft's attention, which lookahead_ids cannot give: use SpecKV.")
        if self.looks_up or self.writes_itself:
            raise LookaheadError(
                f"SpecKVPC needs the draft's attention, which lookahead={self.lookahead!r} cannot give: use SpecKV, or "
                "give lookahead as a count."
            )
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
        """The first step: the draft's one run is its too, so that all L lookahead tokens score."""
        return SpecPC(
            budget=self.prompt_budget,
            window=self.prompt_window,
            lookahead=self.look_ahead(),
            kernel=self.prompt_kernel,
            neighbours=self.neighbours,
            first_layer=self.first_layer,
            reduce=self.reduce,
            positions=self.positions,
            temperature=self.temperature,
            seed=self.seed,
        )
