"""A plain decoder through the second way equals itself through graphs: same positions, same tokens, same logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import Run, compile_eager, padded, run
from tiny import prompt, tiny

import specpass
from specpass.backend import direct
from specpass.benchmarks.coverage.tiny import tiny_model

W = 8
PROMPTS = [prompt(60), prompt(44, seed=1), prompt(18, seed=2)]
METHODS = {
    "snapkv": specpass.SnapKV(budget=24, window=W),
    "streamingllm": specpass.StreamingLLM(budget=24),
    "pyramidkv": specpass.PyramidKV(budget=24, window=W),
    "speckv": specpass.SpecKV(budget=24, window=W, lookahead=5),
    "ngram": specpass.SpecKV(budget=24, window=W, lookahead="ngram"),
    "specpc": specpass.SpecPC(budget=30, window=W, lookahead=3, kernel=5, neighbours=3),
    "specpc-original": specpass.SpecPC(budget=30, window=W, kernel=5, neighbours=3, positions="original"),
    "speckvpc": specpass.SpecKVPC(
        budget=20, window=W, lookahead=4, prompt_budget=40, prompt_window=W, prompt_kernel=5, neighbours=3
    ),
}


def uncompiled(target: Any, method: Any, draft: Any = None) -> Any:
    """Compiled with specpass, for the second way."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "why_uncompiled", lambda target: "a test says so")
        return compile_eager(target, method, draft)


@pytest.fixture(scope="module", params=METHODS)
def pair(request: pytest.FixtureRequest) -> tuple[Any, Any]:
    """The same model through graphs and the second way, with the same draft."""
    method = METHODS[request.param]
    draft = tiny(seed=1000) if method.needs_draft else None
    return compile_eager(tiny(), method, draft), uncompiled(tiny(), method, draft)


def check_same(graphs: Run, ours: Run) -> None:
    assert ours.tokens == graphs.tokens
    torch.testing.assert_close(ours.logits, graphs.logits, atol=1e-4, rtol=1e-4)
    for theirs, layer in zip(graphs.cache.layers, ours.cache.layers, strict=True):
        assert torch.equal(layer.positions, theirs.positions)
        assert torch.equal(layer.lengths, theirs.lengths)
    for name in ("lookahead_ids", "prompt_positions", "shift"):
        theirs, found = getattr(graphs.cache, name), getattr(ours.cache, name)
        assert (theirs is None) == (found is None), name
        assert theirs is None or torch.equal(found, theirs), name
    assert int(ours.cache.get_seq_length()) == int(graphs.cache.get_seq_length())


@pytest.mark.parametrize("length", [60, 71, 12, 1], ids="S={}".format)
def test_one_prompt(pair: tuple[Any, Any], length: int) -> None:
    check_same(*(run(model, prompt(length)) for model in pair))


def test_padded_batch(pair: tuple[Any, Any]) -> None:
    ids, mask = padded(PROMPTS)
    graphs, ours = (run(model, ids, mask=mask) for model in pair)
    check_same(graphs, ours)
    alone = [run(pair[1], own).tokens[0] for own in PROMPTS[:2]]
    assert ours.tokens[:2] == alone


def test_windows() -> None:
    settings = {
        "layer_types": ["sliding_attention", "full_attention"],
        "use_sliding_window": True,
        "sliding_window": 20,
    }
    method = specpass.SnapKV(budget=30, window=W)
    pair = [way(tiny("qwen2", **settings), method) for way in (compile_eager, uncompiled)]
    for length in (60, 14):
        check_same(*(run(model, prompt(length)) for model in pair))
    sites = specpass.report(pair[1]).prompts[0].sites
    assert [site.exact for site in sites] == ["sliding window 20", ""]


def test_latents() -> None:
    """MLA caches latents, of which attention reads what the model makes: columns apart, heads with one choice."""
    method = specpass.SpecKV(budget=24, window=W, lookahead_ids=prompt(5, seed=7))
    ids, mask = padded(PROMPTS[:2])
    cache = {"lookahead_ids": prompt(5, batch=2, seed=7), "max_new_tokens": 8}
    found = []
    for way in (compile_eager, uncompiled):
        model = way(tiny_model("deepseek_v3"), method)
        found.append(run(model, ids, mask=mask, past_key_values=specpass.BudgetCache(model.config, method, **cache)))
    check_same(*found)
    assert (found[1].cache.layers[0].lengths == 24 + 5).all()
