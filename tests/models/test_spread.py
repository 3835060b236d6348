"""Budgets that KV heads share, on tiny random models in float32, against plain formulas and masked attention."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import Run, call, compile_eager, padded, run
from tiny import prompt, tiny

import specpass
from specpass.errors import SpreadError
from specpass.methods import base
from specpass.observe.storage import cache_bytes
from specpass.testing import eager
from specpass.testing.spread import margin, reading_only

C, W, L, K, D, LAYERS, ROOM = 24, 8, 5, 2, 16, 2, 64
METHODS = {
    "snapkv-heads": specpass.SnapKV(budget=C, window=W, spread="heads"),
    "speckv-global": specpass.SpecKV(budget=C, window=W, lookahead=L, spread="global"),
}
BEAMS = [METHODS["snapkv-heads"], specpass.SnapKV(budget=C, window=W, spread="global")]
SPECKV, SNAPKV = eager.Scoring(window=W), eager.Scoring(window=W, reduce="mean", pool="avg")


def heads_of(cache: Any, row: int = 0) -> list[list[torch.Tensor]]:
    """[layers][K] positions that a row keeps, ascending, without unused slots."""
    return [[head[head >= 0] for head in layer.positions[row]] for layer in cache.layers]


class Subject:
    """A compiled target, an uncompiled twin with the same weights, and the draft."""

    def __init__(self, name: str) -> None:
        self.method = METHODS[name]
        self.twin, self.draft = tiny(layers=LAYERS), tiny(seed=1000, layers=1)
        self.model = compile_eager(tiny(layers=LAYERS), self.method, self.draft if self.method.drafts else None)
        self.together = LAYERS if self.method.spread == "global" else 1  # layers that share

    def cache(self, **kwargs: Any) -> specpass.BudgetCache:
        return specpass.BudgetCache(self.model.config, self.method, **{"max_new_tokens": 6, **kwargs})

    def check(self, cache: Any, ids: torch.Tensor, row: int = 0) -> None:
        """A row's choice, by the formulas' scores."""
        length, kept = ids.shape[1], heads_of(cache, row)
        ahead = eager.draft_lookahead(self.draft, ids, L)[0] if self.method.drafts else None
        scores = eager.select(self.twin, ids, C, ahead, SPECKV if self.method.drafts else SNAPKV).scores
        assert all(torch.equal(head[-W:], torch.arange(length - W, length)) for layer in kept for head in layer)
        for first in range(0, LAYERS, self.together):
            share = slice(first, first + self.together)
            assert margin(torch.cat(scores[share]), [head for layer in kept[share] for head in layer], C, W) >= -1e-6

    def answer(self, ours: Run, ids: torch.Tensor, row: int = 0, **options: Any) -> Run:
        """What the twin says where its heads read what ours keep, and no more."""
        followed = 0
        if self.method.verify:
            ahead, told = ours.cache.lookahead_ids[row].tolist(), ours.tokens[row]
            followed = next((n for n, pair in enumerate(zip(ahead, told, strict=False)) if pair[0] != pair[1]), L)
        with reading_only(heads_of(ours.cache, row), ids.shape[1], followed):
            return run(self.twin, ids, len(ours.tokens[row]), **options)

    def same(self, ours: Run, ids: torch.Tensor, row: int = 0) -> None:
        theirs = self.answer(ours, ids, row)
        assert ours.tokens[row] == theirs.tokens[0]
        torch.testing.assert_close(ours.logits[row], theirs.logits[0], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module", params=METHODS)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


@pytest.mark.parametrize("length", [C + 1, 60])
def test_what_heads_keep_is_what_the_formulas_say(subject: Subject, length: int) -> None:
    ids = prompt(length, seed=length)
    ours = run(subject.model, ids)
    subject.check(ours.cache, ids)
    subject.same(ours, ids)
    if length == 60:
        assert len({len(head) for layer in heads_of(ours.cache) for head in layer}) > 1, "an uneven one is looked at"


def test_storage_is_that_of_equal_budgets(subject: Subject) -> None:
    cache, heads = run(subject.model, prompt(60, seed=1)).cache, K * subject.together
    for layer in cache.layers:
        assert layer.key_buffer.shape == layer.value_buffer.shape == (1, heads * (C + ROOM), D)
        assert layer.kept_positions.shape == (1, heads * C)
        assert layer.offsets.diff().tolist()[0] == (layer.prompt_slots + ROOM)[0].tolist()
        assert layer.slots == C + ROOM
    assert sum(int(layer.prompt_slots.sum()) for layer in cache.layers) == LAYERS * K * C
    integers = sum(t.nbytes for layer in cache.layers for t in (layer.lengths, layer.starts, layer.counts))
    told = 0 if cache.lookahead_ids is None else cache.lookahead_ids.nbytes
    states = LAYERS * K * (2 * 4 * (C + ROOM) * D + 8 * C)  # keys, values and positions
    assert cache_bytes(cache) == states + integers + told + 2 * 8  # the handle, and the tokens seen


@pytest.mark.parametrize("early_exit", [True, False])
def test_a_budget_that_holds_the_prompt_is_exact(subject: Subject, early_exit: bool) -> None:
    ids = prompt(C - 5, seed=3)
    ours = run(subject.model, ids, past_key_values=subject.cache(early_exit=early_exit))
    full = run(subject.twin, ids)
    assert ours.tokens == full.tokens
    torch.testing.assert_close(ours.logits, full.logits, atol=1e-4, rtol=1e-4)
    assert all(torch.equal(head, torch.arange(C - 5)) for layer in heads_of(ours.cache) for head in layer)


def test_a_padded_batch_equals_its_rows_alone(subject: Subject) -> None:
    """Rows longer than the budget, shorter than it, and shorter than the window."""
    rows = [prompt(length, seed=length) for length in (60, 33, C, 12, W - 3)]
    ids, mask = padded(rows)
    together = run(subject.model, ids, mask=mask, past_key_values=subject.cache())
    for row, own in enumerate(rows):
        if own.shape[1] > C:
            subject.check(together.cache, own, row)
        else:
            assert all(torch.equal(h, torch.arange(own.shape[1])) for ls in heads_of(together.cache, row) for h in ls)
        subject.same(together, own, row)


def test_a_long_answer_moves_its_heads(subject: Subject) -> None:
    """The room grows twice, behind each head, and what is stored stays."""
    ids = prompt(60, seed=4)
    ours = run(subject.model, ids, 150, past_key_values=subject.cache())
    subject.same(ours, ids)
    layer = ours.cache.layers[0]
    assert layer.slots == C + ours.cache.free_at_prefill > C + 149


def test_turns_and_crops(subject: Subject) -> None:
    """Several tokens at once read what each of them may; taken out again, they were never there."""
    ids, turn = prompt(60, seed=5), prompt(7, seed=6)
    cache = subject.cache()
    with torch.no_grad():
        call(subject.model, ids, cache)
        found = call(subject.model, turn, cache, logits_to_keep=7)
        cache.crop(7)
        again = call(subject.model, turn[:, :3], cache, logits_to_keep=3)
        with reading_only(heads_of(cache), 60):
            due = behind(subject.twin, ids, turn)
    torch.testing.assert_close(found, due, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again, due[:, :3], atol=1e-4, rtol=1e-4)


def behind(model: Any, ids: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """An uncompiled model's logits of `turn`, read behind `ids`."""
    return model(input_ids=turn, past_key_values=model(input_ids=ids, use_cache=True).past_key_values).logits


@pytest.mark.parametrize("method", BEAMS, ids=["heads", "global"])
def test_beams(method: specpass.SnapKV) -> None:
    """Rows go from place to place, and their storage with them, once."""
    model, twin, ids = compile_eager(tiny(), method), tiny(), prompt(60, seed=7)
    how = {"max_new_tokens": 80, "num_beams": 3, "do_sample": False, "return_dict_in_generate": True}
    ours = model.generate(ids, **how)
    with reading_only(heads_of(ours.past_key_values), 60):
        theirs = twin.generate(ids, **how)
    assert ours.sequences.tolist() == theirs.sequences.tolist()


def test_one_decode_graph_whatever_the_split() -> None:
    """Compiled; prompts of many lengths, among them one that fits the budget."""
    model, twin = specpass.compile(tiny(), method=BEAMS[1]), tiny()
    for length in (60, 61, 200, 20):
        ids = prompt(length, seed=length)
        ours = run(model, ids, 4)
        with reading_only(heads_of(ours.cache), length):
            assert ours.tokens == run(twin, ids, 4).tokens
    report = specpass.report(model)
    assert [graph.kind for graph in report.graphs] == ["prefill", "decode", "short"]
    assert "24 slots in the mean: the KV heads of all layers share them" in str(report)


def test_heads_with_a_floor_of_their_even_share_are_equal_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows beside full layers, sinks, padding: another storage, and the same answers."""
    monkeypatch.setattr(base, "FLOOR", 1.0)
    ids, mask = padded([prompt(60, seed=1), prompt(33, seed=2), prompt(9, seed=3)])
    even, shared = (
        run(compile_eager(tiny("gpt-oss"), specpass.SnapKV(budget=C, window=W, spread=spread)), ids, mask=mask)
        for spread in ("uniform", "global")
    )
    assert even.tokens == shared.tokens
    torch.testing.assert_close(shared.logits, even.logits, atol=1e-4, rtol=1e-4)
    for ours, theirs in zip(shared.cache.layers, even.cache.layers, strict=True):
        assert torch.equal(ours.positions, theirs.positions)
        assert (ours.starts is not None) == (not ours.is_sliding)


def test_speckv_pc_shares_what_is_left_of_the_prompt() -> None:
    how = specpass.SpecKVPC(
        budget=C,
        window=W,
        lookahead=L,
        spread="global",
        prompt_budget=40,
        prompt_window=W,
        prompt_kernel=3,
        neighbours=3,
    )
    model, rows = compile_eager(tiny(), how, tiny(seed=1000, layers=1)), [prompt(60, seed=1), prompt(45, seed=2)]
    ids, mask = padded(rows)
    together = run(model, ids, mask=mask)
    for row, own in enumerate(rows):
        alone = run(model, own)
        assert together.tokens[row] == alone.tokens[0]
        read = set(alone.cache.prompt_positions[0].tolist())
        for ours, theirs in zip(heads_of(together.cache, row), heads_of(alone.cache), strict=True):
            assert all(torch.equal(one, other) for one, other in zip(ours, theirs, strict=True))
            assert all(set(head.tolist()) <= read for head in ours)
    assert sum(len(head) for layer in heads_of(alone.cache) for head in layer) == LAYERS * K * C


def test_where_heads_cannot_share_it_is_an_error(tmp_path: Path) -> None:
    """Never equal budgets without a word."""
    how = specpass.SnapKV(budget=C, window=W, spread="heads")
    with pytest.raises(SpreadError, match=r"SnapKV\(spread='heads'\).*ALiBi.*use spread='uniform'"):
        run(compile_eager(tiny("bloom"), how), prompt(60))
    with pytest.raises(SpreadError, match=r"cannot be exported.*h\.0.*ALiBi.*use spread='uniform'"):
        specpass.export_onnx(tiny("bloom"), None, how, tmp_path / "out")
