"""What a request chooses for itself, and what became of it: headers X-Specpass-*, or vLLM's field vllm_xargs."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Mapping
from typing import Any

from specpass.errors import BudgetError, ServingError
from specpass.methods.registry import FULL, parse_budget

HEADER, XARG = "x-specpass-", "specpass_"
METHOD = "specpc"


@dataclasses.dataclass
class Asked:
    """One HTTP request: of a batch of prompts, `read` counts the tokens of all that reach the engine."""

    budget: int | float | None = None
    method: str = METHOD
    read: int = 0
    whole: str = ""  # why a prompt reached the engine as it was

    def but(self, values: Mapping[str, Any], prefix: str) -> Asked:
        """With those of `values` whose names begin with `prefix`; others are left alone.

        Raises: ServingError.
        """
        found = {
            name.lower().removeprefix(prefix): value
            for name, value in values.items()
            if name.lower().startswith(prefix)
        }
        budget, method = found.pop("budget", self.budget), str(found.pop("method", self.method)).lower()
        if found:
            raise ServingError(f"{prefix}{next(iter(found))}: a request may choose {prefix}budget and {prefix}method.")
        if method not in (METHOD, FULL):
            raise ServingError(
                f"{prefix}method={method!r}: expected {METHOD}, or {FULL} for all of it; other methods prune the KV "
                "cache, which is the engine's."
            )
        return dataclasses.replace(self, budget=_tokens(budget, f"{prefix}budget"), method=method)


def _tokens(budget: Any, name: str) -> int | float | None:
    with contextlib.suppress(BudgetError):  # which speaks of KV slots
        parsed = parse_budget(budget) if budget is not None else None
        if not isinstance(parsed, str):
            return parsed
    raise ServingError(f"{name}={budget!r}: expected a number of tokens, or a ratio of the prompt.")


CURRENT: contextvars.ContextVar[Asked | None] = contextvars.ContextVar("specpass_asked", default=None)
