"""evict="lookahead": what stays is what a draft's tokens to come attend to, against plain attention without a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounded_answers import rotated_apart, seen_by_step
from support import call, compile_eager, padded, second_way
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass import errors
from specpass.backend.by_text import DraftByText
from specpass.cache import budget
from specpass.cache.drafting import DRAFTS

C, M, W, NEW = 24, 16, 4, 60
METHOD = specpass.SpecKV(budget=C, window=8, lookahead=4, verify=False)
HOW: dict[str, Any] = {"generated": M, "evict": "lookahead"}
PROMPTS = [prompt(40), prompt(31, seed=1)]
Slots = list[list[Tensor]]  # of each row and layer, [K, T] bool


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(layers=1), METHOD, tiny(seed=1, layers=1), **HOW)


def slots_of(cache: Any) -> Slots:
    return [seen_by_step(cache, own.shape[1], own.shape[1] + cache.appended, row) for row, own in enumerate(PROMPTS)]


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, Slots, Slots]]]:
    """Of each eviction the tokens of the answer so far, and what lay in slots before it and does after it."""
    found: list[Any] = []
    before = budget.BudgetCache.evict

    def evict(cache: Any, tokens: int) -> None:
        held = slots_of(cache)
        before(cache, tokens)
        found.append((cache.appended, held, slots_of(cache)))

    monkeypatch.setattr(budget.BudgetCache, "evict", evict)
    return found


def begun(model: Any, **how: Any) -> tuple[Any, Tensor]:
    """A cache that has read the padded batch of prompts, and its first tokens [2, 1]."""
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=NEW, **HOW, **how)
    ids, mask = padded(PROMPTS)
    return cache, call(model, ids, cache, attention_mask=mask)[:, -1:].argmax(-1)


def step(model: Any, cache: Any, tokens: Tensor, lengths: tuple[int, ...] = (40, 31)) -> Tensor:
    """Logits [2, V] behind tokens [2, q]."""
    behind = torch.arange(cache.appended, cache.appended + tokens.shape[1])
    return call(model, tokens.clone(), cache, position_ids=torch.tensor(lengths)[:, None] + behind)[:, -1]


class Drafts:
    """A draft's greedy tokens by plain attention: of an answer it reads what it has not read, and sees the newest."""

    def __init__(self, draft: Any, length: int) -> None:
        self.draft, self.length, self.read, self.gone = draft, length, 0, 0
        self.masks: list[list[Tensor]] = []

    def write(self, ids: Tensor, count: int) -> Tensor:
        """Ids [1, S + n] and `count` tokens behind them."""
        written = ids.shape[1] - self.length
        self.masks += [self._mask(self.length + index + 1) for index in range(self.read, written)]
        masks = list(self.masks)
        for _ in range(count):
            logits = rotated_apart(self.draft, ids, masks, self.length)[-1]
            ids = torch.cat([ids, logits.argmax().view(1, 1)], 1)
            masks.append(self._mask(ids.shape[1]))
        self.read = written
        self.gone = written - M if written - self.gone > 2 * M else self.gone
        return ids

    def _mask(self, columns: int) -> list[Tensor]:
        mask = torch.ones(2, columns, dtype=torch.bool)
        mask[:, self.length : self.length + self.gone] = False
        return [mask]


@pytest.mark.parametrize("shared", [False, True])
def test_what_stays_is_what_the_drafts_tokens_attend_to(model: Any, events: Any, shared: bool) -> None:
    """Steps are attention over exactly what stays; what goes has least of the attention of W tokens to come."""
    cache, tokens = begun(model, share_budget=shared)
    logits, masks, places, answer = [], [], set(), tokens
    for _ in range(NEW):
        logits.append(step(model, cache, answer[:, -1:]))
        answer = torch.cat([answer, logits[-1].argmax(-1, keepdim=True)], 1)
        masks.append(slots_of(cache))
        places.add((cache.layers[0].slots, cache.layers[0].key_buffer.data_ptr()))
        assert (cache.layers[0].lengths <= C + M).all()
    assert len(places) == 1
    assert cache.layers[0].slots == C + M + W
    assert [written for written, _, _ in events] == list(range(M, NEW, 2 * W))
    target, draft = tiny(layers=1), tiny(seed=1, layers=1)
    for row, own in enumerate(PROMPTS):
        ids, length, seen = torch.cat([own, answer[row : row + 1, :-1]], 1), own.shape[1], [each[row] for each in masks]
        due, drafts = rotated_apart(target, ids, seen, length), Drafts(draft, length)
        torch.testing.assert_close(torch.stack(logits)[:, row], due, atol=1e-4, rtol=1e-4)
        for written, before, after in events:
            ahead, states = drafts.write(ids[:, : length + written + 1], W - 1), []
            rows = [
                [torch.nn.functional.pad(held, (0, each), value=True) for held in before[row]] for each in (1, 2, 3, 4)
            ]
            rotated_apart(target, ahead, [*seen[:written], *rows], length, states)
            for (query, key), slots, left in zip(states, before[row], after[row], strict=True):
                check_eviction(query[0, :, -W:] / 4, key[0], slots, left, 0 if shared else length, ahead.shape[1] - W)


def check_eviction(query: Tensor, key: Tensor, slots: Tensor, left: Tensor, first: int, end: int) -> None:
    """Of slots [K, T] those that are `left` get most of the attention of query [H, W, D], of what lies from `first` on.

    Args: key [K, T + W, D]. end: T.
    """
    for head in range(len(slots)):
        held = slots[head].nonzero()[:, 0]
        among = held[held >= first][:-W]
        worth = (query[2 * head : 2 * head + 2] @ key[head, among].T).softmax(-1).mean(1).amax(0)
        stays = left[head, among]
        assert int((~stays).sum()) == 2 * W
        assert worth[stays].min() >= worth[~stays].max() - 1e-5
        assert left[head, end - W : end].all()
        assert torch.equal(left[head, :first], slots[head, :first])


def test_rows_change_places_copies_hold_and_turns_come(model: Any) -> None:
    """Two rows that are exchanged, and four tokens at once that are taken back: the answers of each go on."""
    (cache, tokens), (other, _) = begun(model), begun(model)
    answer = [tokens] * 20 + [torch.tensor([[index % 90 + 1], [index % 80 + 7]]) for index in range(40)]
    for own in answer[:28]:
        step(model, cache, own)
        step(model, other, own)
    other.reorder_cache(torch.tensor([1, 0]))
    step(model, cache, torch.full((2, 4), 5))
    cache.crop(4)
    assert not cache.layers[0].queries[:, :, :4].any()
    for own in answer[28:]:
        due = step(model, cache, own)
        torch.testing.assert_close(step(model, other, own.flip(0), (31, 40)).flip(0), due, atol=1e-4, rtol=1e-4)
    assert torch.equal(other.layers[0].generated.flip(0), cache.layers[0].generated)
    assert DRAFTS[cache].gone == DRAFTS[other].gone > 0
    held, twin = DRAFTS[cache].caches, DRAFTS[copy.deepcopy(cache)].caches
    assert all(torch.equal(*pair) and pair[0] is not pair[1] for pair in zip(held, twin, strict=True))
    step(model, cache, torch.full((2, 9), 5))  # more than W: the call's own are asked
    assert "no draft goes on" not in str(specpass.report(model))
    assert [graph.kind for graph in specpass.report(model).graphs] == ["prefill", "decode", "append"]


def test_where_no_draft_goes_on_the_newest_are_asked(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its context ends: steps go on, and the report says so, and of the slots for the lookahead."""
    monkeypatch.setattr(model._specpass.backend.draft.config, "max_position_embeddings", 70)
    cache, tokens = begun(model)
    for _ in range(40):
        step(model, cache, tokens)
    assert (cache.layers[0].lengths <= C + M).all()
    said = str(specpass.report(model))
    assert "evict='lookahead' ends where the draft's context of 70 tokens does" in said
    assert "where no draft goes on, the newest queries say what stays" in said
    assert "4 more are for the draft's lookahead" in said


def test_what_has_no_draft_that_goes_on() -> None:
    target, draft = tiny(layers=1), tiny(seed=1, layers=1)
    for method in (specpass.SnapKV(budget=C, window=8), specpass.SpecKV(budget=C, window=8, lookahead="ngram")):
        for make in (
            lambda method=method: specpass.compile(target, method=method, **HOW),
            lambda method=method: specpass.BudgetCache(target.config, method, **HOW),
        ):
            with pytest.raises(
                errors.GeneratedError, match=r"evict='lookahead' .* has no draft here: pass draft= with"
            ):
                make()
    futures = specpass.SpecKV(budget=C, window=8, lookahead=4, futures=2)
    with pytest.raises(errors.GeneratedError, match="futures=2: leave futures out, or use evict='attention'"):
        specpass.compile(target, draft=draft, method=futures, **HOW)
    own = second_way(tiny(layers=1), METHOD, draft, **HOW)
    with pytest.raises(errors.GeneratedError, match=r"the model's own forward runs, .*a test says so"):
        own.generate(prompt(40), max_new_tokens=2)
    with pytest.raises(errors.GeneratedError, match="a tokenizer of its own"):
        DraftByText(own._specpass.backend, target, (None, None))
    cache = specpass.BudgetCache(target.config, METHOD, **HOW)
    with pytest.raises(errors.GeneratedError, match="the plain door"):
        specpass.Backend(draft, METHOD, lowering="eager").check_cache(cache)
