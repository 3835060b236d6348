"""specpass's methods in the benchmarks: `specpass_<name>` for each one that the registry knows, users' own included."""

from __future__ import annotations

import functools

from specpass.errors import BenchmarkError, MethodOptionError
from specpass.methods import registry
from specpass.methods.base import Method
from specpass.methods.specpc import SpecPC

PREFIX = "specpass_"
WINDOW, LOOKAHEAD = 32, 32
PROMPT_BUDGET = 1024  # SpecKV-PC: prompt tokens that the target reads
OPTIONS = {"window": WINDOW, "lookahead": LOOKAHEAD, "prompt_budget": PROMPT_BUDGET}  # where a method has them


def names() -> tuple[str, ...]:
    """The benchmarks' names of all methods of specpass."""
    return tuple(f"{PREFIX}{name}" for name in registry.names())


def presets() -> tuple[str, ...]:
    """The benchmarks' names of methods with the fields that measured best; they run where they are asked for."""
    return tuple(f"{PREFIX}{name}" for name in registry.PRESETS)


@functools.cache
def make(name: str, budget: int | float) -> Method:
    """The method of a benchmark's name.

    Raises: BenchmarkError: it is no method of specpass; names the known ones.
    """
    try:
        if not name.startswith(PREFIX):
            raise MethodOptionError(name)
        plain = name.removeprefix(PREFIX)
        cls, own = registry.method_class(plain), registry.preset(plain)
    except MethodOptionError as error:
        raise BenchmarkError(f"{name!r} is not a method of specpass. Known: {', '.join(names())}.") from error
    # To SpecPC, which chooses what is read and not what is kept, a window and a lookahead mean something else.
    options = {} if issubclass(cls, SpecPC) else registry.fields_of(cls, OPTIONS)
    return cls(**{"budget": budget, **own, **options})
