"""Cold calls one after the other, warm calls side by side.

Dynamo lets one thread compile at a time, but a thread that waited for another's graph does not look for it: it compiles
the same once more. So a call of a form that was not met before waits here, and finds the graph.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Hashable, Iterator, Mapping
from typing import Any

import torch

from specpass.cache.budget import BudgetCache
from specpass.cache.prompt import tokens_of

_COLD = threading.RLock()  # of all models: there is one Dynamo


@contextlib.contextmanager
def one_at_a_time(known: set[Hashable], form: Hashable) -> Iterator[None]:
    """Wait for other cold calls unless `form` is `known`, which it is from then on."""
    if form in known:
        yield
        return
    with _COLD:
        yield
    known.add(form)


def coarse_form_of(cache: BudgetCache, kwargs: Mapping[str, Any]) -> Hashable:
    """What decides by which graph a call is served; two graphs of one form are compiled at the same time, no worse."""
    layer = cache.budgeted[0]
    tokens = tokens_of(kwargs)
    size = tokens.shape[1] if isinstance(tokens, torch.Tensor) else 0
    state = (layer.slots, min(size, 2)) if layer.is_initialized else (min(size, 2), size <= cache.whole, cache.room)
    return (
        cache.method,
        cache.lookahead,
        cache.exact,
        cache.early_exit,
        cache.bits,
        cache.answers > 1,
        state,
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple((name, _form(value)) for name, value in sorted(kwargs.items()) if name != "past_key_values"),
    )


def _form(value: Any) -> Hashable:
    if isinstance(value, torch.Tensor):
        return value.dtype, value.device, value.dim(), min(value.shape[0], 2) if value.dim() else 0
    if isinstance(value, (int, float, str, bool)):
        return value
    return f"{type(value)}"
