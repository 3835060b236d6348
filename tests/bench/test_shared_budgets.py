"""What bench.shared_budgets says of its rounds."""

from __future__ import annotations

from bench import shared_budgets


def test_medians_over_those_of_equal_budgets() -> None:
    found = {
        "uniform": {"first_s": [1.0, 2.0, 9.0], "step_s": [0.1, 0.1, 0.3], "cache_bytes": 100},
        "global": {"first_s": [3.0, 2.2, 9.0], "step_s": [0.05, 0.2, 0.05], "cache_bytes": 101},
    }
    summary = shared_budgets.summarise(found)
    assert summary["global"] == {
        "first_s": 3.0,
        "step_s": 0.05,
        "first_s over uniform": 1.1,
        "step_s over uniform": 0.5,
        "cache_bytes over uniform": 1.01,
    }
    assert {own for key, own in summary["uniform"].items() if "over" in key} == {1.0}
