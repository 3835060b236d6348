"""`specpass.report(model)`: what a backend has recorded, to be read in a terminal or by a program."""

from __future__ import annotations

import dataclasses
import itertools
import weakref
from typing import TYPE_CHECKING, Any

from specpass.errors import UnsupportedCallError
from specpass.reports.data import data
from specpass.reports.html import html
from specpass.reports.record import BackendRecord
from specpass.reports.tables import tables
from specpass.reports.text import NEW_TOKENS, text

if TYPE_CHECKING:
    from rich.console import Group

_NUMBER = itertools.count()


@dataclasses.dataclass(eq=False)
class Report(BackendRecord):
    """A backend's record: `str(report)` is readable, rich and notebooks print tables, `data()` is JSON."""

    number: int = dataclasses.field(default_factory=lambda: next(_NUMBER), repr=False)

    def __post_init__(self) -> None:
        _KNOWN.add(self)

    def data(self, new_tokens: int = NEW_TOKENS) -> dict[str, Any]:
        """Everything as JSON-serialisable data; costs for a generation of `new_tokens`."""
        return data(self, new_tokens)

    def __rich__(self) -> Group:
        return tables(self)

    def __str__(self) -> str:
        return text(self)

    def _repr_html_(self) -> str:
        """For notebooks."""
        return html(tables(self))


def base_of(model: Any) -> Any:
    """The decoder inside a PEFT wrapper, whose generate() calls it; any other model itself."""
    return model.get_base_model() if hasattr(model, "peft_config") and hasattr(model, "get_base_model") else model


def report(model: Any) -> Report:
    """The report of a model compiled with specpass, by whichever door.

    Raises: UnsupportedCallError when the model is not compiled with specpass, or was never called.
    """
    model = base_of(model)
    state = model.__dict__.get("_specpass")
    if state is not None:
        return state.backend.report
    config = model.config.get_text_config(decoder=True)
    found = [known for known in _KNOWN if known.has_seen(config)]
    if not found:
        raise UnsupportedCallError(
            "this model is not compiled with specpass, or was not called yet: use specpass.compile(model, ...) or call "
            "the compiled model once."
        )
    return max(found, key=lambda known: known.number)


# Reports whose backends are alive: through torch.compile's own doors a model does not know its backend.
_KNOWN: weakref.WeakSet[Report] = weakref.WeakSet()
