"""What passes tell each other besides the graph: facts, each a small frozen dataclass, found by its type."""

from __future__ import annotations

from typing import Any, TypeVar

F = TypeVar("F")


class Facts:
    """Facts by type; there is one of each at most."""

    def __init__(self, *facts: Any) -> None:
        self._known: dict[type, Any] = {}
        for fact in facts:
            self.add(fact)

    def add(self, fact: Any) -> None:
        """State a fact; an earlier one of its type is no longer so."""
        self._known[type(fact)] = fact

    def get(self, kind: type[F]) -> F | None:
        """The fact of this type (or of a subclass), or None."""
        return next((fact for fact in self._known.values() if isinstance(fact, kind)), None)

    def __getitem__(self, kind: type[F]) -> F:
        """Raises: KeyError: nobody has stated it."""
        found = self.get(kind)
        if found is None:
            raise KeyError(kind.__name__)
        return found

    def __contains__(self, kind: type) -> bool:
        return self.get(kind) is not None
