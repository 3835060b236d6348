"""reconstruction=True on tiny random models in float32: what is kept is what the definition says, by every way."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import check_answer, check_rules, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass
from specpass.errors import BudgetError
from specpass.testing import eager
from specpass.testing.futures import diverse_beams, select_futures

C, W, L = 24, 8, 5
METHODS = {
    "speckv": specpass.SpecKV(budget=C, window=W, lookahead=L, reconstruction=True),
    "futures": specpass.SpecKV(budget=C, window=W, lookahead=L, futures=3, reconstruction=True),
    "snapkv": specpass.SnapKV(budget=C, window=W, reconstruction=True),
}
HOW = {name: eager.Scoring(W, 7, method.reduce, method.pool, outputs=True) for name, method in METHODS.items()}
TARGET, DRAFT = tiny(layers=2), tiny(seed=1000, layers=1)


@pytest.fixture(scope="module", params=METHODS)
def subject(request: pytest.FixtureRequest) -> tuple[str, Any]:
    method = METHODS[request.param]
    return request.param, compile_eager(tiny(layers=2), method, DRAFT if method.drafts else None)


def chosen(name: str, ids: torch.Tensor, how: eager.Scoring) -> eager.Selection:
    if name == "futures":
        return select_futures(TARGET, ids, C, diverse_beams(DRAFT, ids, L, 3), how)
    ahead = eager.draft_lookahead(DRAFT, ids, L)[0] if METHODS[name].drafts else None
    return eager.select(TARGET, ids, C, ahead, how)


def check(name: str, found: Any, ids: torch.Tensor, row: int = 0) -> None:
    positions = kept(found.cache, row)
    check_rules(positions, ids.shape[1], C, W)
    check_selection(positions, chosen(name, ids, HOW[name]), W)
    check_answer(found, TARGET, ids, positions, row)


def test_what_is_kept_is_what_outputs_lose_least_without(subject: tuple[str, Any]) -> None:
    name, model = subject
    ids = prompt(60, seed=60)
    found = run(model, ids)
    check(name, found, ids)
    plain = chosen(name, ids, dataclasses.replace(HOW[name], outputs=False)).positions
    assert any(not torch.equal(*pair) for pair in zip(kept(found.cache), plain, strict=True)), "it matters"


def test_rows_of_a_padded_batch_are_those_alone(subject: tuple[str, Any]) -> None:
    name, model = subject
    prompts = [prompt(length, seed=length) for length in (60, 43)]
    ids, mask = padded(prompts)
    found = run(model, ids, mask=mask)
    for row, own in enumerate(prompts):
        check(name, found, own, row)


def test_behind_a_document(subject: tuple[str, Any]) -> None:
    """The question's rows alone run there, by the model's own forward."""
    name, model = subject
    ids = prompt(60, seed=9)
    check(name, run(model, ids[:, 40:], prefix=specpass.read(model, ids[:, :40])), ids)


def test_values_count_once() -> None:
    with pytest.raises(BudgetError, match="value_norms=True and reconstruction=True: the second has the values"):
        specpass.SpecKV(budget=C, window=W, value_norms=True, reconstruction=True)


def test_a_score_of_ones_own_has_the_values() -> None:
    class Own(specpass.SnapKV):
        def score(self, *_: Any) -> Any: ...

    with pytest.raises(BudgetError, match="reconstruction=True: Own scores by a function of its own"):
        Own(budget=C, window=W, reconstruction=True)
