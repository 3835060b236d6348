"""Dynamo's settings while one of our models is called, and at no other time: more graphs, and no cache of fake results.

Past its recompile limit Dynamo runs a call uncompiled without a word, and its default of 8 counts all models of a
process: they share transformers' decorated forward, which is one code object.

The cache of fake results does not pay: see specpass.graph.fakes.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch._dynamo.repro import after_dynamo

RECOMPILE_LIMIT = 1024


def call_settings(**more: Any) -> AbstractContextManager[None]:
    """Inside, and in this thread alone, a code object may have 1,024 graphs; `more` settings of Dynamo hold there too.

    A call that would be one more is an error, and does not run uncompiled. Each thread has settings of its own, which
    start as Dynamo's defaults: that is why this is entered around each call.
    """
    config = torch._dynamo.config
    limits = {
        name: max(getattr(config, name), RECOMPILE_LIMIT) for name in ("recompile_limit", "accumulated_recompile_limit")
    }
    return config.patch(fail_on_recompile_limit_hit=True, fake_tensor_cache_enabled=False, **limits, **more)


def ensure_limit() -> None:
    """Raise the limit for good where nothing raised it for this call: better than a call that runs uncompiled."""
    if torch._dynamo.config.recompile_limit < RECOMPILE_LIMIT:
        torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT


def offer_context() -> None:
    """Let Dynamo find the `backend_ctx_ctor` of a backend that torch.compile has wrapped.

    Dynamo enters it around each call. It asks the backend, but torch.compile puts a wrapper of its own around every
    backend (by its name or not) and Dynamo a second, which has the first one's attributes and not the backend's.
    """
    wrapper = getattr(after_dynamo, "WrapBackendDebug", None)  # absent: ensure_limit has the last word
    if wrapper is not None and not hasattr(wrapper, "backend_ctx_ctor"):
        wrapper.backend_ctx_ctor = property(_context_of)


def _context_of(wrapper: Any) -> Callable[[], AbstractContextManager[Any]]:
    return wrapper.compiler_fn.backend_ctx_ctor  # an AttributeError says that there is none, as before


offer_context()
