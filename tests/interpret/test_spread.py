"""Budgets that KV heads share where the model's own forward runs: hybrids, in float32 against a twin that is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hybrids import hybrid
from support import compile_eager, padded, run
from tiny import prompt

import specpass
from specpass.interpret.prompt import ReadPrompt
from specpass.testing.spread import reading_only

W, C, L, S = 8, 24, 6, 60
METHODS = {
    "heads": specpass.SnapKV(budget=C, window=W, spread="heads"),
    "global": specpass.SpecKV(
        budget=C, window=W, lookahead_ids=prompt(L, seed=7), spread="global", reconstruction=True
    ),
}
FAMILIES = ["lfm2", "qwen3_next", "jamba", "falcon_h1"]


def heads_of(cache: Any, row: int = 0, whole: int | None = None) -> dict[int, list[torch.Tensor]]:
    """By layer [K] positions that a row keeps, ascending, without unused slots. Args: whole: a layer that keeps all."""
    kept = {layer.index: layer.positions for layer in cache.budgeted if layer.index != whole}
    found = {index: [head[head >= 0] for head in positions[row]] for index, positions in kept.items()}
    return found if whole is None else found | {whole: [torch.arange(S)] * 2}


def check(ours: Any, family: str, ids: torch.Tensor, row: int = 0) -> None:
    """The answer is that of a twin whose heads read what ours keep."""
    twin, kept = hybrid(family), heads_of(ours.cache, row)
    layers = twin.config.num_hidden_layers
    with reading_only([kept.get(index, []) for index in range(layers)], ids.shape[1]):
        theirs = run(twin, ids, len(ours.tokens[row]))
    assert ours.tokens[row] == theirs.tokens[0]
    torch.testing.assert_close(ours.logits[row], theirs.logits[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", FAMILIES)
def test_heads_keep_as_many_slots_together(family: str, name: str) -> None:
    model, ids = compile_eager(hybrid(family), METHODS[name]), prompt(S, seed=1)
    ours = run(model, ids)
    report = specpass.report(model)
    assert report.interpreted
    assert not report.refusals
    counts = torch.tensor([[len(head) for head in heads] for heads in heads_of(ours.cache).values()])
    assert int(counts.sum()) == counts.numel() * C
    assert len(set(counts.flatten().tolist())) > 1, "an uneven one is looked at"
    if name == "heads":
        assert (counts.sum(1) == counts.shape[1] * C).all()
    check(ours, family, ids)


def test_a_layer_that_stays_whole_shares_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The others share among themselves; the next prompt asks all of them again."""
    kinds = ["conv", *["full_attention"] * 3]
    model, ids = compile_eager(hybrid("lfm2", layer_types=kinds), METHODS["global"]), prompt(S)
    cache, masked = specpass.BudgetCache(model.config, METHODS["global"], 6), ReadPrompt._masked
    with monkeypatch.context() as patch:
        patch.setattr(
            ReadPrompt, "_masked", lambda self, layer, call: "odd" * (layer == 2) or masked(self, layer, call)
        )
        ours = run(model, ids, past_key_values=cache)
    assert [layer.exact for layer in cache.budgeted] == [False, True, False]
    assert [len(layer.together) for layer in cache.budgeted] == [2, 1, 2]
    kept = heads_of(cache, whole=2)
    assert sum(len(head) for layer in (1, 3) for head in kept[layer]) == 2 * 2 * C
    with reading_only([kept.get(layer, []) for layer in range(4)], S):
        theirs = run(hybrid("lfm2", layer_types=kinds), ids)
    assert ours.tokens == theirs.tokens
    cache.reset()
    run(model, ids, past_key_values=cache)
    assert [len(layer.together) for layer in cache.budgeted] == [3, 3, 3]


def test_a_padded_batch() -> None:
    model = compile_eager(hybrid("lfm2"), METHODS["heads"])
    prompts = [prompt(length, seed=length) for length in (S, 47)]
    ids, mask = padded(prompts)
    ours = run(model, ids, mask=mask)
    for row, own in enumerate(prompts):
        check(ours, "lfm2", own, row)


def test_rows_of_scores_are_those_of_equal_budgets() -> None:
    """The same prompt, and as many slots for each: a head that may keep more keeps what it did."""
    model, equal = (
        compile_eager(hybrid("lfm2"), specpass.SnapKV(budget=C, window=W, spread=spread))
        for spread in ("heads", "uniform")
    )
    ids = prompt(S, seed=3)
    ours, theirs = (heads_of(run(each, ids).cache) for each in (model, equal))
    for layer, heads in ours.items():
        for own, other in zip(heads, theirs[layer], strict=True):
            small, large = sorted((set(own.tolist()), set(other.tolist())), key=len)
            assert small <= large
