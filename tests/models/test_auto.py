"""budget="auto" on tiny random models in float32: the size and the positions that the plain formulas choose."""

from __future__ import annotations

from statistics import mean
from typing import Any

import pytest
import torch
from support import call, check_answer, check_rules, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass
from specpass.cache.choose import choose
from specpass.observe.storage import cache_bytes
from specpass.testing import eager

W, L, LAYERS, K, D, ROOM = 8, 5, 2, 2, 16, 64
LONG, SHORT = prompt(300, seed=3), prompt(200, seed=4)
HOW = {"SnapKV": eager.Scoring(window=W, reduce="mean", pool="avg"), "SpecKV": eager.Scoring(window=W)}


class Subject:
    """Models of one method for any share: an uncompiled twin, a draft, compiled targets by share."""

    def __init__(self, name: str) -> None:
        self.name, self.how = name, HOW[name]
        self.twin, self.draft = tiny(layers=LAYERS), tiny(seed=1000, layers=1)
        self.models: dict[float, Any] = {}

    def method(self, share: float) -> Any:
        if self.name == "SnapKV":
            return specpass.SnapKV(budget="auto", window=W, share=share)
        return specpass.SpecKV(budget="auto", window=W, lookahead=L, share=share)

    def model(self, share: float) -> Any:
        if share not in self.models:
            method = self.method(share)
            draft = self.draft if method.drafts else None
            self.models[share] = compile_eager(tiny(layers=LAYERS), method, draft)
        return self.models[share]

    def expected(self, ids: torch.Tensor, share: float) -> tuple[eager.Selection, list[list[float]]]:
        ahead = eager.draft_lookahead(self.draft, ids, L)[0] if self.name == "SpecKV" else None
        return eager.select_share(self.twin, ids, (128, 256, 512), share, ahead, self.how)

    def middle(self) -> float:
        """A share that 256 slots keep of the long prompt, and 128 do not."""
        _, shares = self.expected(LONG, 1.0)
        assert mean(shares[0]) < mean(shares[1]) - 1e-3
        return (mean(shares[0]) + mean(shares[1])) / 2


@pytest.fixture(scope="module", params=["SnapKV", "SpecKV"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


def test_the_formulas_budget_and_positions(subject: Subject) -> None:
    share = subject.middle()
    selection, shares = subject.expected(LONG, share)
    model = subject.model(share)
    ours = run(model, LONG)
    cache = ours.cache
    assert cache.kept.budget == 256
    assert cache.kept.layers == pytest.approx(shares[1], abs=1e-5)
    assert [float(layer.shares[0]) for layer in cache.layers] == pytest.approx(shares[1], abs=1e-5)
    check_rules(kept(cache), 300, 256, W)
    check_selection(kept(cache), selection, W)
    check_answer(ours, subject.twin, LONG, kept(cache))
    report = specpass.report(model)
    assert f"last choice: 256 slots keep {mean(shares[1]):.3f} of" in str(report)
    assert report.data()["kept"]["budget"] == 256


def test_a_padded_batch_gets_what_its_neediest_row_needs(subject: Subject) -> None:
    share = subject.middle()
    ids, mask = padded([SHORT, LONG])
    ours = run(subject.model(share), ids, mask=mask)
    budget = ours.cache.kept.budget
    assert budget == max(subject.expected(row, share)[0].positions[0].shape[1] for row in (SHORT, LONG))
    for row, own in enumerate((SHORT, LONG)):
        check_rules(kept(ours.cache, row), own.shape[1], budget, W)
        check_answer(ours, subject.twin, own, kept(ours.cache, row), row)


def test_a_larger_share_never_chooses_less() -> None:
    torch.manual_seed(0)
    layers = [torch.rand(2, 5).sort(-1).values for _ in range(3)]  # [B, R] of three layers
    rungs = (128, 256, 512, 1024, 2048)
    asked = [share / 20 for share in range(1, 21)]
    found = [choose(layers, rungs, share) for share in asked]
    budgets = [chosen.budget for _, chosen in found]
    assert budgets == sorted(budgets)
    assert budgets[-1] == rungs[-1]
    for share, (index, chosen) in zip(asked, found, strict=True):
        assert chosen.share == pytest.approx(mean(chosen.layers))
        assert chosen.share >= share or chosen.budget == rungs[-1]
        assert index == 0 or float(torch.stack(layers).mean(0)[:, index - 1].min()) < share


def test_all_of_the_attention_keeps_the_whole_prompt() -> None:
    subject = Subject("SnapKV")
    cache = specpass.BudgetCache(subject.twin.config, subject.method(1.0), prompt_length=300)
    call(subject.model(1.0), LONG, cache)
    assert cache.kept is not None
    assert cache.kept.budget == 512
    assert all(torch.equal(layer, torch.arange(300).expand(K, -1)) for layer in kept(cache))


def test_the_plain_door_turns_and_memory() -> None:
    subject = Subject("SpecKV")
    share = subject.middle()
    method, model = subject.method(share), tiny(layers=LAYERS)
    model.compile(backend=specpass.Backend(subject.draft, method, lowering="eager"), dynamic=True)
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=6)
    first = call(model, LONG, cache)
    torch.testing.assert_close(first, call(subject.twin, LONG, None), atol=1e-4, rtol=1e-4)
    assert cache.kept.budget == 256
    slots, integers = LAYERS * K * (256 + ROOM), LAYERS * K * (256 + 1)
    expected = 2 * 4 * slots * D + 8 * integers
    assert expected <= cache_bytes(cache) <= 1.05 * expected
    call(model, torch.tensor([[5]]), cache)
    call(model, prompt(7, seed=9), cache)
    assert int(cache.seen) == 308
    assert all((layer.lengths == 256 + 8).all() for layer in cache.layers)
    cache.reset()
    call(model, prompt(100, seed=2), cache)  # fits the smallest size
    assert cache.kept is None
    assert all(torch.equal(layer, torch.arange(100).expand(K, -1)) for layer in kept(cache))
    torch._dynamo.reset()
