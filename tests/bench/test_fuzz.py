"""The fuzzer: 200 fixed cases are right, and wrong answers, choices and lookaheads would be seen."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from bench.fuzz import cases, check, formulas, oracle
from bench.fuzz.run import try_cases
from bench.fuzz.subject import Subject, plain

# Few models, since each is compiled: a plain one and a hybrid, a method that selects slots and one that selects tokens.
FIXED = [
    case
    for case in cases.grouped(1, 600, families=("llama", "lfm2"), methods=("speckv", "specpc"))
    if case.budget == 24 and case.subject != ("lfm2", "specpc", 24)
]
FIXED = sorted(FIXED, key=lambda case: case.index)[:200]


@pytest.mark.parametrize("subject", sorted({case.subject for case in FIXED}), ids=lambda key: "-".join(map(str, key)))
def test_fixed_cases_are_right(subject: tuple[str, str, float]) -> None:
    outcome = try_cases(subject, [case for case in FIXED if case.subject == subject])
    assert outcome.failures == []
    assert outcome.refusals == []
    assert outcome.counts.get("tie", 0) <= 2


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("qwen2", "snapkv", 24)


def case(**fields: object) -> cases.Case:
    return cases.Case(0, "qwen2", "snapkv", 24, **{"lengths": (40,), "new": 4, **fields})


def test_a_wrong_choice_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.check(case(), subject) == ""
    monkeypatch.setattr(formulas, "head_scores", lambda weights, *_: -weights[..., :32].sum(1)[:2])
    with pytest.raises(check.WrongError, match="a dropped position scores"):
        check.check(case(), subject)


def test_a_wrong_answer_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle reads one position fewer than was kept."""

    def blind(starts: torch.Tensor, prompt: int, kept: dict[int, torch.Tensor] | None = None, rows: int = 0) -> object:
        fewer = {layer: torch.where(own == 39, -1, own) for layer, own in (kept or {}).items()}  # the prompt's last
        return view(starts, prompt, fewer, rows)

    view = oracle.View
    monkeypatch.setattr(oracle, "View", blind)
    with pytest.raises(check.WrongError, match="logits differ"):
        check.check(case(), subject)


def test_the_oracle_is_the_model_where_everything_is_kept(subject: Subject) -> None:
    ids = torch.randint(1, 128, (1, 30))
    view = oracle.View(torch.zeros(1, dtype=torch.int64), 30)
    twin = plain("qwen2")
    with oracle.seen_by(view), torch.no_grad():
        ours = twin(input_ids=ids).logits
    twin.config._attn_implementation = "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(ours, twin(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


def test_cases_are_the_same_for_a_seed_and_cover_every_option() -> None:
    drawn = cases.grouped(3, 400)
    assert drawn == cases.grouped(3, 400)
    for field in dataclasses.fields(cases.Case):
        assert len(collections.Counter(getattr(case, field.name) for case in drawn)) > 1, field.name


def test_a_failing_case_is_shrunk_to_what_makes_it_fail() -> None:
    long = case(lengths=(71, 40, 60), mode="beam", returned=2, new=8, stop=True, early_exit=False)
    small = cases.shrunk(long, lambda case: 60 in case.lengths and not case.early_exit)
    assert small == dataclasses.replace(case(lengths=(60,), new=2), early_exit=False)
