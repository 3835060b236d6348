"""Methods by name, made from text options: what the command line and the demo know about methods.

The table is read off the package: a Method that `specpass.__init__` exports is here.
"""

from __future__ import annotations

import ast
import dataclasses
from collections.abc import Iterable
from typing import Any

import specpass
from specpass.errors import BudgetError, MethodOptionError
from specpass.methods.base import Method

FULL = "full"  # on the command line: no method, the uncompiled model with its whole KV cache


def names() -> dict[str, str]:
    """Lower-case name -> class name, in the order in which the package lists them."""
    return {
        name.lower(): name
        for name, home in specpass._HOME.items()
        if home.startswith("specpass.methods.") and name != Method.__name__
    }


def method_class(name: str) -> type[Method]:
    """The class that a name stands for; case and hyphens do not count (speckv-pc is SpecKVPC).

    Raises: MethodOptionError, naming the known ones.
    """
    known = names()
    found = known.get(name.lower().replace("-", "").replace("_", ""))
    if found is None:
        raise MethodOptionError(f"--method {name!r} is not a method. Known: {', '.join([*known, FULL])}.")
    return getattr(specpass, found)


def make_method(name: str, budget: str | int | float, options: Iterable[str] = (), **given: Any) -> Method:
    """A method from its name, its budget and its options as texts.

    Args:
        budget: slots ("256") or a ratio of the prompt ("0.25").
        options: NAME=VALUE texts for any field of the class.
        given: fields by name; None means that the user did not say, and the class's default holds.

    Raises:
        MethodOptionError: unknown method, or an option that it does not have. BudgetError: see the method.
    """
    cls = method_class(name)
    fields = {field.name for field in dataclasses.fields(cls)}
    values = {key: value for key, value in given.items() if value is not None} | dict(map(_pair, options))
    values.setdefault("budget", parse_budget(budget))
    for key in values:
        if key not in fields:
            raise MethodOptionError(
                f"{cls.__name__} has no option {key!r}: leave it out. Its options: {', '.join(sorted(fields))}."
            )
    return cls(**values)


def parse_budget(text: str | int | float) -> int | float:
    """256 or "256" -> 256 slots; "0.25" -> a ratio of the prompt length."""
    if not isinstance(text, str):
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise BudgetError(f"budget={text!r}: expected a count of KV slots (256) or a ratio (0.25).") from None


def _pair(option: str) -> tuple[str, Any]:
    name, equals, text = option.partition("=")
    if not equals or not name:
        raise MethodOptionError(f"--option {option!r}: expected NAME=VALUE, e.g. --option kernel=13.")
    try:
        return name.strip(), ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return name.strip(), text.strip()  # words need no quotes: pool=avg
