"""evict="lookahead": what stays is what a draft's tokens to come attend to, against plain attention without a cache."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bounded_answers import rotated_apart, seen_by_step
from support import call, compile_eager, padded, run, second_way
from tiny import prompt, tiny
from torch import Tensor

import specpass
from specpass import errors
from specpass.cache import budget
from specpass.cache.drafting import DRAFTS

C, M, W, NEW, S = 24, 16, 4, 60, 40
METHOD = specpass.SpecKV(budget=C, window=8, lookahead=4, verify=False)
HOW: dict[str, Any] = {"generated": M, "evict": "lookahead"}


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(), METHOD, tiny(seed=1, layers=1), **HOW)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[int, list[Tensor], list[Tensor]]]]:
    """Of each eviction the tokens of the answer so far, and what lay in slots before and lies there after it."""
    found: list[Any] = []
    before = budget.evict

    def evict(layer: Any, *how: Any) -> None:
        total = S + layer.cache.appended
        if layer.index == 0:
            found.append((layer.cache.appended, seen_by_step(layer.cache, S, total), []))
        before(layer, *how)
        found[-1][2].append(seen_by_step(layer.cache, S, total)[layer.index])

    monkeypatch.setattr(budget, "evict", evict)
    return found


class Drafts:
    """The draft's greedy tokens by plain attention: of the answer it reads what it has not read, and sees the newest."""

    def __init__(self, draft: Any) -> None:
        self.draft, self.read, self.gone, self.masks = draft, 0, 0, []

    def write(self, ids: Tensor, count: int) -> Tensor:
        """[count] tokens behind ids [1, S + n]."""
        answer = ids.shape[1] - S
        self.masks += [self._mask(S + index + 1) for index in range(self.read, answer)]
        masks = list(self.masks)
        for _ in range(count):
            token = rotated_apart(self.draft, ids, masks, S)[-1].argmax().view(1, 1)
            ids = torch.cat([ids, token], 1)
            masks.append(self._mask(ids.shape[1]))
        self.read = answer
        self.gone = self.read - M if self.read - self.gone > 2 * M else self.gone
        return ids[0, -count:]

    def _mask(self, columns: int) -> list[Tensor]:
        mask = torch.ones(2, columns, dtype=torch.bool)
        mask[:, S : S + self.gone] = False
        return [mask]


def scored(target: Any, ids: Tensor, masks: list[list[Tensor]], layer: int) -> Tensor:
    """[K, G, W, T]: logits of the last W of ids [1, T] with all keys, by plain attention that sees `masks`."""
    states: list[tuple[Tensor, Tensor]] = []
    rotated_apart(target, ids, masks, S, states)
    query, key = states[layer]
    return query[0, :, -W:].unflatten(0, (2, 2)) @ key[0, :, None].transpose(-1, -2) * 16**-0.5


@pytest.mark.parametrize("shared", [False, True])
def test_what_stays_is_what_the_drafts_tokens_attend_to(model: Any, events: Any, shared: bool) -> None:
    """Steps are attention over exactly what stays; what goes has least of the attention of W tokens to come."""
    target, drafts = tiny(), Drafts(tiny(seed=1, layers=1))
    cache = specpass.BudgetCache(model.config, METHOD, max_new_tokens=NEW, **HOW, share_budget=shared)
    ids = prompt(S)
    logits, masks, sizes = [call(model, ids, cache)[0, -1]], [], set()
    for index in range(NEW):
        ids = torch.cat([ids, logits[-1].argmax().view(1, 1)], 1)
        logits.append(call(model, ids[:, -1:], cache)[0, -1])
        masks.append(seen_by_step(cache, S, S + index + 1))
        sizes.add((cache.layers[0].slots, cache.layers[0].key_buffer.data_ptr()))
        assert (cache.layers[0].lengths <= C + M).all()
    assert sizes == {(C + M + W, cache.layers[0].key_buffer.data_ptr())}
    assert cache.get_seq_length() == S + NEW
    torch.testing.assert_close(torch.stack(logits[1:]), rotated_apart(target, ids, masks, S), atol=1e-4, rtol=1e-4)
    assert [written for written, _, _ in events] == list(range(M, NEW, 2 * W))
    for written, before, after in events:
        known = ids[:, : S + written + 1]
        ahead = torch.cat([known, drafts.write(known, W - 1)[None]], 1)
        rows = [[torch.cat([own, torch.ones(2, each, dtype=torch.bool)], 1) for own in before] for each in range(1, 5)]
        for layer, (slots, left) in enumerate(zip(before, after, strict=True)):
            asked = scored(target, ahead, [*masks[:written], *rows], layer)
            for head in range(2):
                among = slots[head].nonzero()[:, 0]
                among = among[:-W] if shared else among[among >= S][:-W]
                worth = asked[head, :, :, among].softmax(-1).mean(1).amax(0)
                stays = left[head, among]
                assert int((~stays).sum()) == 2 * W
                assert worth[stays].min() >= worth[~stays].max() - 1e-5
                assert left[head, S + written - W :].all()
                assert torch.equal(left[head, :S], slots[head, :S]) or shared


def test_padded_rows_beams_and_copies(model: Any) -> None:
    """Rows of a batch answer as they do alone, also where they change places; a copy goes on as the cache does."""
    ids, mask = padded([prompt(50), prompt(12, seed=1)])
    together = run(model, ids, 60, mask)
    assert "no draft goes on" not in str(specpass.report(model))
    for row, own in enumerate((prompt(50), prompt(12, seed=1))):
        assert together.tokens[row] == run(model, own, 60).tokens[0]
    samples = model.generate(prompt(50), max_new_tokens=40, do_sample=False, num_return_sequences=1, num_beams=3)
    assert samples.shape == (1, 90)
    turn = torch.cat([ids, torch.tensor(together.tokens)], 1), torch.cat([mask, torch.ones(2, 60).long()], 1)
    twin = copy.deepcopy(together.cache)
    first, second = (run(model, turn[0], 20, turn[1], past_key_values=own) for own in (together.cache, twin))
    assert first.tokens == second.tokens
    for layer, other in zip(together.cache.layers, twin.layers, strict=True):
        assert torch.equal(layer.generated, other.generated)
    assert "no draft goes on" not in str(specpass.report(model))
