"""Facts: found by type, one of each."""

from __future__ import annotations

import dataclasses

import pytest

from specpass.rewrite import Facts


@dataclasses.dataclass(frozen=True)
class Size:
    number: int


@dataclasses.dataclass(frozen=True)
class Rounded(Size):
    """A size of another kind."""


@dataclasses.dataclass(frozen=True)
class Name:
    text: str


def test_a_fact_is_found_by_its_type() -> None:
    facts = Facts(Size(3), Name("a"))
    assert facts[Size] == Size(3)
    assert facts.get(Name) == Name("a")
    assert Size in facts


def test_what_nobody_has_stated() -> None:
    facts = Facts(Name("a"))
    assert facts.get(Size) is None
    assert Size not in facts
    with pytest.raises(KeyError, match="Size"):
        facts[Size]


def test_a_later_fact_replaces_an_earlier_one() -> None:
    facts = Facts(Size(3))
    facts.add(Size(4))
    assert facts[Size] == Size(4)


def test_a_fact_of_a_subclass_serves() -> None:
    """A looped draft is a draft to those who insert it."""
    facts = Facts(Rounded(8))
    assert facts[Size] == Rounded(8)
    assert Size in facts
    assert Rounded not in Facts(Size(8))
