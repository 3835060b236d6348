"""Several futures on tiny random models in float32, against M forwards of the target, one for each branch."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from support import call, check_answer, check_rules, check_selection, compile_eager, kept, padded, run
from tiny import prompt, tiny

import specpass
from specpass.errors import FuturesError
from specpass.testing import eager
from specpass.testing.futures import diverse_beams, select_futures

C, W, L, M = 24, 8, 5, 3
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L, futures=M)
HOW = eager.Scoring(window=W)
TARGET, DRAFT = tiny(layers=2), tiny(seed=1000, layers=1)


@pytest.fixture(scope="module")
def model() -> Any:
    return compile_eager(tiny(layers=2), METHOD, DRAFT)


def check(found: Any, ids: torch.Tensor, row: int = 0, target: Any = TARGET) -> None:
    branches = diverse_beams(DRAFT, ids, L, M)
    assert found.cache.lookahead_ids[row].tolist() == branches[0][0].tolist()
    positions = kept(found.cache, row)
    check_rules(positions, ids.shape[1], C, W)
    check_selection(positions, select_futures(target, ids, C, branches, HOW), W)
    check_answer(found, target, ids, positions, row)


@pytest.mark.parametrize("length", [C + 1, 60])
def test_what_is_kept_is_what_the_branches_forwards_choose(model: Any, length: int) -> None:
    ids = prompt(length, seed=length)
    found = run(model, ids)
    check(found, ids)
    if length == 60:
        alone = eager.select(TARGET, ids, C, eager.draft_lookahead(DRAFT, ids, L)[0], HOW).positions
        assert any(not torch.equal(*pair) for pair in zip(kept(found.cache), alone, strict=True)), "a future matters"


def test_rows_of_a_padded_batch_are_those_alone(model: Any) -> None:
    prompts = [prompt(length, seed=length) for length in (60, 43, 26)]
    ids, mask = padded(prompts)
    found = run(model, ids, mask=mask)
    for row, own in enumerate(prompts):
        check(found, own, row)


def test_turns_and_crops_go_on_from_what_was_kept(model: Any) -> None:
    ids, more = prompt(60, seed=5), prompt(3, seed=6)
    caches = [specpass.BudgetCache(model.config, METHOD, max_new_tokens=12) for _ in range(2)]
    for cache in caches:
        call(model, ids, cache)
    whole = call(model, more, caches[0])
    call(model, more[:, :2], caches[1])
    caches[1].crop(2)
    torch.testing.assert_close(call(model, more, caches[1]), whole, atol=1e-5, rtol=1e-4)


def test_a_branch_that_ends_scores_up_to_its_end() -> None:
    draft, ids = tiny(seed=1000, layers=1), prompt(60, seed=60)
    draft.generation_config.eos_token_id = int(diverse_beams(DRAFT, ids, L, M)[1][0, 1])
    draft.generation_config.pad_token_id = 0
    branches = diverse_beams(draft, ids, L, M)
    assert min(branch.shape[1] for branch in branches) < L
    found = run(compile_eager(tiny(layers=2), METHOD, draft), ids)
    check_selection(kept(found.cache), select_futures(TARGET, ids, C, branches, HOW), W)


@pytest.mark.parametrize("family", ["gemma2", "gpt-oss"])
def test_soft_caps_sinks_and_sliding_windows(family: str) -> None:
    target, ids = tiny(family, layers=2), prompt(60, seed=7)
    found = run(compile_eager(target, METHOD, DRAFT), ids, new=1)
    full = [index for index, kind in enumerate(target.config.layer_types) if kind == "full_attention"]
    assert full
    assert len(full) < len(target.config.layer_types)
    branches = diverse_beams(DRAFT, ids, L, M)
    reference = select_futures(tiny(family, layers=2), ids, C, branches, HOW, "output")
    for index in full:
        margin = eager.score_margin(reference.scores[index], found.cache.layers[index].positions[0], W)
        assert margin >= -1e-6


@pytest.mark.parametrize(
    "options", [{"spread": "global"}, {"value_norms": True}, {"reduce": "mean"}, {"reconstruction": True}]
)
def test_other_options_go_beside_it(options: dict[str, Any]) -> None:
    method, ids = dataclasses.replace(METHOD, **options), prompt(60, seed=8)
    cache = run(compile_eager(tiny(layers=2), method, DRAFT), ids).cache
    held = sum(int((layer.positions >= 0).sum()) for layer in cache.layers)
    assert held == len(cache.layers) * 2 * C


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lookahead": "ngram"}, "lookahead='ngram' copies one: give lookahead as a count"),
        ({"lookahead": None, "lookahead_ids": ((1, 2),)}, "leave lookahead_ids out"),
        ({"temperature": 0.5}, r"temperature=0\.5 samples one"),
        ({"sparse_prefill": 16}, "sparse_prefill=16 reads one"),
    ],
)
def test_what_has_one_future_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(FuturesError, match=rf"futures={M}.*{message}"):
        dataclasses.replace(METHOD, **options)


def test_other_ways_to_one_future_are_refused(model: Any) -> None:
    with pytest.raises(FuturesError, match="SpecKVPC follows one"):
        specpass.SpecKVPC(budget=C, window=W, futures=M)
    with pytest.raises(FuturesError, match=r"speculate=2.*leave one of them out"):
        compile_eager(tiny(layers=1), METHOD, DRAFT, speculate=2)
    with pytest.raises(FuturesError, match="lookahead_ids were given"):
        model.generate(prompt(60, seed=1), max_new_tokens=2, lookahead_ids=torch.ones(1, L, dtype=torch.int64))
    with pytest.raises(FuturesError, match="an exported draft writes one"):
        specpass.export_onnx(tiny(layers=1), DRAFT, METHOD)
    with pytest.raises(FuturesError, match="no position_ids are given"):
        run(compile_eager(tiny("bloom", layers=1), METHOD, DRAFT), prompt(60, seed=1))
    with pytest.raises(FuturesError, match=r"SpecKV\(futures=3\).*own forward.*leave futures out"):
        run(compile_eager(tiny("lfm2"), METHOD, DRAFT), prompt(60, seed=1))
