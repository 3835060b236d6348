"""SnapKV: the prompt's last queries score the rest."""

from __future__ import annotations

import dataclasses

from specpass.methods.base import Scored


@dataclasses.dataclass(frozen=True)
class SnapKV(Scored):
    """The last W prompt queries score alone (no draft): mean over rows, average pool. Source: arXiv 2404.14469.

    With spread="heads" it is AdaKV (arXiv 2407.11550), with budget="auto" each prompt gets a budget of its own: see
    Scored.
    """

    reduce: str = "mean"
    pool: str = "avg"
