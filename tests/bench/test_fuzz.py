"""The fuzzer: fixed cases are right, and wrong answers, choices, evictions and documents would be seen."""

from __future__ import annotations

import collections
import dataclasses
import math
from pathlib import Path

import pytest
import torch
from rich.progress import Progress

import specpass
from bench.fuzz import beforehand, cases, check, evictions, formulas, oracle, run
from bench.fuzz.prompts import WrongError
from bench.fuzz.run import try_cases
from bench.fuzz.subject import Subject, plain
from specpass.benchmarks.coverage import tiny
from specpass.cache.evict import Bound
from specpass.cache.worth import worth
from specpass.rewrite.sites import Rotation

# Few models, since each is compiled: a plain one and a hybrid, methods that select slots, and slots of tokens.
PLAIN = ("llama", "speckv", 24)
SUBJECTS = {PLAIN, ("llama", "speckv-pc", 24), ("lfm2", "speckv", 24)}
FIXED = [
    case
    for case in cases.grouped(1, 800, families=("llama", "lfm2"), methods=("speckv", "speckv-pc"))
    if case.subject in SUBJECTS
]
FIXED = sorted(FIXED, key=lambda case: case.index)[:60]
# By the same compiled model: documents that were read beforehand, and caches in fewer bits, against attention over the
# same codes by formulas of the oracle's own.
FIXED += [
    cases.Case(100, *PLAIN, (47,), new=5, prefix=("file", 39)),
    cases.Case(101, *PLAIN, (9,), new=2, prefix=("device", 3)),  # fits the budget
    cases.Case(110, *PLAIN, (9, 25), new=3, prefix=("device", 1)),  # a row is shorter than the other's question
    cases.Case(102, *PLAIN, (71, 25, 30), new=5, prefix=("cpu", 20)),
    cases.Case(103, *PLAIN, (60,), new=5, turns=((1, 2), (0, 1)), prefix=("device", 58)),  # odd: turns bring it along
    cases.Case(104, *PLAIN, (60,), new=4, mode="beam sample", returned=2, prefix=("file", 40), early_exit=False),
    cases.Case(106, *PLAIN, (71,), new=3, turns=((0, 2),), dropped=True, reset=True, prefix=("cpu", 58)),
    cases.Case(108, *PLAIN, (47, 9), new=3, bits=4),
    cases.Case(107, *PLAIN, (71,), new=3, turns=((1, 2),), bits=8, prefix=("device", 58)),
    cases.Case(109, *PLAIN, (47, 31), new=3, bits=2),
]

FULL = "full_attention"


@pytest.mark.parametrize("subject", sorted({case.subject for case in FIXED}), ids=lambda key: "-".join(map(str, key)))
def test_fixed_cases_are_right(subject: tuple[str, str, float], monkeypatch: pytest.MonkeyPatch) -> None:
    if subject != PLAIN:  # what layers have of their own is tried there: one says what is read of a prompt
        monkeypatch.setitem(tiny.SIZES, "num_hidden_layers", 1)
    outcome = try_cases(subject, [case for case in FIXED if case.subject == subject])
    assert outcome.failures == []
    assert outcome.refusals == []
    assert outcome.counts.get("tie", 0) <= 2


def test_what_queries_to_come_want_is_the_same_by_two_formulas() -> None:
    """`evict="triattention"`: the oracle's, which turns a mean query to each offset, and the cache's."""
    torch.manual_seed(0)
    keys, queries, omega = torch.randn(20, 16), torch.randn(2, 8, 16) + 1, torch.tensor([1.0, 0.1, 0.01])
    ours = evictions.scores("triattention", keys, queries, 4, omega)
    goes = (torch.arange(20) < 16)[None, None]
    rotation = Rotation((0, 1, 2), (3, 4, 5), tuple(omega.tolist()))
    theirs = worth("triattention", keys[None, None], goes, goes, queries[None], 0.0, 0, rotation)[0, 0, :16]
    torch.testing.assert_close(ours, theirs.double(), atol=1e-4, rtol=1e-4)
    assert evictions.noted("triattention", 64) == Bound(64, "triattention").noted


def test_lookups_are_right() -> None:
    key = ("qwen2", "speckv-ngram", 24)
    rows = (71, 25, 9)
    chosen = [
        cases.Case(0, *key, rows[:1], new=8, prefix=("cpu", 40)),
        cases.Case(1, *key, rows, new=8, turns=((7, 2),)),
    ]
    outcome = try_cases(key, chosen)
    assert (outcome.failures, outcome.refusals) == ([], [])


@pytest.fixture(scope="module")
def subject() -> Subject:
    return Subject("qwen2", "snapkv", 24)


BOUNDED = {"generated": 12, "evict": "attention", "shared": True}  # the module's model has steps of such alone


def case(**fields: object) -> cases.Case:
    """Of two rows, as all of them are: each has the graphs of the others."""
    return cases.Case(0, "qwen2", "snapkv", 24, **{"lengths": (40, 31), "new": 4, **fields})


def test_bounded_answers_are_right_and_wrong_evictions_are_seen(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which slots rows see behind evictions, and which went: by attention, in one budget with the prompt's."""
    bounded = case(new=20, turns=((1, 3),), **BOUNDED)
    assert check.check(bounded, subject) == ""
    monkeypatch.setattr(evictions, "scores", lambda policy, keys, *_: torch.arange(len(keys) - 3.0))
    with pytest.raises(WrongError, match="an evicted slot scores"):
        check.check(bounded, subject)


def test_a_wrong_choice_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check.check(case(new=1), subject) == ""

    def upside_down(weights: torch.Tensor, values: torch.Tensor, length: int, _: object) -> list[torch.Tensor]:
        return [-weights[: len(values), :, : length - 8].sum(1), torch.zeros(len(values), length - 8)]

    monkeypatch.setattr(formulas, "head_scores", upside_down)
    with pytest.raises(WrongError, match="a dropped position scores"):
        check.check(case(new=1), subject)


def test_shared_budgets_are_right_and_other_scores_or_shares_are_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    subject = Subject("qwen2", "speckv-best", 24)
    shared = dataclasses.replace(case(new=2), method="speckv-best")
    assert check.check(shared, subject) == ""
    for changed in ({"reconstruction": False}, {"spread": "uniform"}):
        monkeypatch.setattr(subject, "resolved", lambda _, how=changed: dataclasses.replace(subject.method, **how))
        with pytest.raises(WrongError, match=r"a dropped position|heads keep"):
            check.check(shared, subject)


def test_a_turn_goes_on_with_the_lookahead() -> None:
    """Its first token is the answer's last, which the draft, the target's twin, has written; so may others be."""
    key = ("qwen2", "speckv-mean", 24)
    follows = [cases.Case(index, *key, (31,), new=3, turns=turns) for index, turns in enumerate([((0, 1),), ((1, 2),)])]
    assert try_cases(key, follows).counts == {"right": 2}


def test_a_wrong_answer_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle reads one position fewer than was kept."""

    def blind(starts: torch.Tensor, prompt: int, kept: dict[int, torch.Tensor] | None = None, rows: int = 0) -> object:
        fewer = {layer: torch.where(own == 39, -1, own) for layer, own in (kept or {}).items()}  # the prompt's last
        return view(starts, prompt, fewer, rows)

    view = oracle.View
    monkeypatch.setattr(oracle, "View", blind)
    with pytest.raises(WrongError, match="logits differ"):
        check.check(case(**BOUNDED), subject)


def test_a_wrong_document_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its keys and values are those of other tokens, are not what was saved, or are changed by a question."""
    asked, read, load = case(prefix=("file", 20), **BOUNDED), specpass.read, specpass.Prefix.load
    assert check.check(asked, subject) == ""

    def others(model: object, ids: torch.Tensor, **how: object) -> specpass.Prefix:
        return dataclasses.replace(read(model, ids.roll(1), **how), ids=ids)

    monkeypatch.setattr(specpass, "read", others)
    with pytest.raises(WrongError, match=r"logits differ|a dropped position scores"):
        check.check(asked, subject)
    monkeypatch.undo()
    monkeypatch.setattr(specpass.Prefix, "load", lambda path: spoilt(load(path)))
    with pytest.raises(WrongError, match="saved and loaded"):
        check.check(asked, subject)
    monkeypatch.undo()
    with (
        pytest.raises(WrongError, match="changed the prefix"),
        beforehand.read_beforehand(asked, subject, torch.Generator().manual_seed(0)) as prefix,
    ):
        spoilt(prefix)


def spoilt(prefix: specpass.Prefix | None) -> specpass.Prefix:
    assert prefix is not None
    prefix.layers[0][1][..., 0, 0] += 1
    return prefix


def test_particles_are_right_and_another_parent_is_seen(subject: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    particles = case(resampled=(2, 1))
    assert check.check(particles, subject) == ""
    monkeypatch.setattr(specpass.BudgetCache, "reorder_cache", lambda cache, parents: None)
    with pytest.raises(WrongError, match="sequence"):
        check.check(particles, subject)


def test_the_oracle_is_the_model_where_everything_is_kept(subject: Subject) -> None:
    ids = torch.randint(1, 128, (1, 30))
    view = oracle.View(torch.zeros(1, dtype=torch.int64), 30)
    twin = plain("qwen2")
    with oracle.seen_by(view), torch.no_grad():
        ours = twin(input_ids=ids).logits
    twin.config._attn_implementation = "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(ours, twin(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", cases.FAMILIES)
def test_a_family_has_the_layers_that_it_is_drawn_for(family: str) -> None:
    model = plain(family)
    found = oracle.windows(model)
    layers = set(range(model.config.num_hidden_layers))
    assert (layers > set(found)) if family in cases.RECURRENT else (layers == set(found))
    kinds = getattr(model.config, "layer_types", ["sliding_attention" if family == "mistral" else FULL] * len(layers))
    assert [layer for layer, window in found.items() if window is None] == [
        layer for layer, kind in enumerate(kinds) if kind == FULL
    ]


def test_a_rerun_tries_what_was_wrong_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counts, tried = {"wrong": 1}, []

    def outcome(key: tuple[str, str, float], *_: object) -> run.Outcome:
        tried.append(key)
        return run.Outcome(key, [], counts, [])

    monkeypatch.setattr(run, "try_cases", outcome)
    for counts in ({"wrong": 1}, {"right": 1}, {"right": 1}):
        store = run.run(tmp_path / "fuzz.json", 0, 1, 1.0)
        assert store.parts["summary"]["wrong"] == counts.get("wrong", 0)
    assert len(tried) == 2


def test_several_processes_try_every_group_once() -> None:
    keys = [("llama", method, 24) for method in ("snapkv", "streamingllm", "speckv")]
    with Progress(disable=True) as progress:
        progress.add_task("cases")
        found = list(run.outcomes([(key, []) for key in keys], math.inf, 2, progress))
        assert list(run.outcomes([(keys[0], [])], 0.0, 2, progress)) == []
    assert sorted(outcome.subject for outcome in found) == sorted(keys)


def test_cases_are_the_same_for_a_seed_and_cover_every_option() -> None:
    for case in cases.grouped(3, 40, policies=("triattention",)):
        assert (case.generated is None) == (case.family in cases.UNTURNED or case.method == "speckv-ngram")
    drawn = cases.grouped(3, 400)
    assert drawn == cases.grouped(3, 400)
    assert not any(case.stop and case.mode == "assisted" for case in drawn)  # which no plain model answers
    behind = cases.grouped(3, 200, prefix=True)
    assert {case.prefix[0] for case in behind if case.prefix} == set(cases.PLACES)
    for case in behind:
        chooses = case.method in cases.CHOOSERS or case.family in (*cases.RECURRENT, *cases.UNWATCHED)
        assert (case.prefix is None) == chooses
        assert case.prefix is None or (case.prefix[1] < min(case.lengths) and max(case.lengths) <= max(cases.LENGTHS))
        assert case.prefix is None or case.mode not in ("assisted", "lookup")
    assert all(case.resampled and not case.turns for case in cases.grouped(3, 40, resample=True))
    assert {case.method for case in cases.grouped(3, 60, methods=tuple(cases.SPREAD))} == set(cases.SPREAD)
    assert {cases.draw(3, index, bits=(8, 4)).bits for index in range(20)} == {8, 4}  # drawn where they are asked for
    asked_for = ("bits", "prefix", "resampled", "generated", "evict", "shared")
    for field in (field for field in dataclasses.fields(cases.Case) if field.name not in asked_for):
        assert len(collections.Counter(getattr(case, field.name) for case in drawn)) > 1, field.name


def test_a_failing_case_is_shrunk_to_what_makes_it_fail() -> None:
    long = case(lengths=(71, 40, 60), mode="beam", returned=2, new=8, stop=True, early_exit=False)
    small = cases.shrunk(long, lambda case: 60 in case.lengths and not case.early_exit)
    assert small == dataclasses.replace(case(lengths=(60,), new=2), early_exit=False)
    behind = case(lengths=(71, 60), prefix=("file", 39), turns=((1, 2),), resampled=(2, 2))
    small = cases.shrunk(behind, lambda case: case.prefix is not None)
    assert small == case(lengths=(9,), new=2, prefix=("device", 3))


def test_a_router_that_rounding_decides_is_noted() -> None:
    router = torch.nn.Linear(4, 3)
    router.top_k = 2
    with torch.no_grad():
        router.weight.copy_(torch.tensor([[1.0, 0, 0, 0], [0, 1.0, 0, 0], [0, 0, 1.0, 0]]))
        router.bias.zero_()
    for last, near in ((0.5, False), (1.00001, True)):
        with oracle.seen_by(oracle.View(torch.zeros(1, dtype=torch.int64), 1)) as view:
            oracle.watch_experts(router, (torch.tensor([[[2.0, 1.0, last, 0.0]]]),), None)
        assert view.near is near
