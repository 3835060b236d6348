"""SpecPC: the target reads only the prompt tokens that the draft attends to."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from specpass.errors import BudgetError
from specpass.methods.base import Method, check_count, check_temperature

POSITIONS = ("renumber", "original")


@dataclasses.dataclass(frozen=True)
class SpecPC(Method):
    """The target reads the C prompt tokens that the draft's own attention shows to matter, and no others.

    Args:
        budget: prompt tokens C, or a ratio of the prompt length.
        window: the last W prompt tokens are always read; their queries score, later ones with more weight.
        lookahead: L tokens that the draft writes; each after the first adds a row.
        kernel: width of the pooling along the sequence.
        pool: "max" or "avg".
        neighbours: tokens taken around each peak, itself included.
        first_layer: draft layers from this one on score, those with windows left out; None is min(8, layers // 3).
        reduce: over heads and rows, then layers, then steps: "max", or "mean" (a plain sum).
        positions: "renumber" counts the tokens read 0 .. C - 1; "original" keeps the prompt's numbers.
        temperature: as in SpecKV.
        seed: as in SpecKV.

    Source: arXiv 2506.08373, Algorithm 2; "original" as in Speculative Prefill (2502.02789).
    """

    window: int = 64
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
    # A quarter of the paper's width: four times as many places fit in a budget, see bench/prompt_compression.py.
    recommended: ClassVar[Mapping[str, Any]] = {"kernel": 16, "neighbours": 16}

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
