"""The name `specpass` among torch.compile's backends."""

from __future__ import annotations

from typing import Any

from torch import fx

from specpass.backend.compile import Backend


def entry_point(gm: fx.GraphModule, example_inputs: list[Any], *, options: dict | None = None, **_: Any) -> Any:
    """torch.compile(model, backend="specpass", options={"draft": draft, "method": method}).

    One Backend serves all graphs of the same draft, method and options.
    """
    options = dict(options or {})
    key = (id(options.get("draft")), *sorted((k, repr(v)) for k, v in options.items() if k != "draft"))
    if key not in _BACKENDS:
        _BACKENDS[key] = Backend(**options)
    return _BACKENDS[key](gm, example_inputs)


_BACKENDS: dict[Any, Backend] = {}
