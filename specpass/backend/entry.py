"""The name `specpass` among torch.compile's backends."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Hashable
from typing import Any

from torch import fx

from specpass.backend.compile import Backend
from specpass.backend.settings import call_settings
from specpass.methods.speckv import as_id_rows


def entry_point(
    gm: fx.GraphModule, example_inputs: list[Any], *, options: dict[str, Any] | None = None, **_: Any
) -> Callable[..., Any]:
    """torch.compile(model, backend="specpass", options={"draft": draft, "method": method}).

    One Backend serves all graphs of the same draft, method and options, and lives as long as one of them.
    """
    options = dict(options or {})
    key = _key(options)
    backend = _BACKENDS.get(key)
    if backend is None:
        backend = _BACKENDS[key] = Backend(**options)
    return _keeping(backend, backend(gm, example_inputs))


entry_point.backend_ctx_ctor = call_settings  # type: ignore[attr-defined]


def _key(options: dict[str, Any]) -> Hashable:
    """Equal keys, one Backend. A draft is known by its identity: its Backend keeps it, so no other takes its id."""
    return tuple(
        (name, id(options[name]) if name == "draft" else _hashable(name, options[name])) for name in sorted(options)
    )


def _hashable(name: str, value: Any) -> Hashable:
    if name == "lookahead_ids" and value is not None:
        return as_id_rows(value)  # given as a tensor or as lists
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _keeping(backend: Backend, run: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any) -> Any:
        return run(*args)

    call.backend = backend  # type: ignore[attr-defined]
    return call


_BACKENDS: weakref.WeakValueDictionary[Hashable, Backend] = weakref.WeakValueDictionary()
