"""PyramidKV: SnapKV with a budget that falls with depth."""

from __future__ import annotations

import dataclasses

from specpass.errors import BudgetError
from specpass.methods.base import check_count
from specpass.methods.snapkv import SnapKV


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
        if self.spread != "uniform":
            raise BudgetError(f"spread={self.spread!r}: PyramidKV has a spread of its own; use SnapKV(spread=...).")

    def layer_budgets(self, num_layers: int) -> tuple[int, ...]:
        """Falling budgets whose sum is num_layers * C."""
        even = super().layer_budgets(num_layers)
        if num_layers < 2:  # none where all of a model's layers have windows
            return even
        window, free = self.window, even[0] - self.window
        least = max(free / self.beta, 1.0)
        step = 2 * (free - least) / (num_layers - 1)
        ideal = [2 * free - least - index * step for index in range(num_layers)]
        ends = [round(sum(ideal[: index + 1])) for index in range(num_layers)]  # rounding never drifts
        return tuple(window + end - start for start, end in zip([0, *ends], ends, strict=False))
