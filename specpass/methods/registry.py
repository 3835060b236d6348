"""Methods by name: specpass's own, which are found by looking, and users' own, which packages announce.

A built-in method is a class in a module of this package; a preset is one of them with the fields that measured best. A
method of one's own is an entry point of the group `specpass.methods`, whose name is the method's and whose value is
"module:Class"; it is loaded when it is asked for.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib
import pkgutil
import warnings
from collections.abc import Iterable, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any

import specpass.methods
from specpass.errors import BudgetError, MethodOptionError
from specpass.methods.base import AUTO, Method

GROUP = "specpass.methods"  # of entry points
FULL = "full"  # on the command line: no method, the uncompiled model with its whole KV cache
# With the fields that measured best: see Method.best.
PRESETS = {"best": "speckv", "bestpc": "specpc", "bestkvpc": "speckvpc"}


def built_in() -> dict[str, type[Method]]:
    """Class name -> class of specpass's own methods."""
    found: dict[str, type[Method]] = {}
    for info in pkgutil.iter_modules(specpass.methods.__path__):
        module = importlib.import_module(f"{specpass.methods.__name__}.{info.name}")
        if module.__name__ == Method.__module__:
            continue  # what methods are made from
        for name, value in vars(module).items():
            if isinstance(value, type) and issubclass(value, Method) and value.__module__ == module.__name__:
                found[name] = value
    return found


def own_names() -> tuple[str, ...]:
    """The names of users' methods; not those that a built-in method, or full KV, has taken."""
    taken = {FULL, *PRESETS, *map(_plain, built_in())}
    return tuple(name for name in _announced() if name not in taken)


def names() -> tuple[str, ...]:
    """The names of all methods, in lower case, specpass's own first."""
    return (*map(_plain, built_in()), *own_names())


def method_class(name: str) -> type[Method]:
    """The class that a name stands for; case, hyphens and underscores do not count (speckv-pc is SpecKVPC).

    A preset's is that of its method: see `preset`.

    Warns of an entry point of this name that cannot serve.

    Raises: MethodOptionError, naming the known ones.
    """
    plain = PRESETS.get(_plain(name), _plain(name))
    own = next((cls for known, cls in built_in().items() if _plain(known) == plain), None)
    if own is not None:
        for point in _announced().get(plain, ()):
            _leave_out(point, f"specpass has a method {own.__name__} of its own; give it another name")
        return own
    found = own_class(plain)
    if found is None:
        known = [known for known in names() if known != plain]
        raise MethodOptionError(f"--method {name!r} is not a method. Known: {', '.join([*known, FULL])}.")
    return found


def own_class(name: str) -> type[Method] | None:
    """The user's method of that name; None where there is none, or, with a warning, where it cannot be loaded."""
    found: type[Method] | None = None
    for point in _announced().get(_plain(name), ()):
        if found is None:
            found = _load(point)
        else:
            _leave_out(point, f"{found.__module__}.{found.__name__} has its name; give one of them another")
    return found


def preset(name: str) -> dict[str, Any]:
    """The fields that a name brings along; none where it is a class's."""
    return dict(method_class(name).recommended) if _plain(name) in PRESETS else {}


def fields_of(cls: type[Method], options: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the options that the method has."""
    fields = {field.name for field in dataclasses.fields(cls)}
    return {name: value for name, value in options.items() if name in fields}


def make_method(name: str, budget: str | int | float, options: Iterable[str] = (), **given: Any) -> Method:
    """A method from its name, its budget and its options as texts.

    Args:
        budget: slots ("256"), a ratio of the prompt ("0.25"), or "auto".
        options: NAME=VALUE texts for any field of the class.
        given: fields by name; None means that the user did not say, and the class's default holds. A lookahead may be
            a text ("32", "ngram", "self").

    Raises:
        MethodOptionError: unknown method, or an option that it does not have. BudgetError: see the method.
    """
    cls = method_class(name)
    said = {key: value for key, value in given.items() if value is not None}
    values = preset(name) | said | dict(map(_pair, options))
    values.setdefault("budget", parse_budget(budget))
    if isinstance(values.get("lookahead"), str):
        values["lookahead"] = parse_lookahead(values["lookahead"])
    fields = sorted(field.name for field in dataclasses.fields(cls))
    for key in values:
        if key not in fields:
            raise MethodOptionError(
                f"{cls.__name__} has no option {key!r}: leave it out. Its options: {', '.join(fields)}."
            )
    return cls(**values)


def parse_budget(text: str | int | float) -> int | float | str:
    """256 or "256" -> 256 slots; "0.25" -> a ratio of the prompt length; "auto" as it is."""
    if not isinstance(text, str) or text == AUTO:
        return text
    try:
        return float(text) if "." in text else int(text)
    except ValueError:
        raise BudgetError(f"budget={text!r}: expected a count of KV slots (256), a ratio (0.25) or {AUTO}.") from None


def parse_lookahead(text: str) -> int | str:
    """A number of tokens; words ("ngram", "self") are the method's to judge."""
    try:
        return int(text)
    except ValueError:
        return text


def _pair(option: str) -> tuple[str, Any]:
    name, equals, text = option.partition("=")
    if not equals or not name:
        raise MethodOptionError(f"--option {option!r}: expected NAME=VALUE, e.g. --option kernel=13.")
    try:
        return name.strip(), ast.literal_eval(text.strip())
    except (ValueError, SyntaxError):
        return name.strip(), text.strip()  # words need no quotes: pool=avg


def _announced() -> dict[str, list[EntryPoint]]:
    """Name -> the entry points of that name, none of them loaded."""
    found: dict[str, list[EntryPoint]] = {}
    for point in entry_points(group=GROUP):
        found.setdefault(_plain(point.name), []).append(point)
    return found


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def _load(point: EntryPoint) -> type[Method] | None:
    """The class behind an entry point; None, with a warning, where there is none."""
    try:
        found = point.load()
    except Exception as error:  # another package's code: whatever it raises
        _leave_out(point, f"it cannot be loaded ({type(error).__name__}: {error})")
        return None
    if not (isinstance(found, type) and issubclass(found, Method)):
        _leave_out(point, f"{found!r} is no class that derives from specpass.Method")
        return None
    return found


def _leave_out(point: EntryPoint, reason: str) -> None:
    warnings.warn(f"specpass: {_title(point)} is left out: {reason}.", stacklevel=3)


def _title(point: EntryPoint) -> str:
    package = f" of {point.dist.name}" if point.dist is not None else ""
    return f"the method {point.name} = {point.value}{package}"
