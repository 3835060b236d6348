"""The tuner: cost model, winners, and what compiled models take from the store."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import specpass.ops  # noqa: F401  (says where tiles are kept)
from specpass.kernels import cost, measure, spec, store, tuner
from specpass.kernels.archs import ARCHS
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import find_tile
from specpass.kernels.store import Entry, Trial
from specpass.kernels.tiles import Tile
from specpass.kernels.tuner import Job

SHAPES = Shapes("bfloat16", 1, 8, 4, 128, 128, rows=64, window=32, budget=1024, room=256, columns=32768)
SMALL = Shapes("float32", 2, 2, 3, 16, 16, rows=6, window=4, budget=20, room=12, columns=64)
DECODE = Job(REGISTRY["decode"], SHAPES, ARCHS["sm_90"])


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path))
    spec._find_tile.cache_clear()
    return tmp_path


def trial(block_n: int, predicted_s: float = 1.0, **fields: Any) -> Trial:
    return Trial(Tile(block_n), 32, 0, 1024, predicted_s, **fields)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100", "gfx942"])
@pytest.mark.parametrize("name", REGISTRY)
def test_the_cost_model_never_rules_out_what_the_compiler_can_do(name: str, arch: str) -> None:
    pytest.importorskip("triton")
    kernel = REGISTRY[name]
    tile = kernel.default_tile(SHAPES, ARCHS[arch])
    assert cost.rule_out(kernel, SHAPES, tile, ARCHS[arch]) is None
    built = tuner.compile_trial(Job(kernel, SHAPES, ARCHS[arch]), tile)
    assert built.error is None
    assert cost.evaluate(kernel.cost.shared, SHAPES, tile) <= built.shared_bytes


def test_what_cannot_fit_is_ruled_out_with_the_reason() -> None:
    wide = dataclasses.replace(SHAPES, dim=256, value_dim=256)
    reasons = {
        ("decode", Tile(128, warps=8, stages=4), "sm_80"): "shared memory",
        ("importance", Tile(256, 128, warps=4), "sm_90"): "registers",
        ("decode", Tile(16, warps=16), "sm_90"): "loads",
    }
    for (name, tile, arch), reason in reasons.items():
        assert (cost.rule_out(REGISTRY[name], wide, tile, ARCHS[arch]) or "").startswith(reason)


def test_closed_forms_count_what_an_array_holds() -> None:
    case, tile = measure.make_case(DECODE.kernel, SHAPES, "cpu"), Tile(64)
    read = [case.operands[name] for name in ("query", "keys", "values")]
    tensors = sum(t.numel() * t.element_size() for t in (*read, measure.fallback(case)))
    moved = DECODE.kernel.cost.bytes
    assert cost.evaluate(moved, SHAPES, tile) == tensors
    partial = 3 * SHAPES.heads * SHAPES.group * (SHAPES.value_dim + 1) * 4  # written, and read by the second stage
    assert cost.evaluate(moved, SHAPES, Tile(64, splits=3)) == tensors + 2 * partial
    scored = dataclasses.replace(SHAPES, columns=1024)
    given = REGISTRY["importance_given_lse"]
    query, key, rows = (given.make(scored, "cpu", 0)[name] for name in ("query", "key", "rows"))
    expected = (
        sum(t.numel() * t.element_size() for t in (query, key))
        + 8 * SHAPES.heads * SHAPES.group * rows.shape[1]
        + 4 * key.numel() // key.shape[3]
    )
    assert cost.evaluate(given.cost.bytes, scored, tile) == expected


@pytest.mark.parametrize("name", REGISTRY)
def test_the_shortlist_holds_the_default_and_is_ranked(name: str) -> None:
    kernel, arch = REGISTRY[name], ARCHS["sm_90"]
    tiles = cost.shortlist(kernel, SHAPES, arch, 5)
    assert len(tiles) == 5
    assert kernel.default_tile(SHAPES, arch) in tiles
    best = min(
        cost.seconds(kernel, SHAPES, tile, arch)
        for tile in kernel.candidate_tiles(SHAPES, arch)
        if cost.rule_out(kernel, SHAPES, tile, arch) is None
    )
    assert cost.seconds(kernel, SHAPES, tiles[0], arch) == best


def test_measurements_decide_and_the_model_needs_a_clear_gain() -> None:
    default = Trial(DECODE.kernel.default_tile(SHAPES, ARCHS["sm_90"]), 64, 0, 0, 1.0)
    assert tuner.pick(DECODE, (default, trial(16, 0.9))) == default
    assert tuner.pick(DECODE, (default, trial(16, 0.5))) == trial(16, 0.5)
    assert tuner.pick(DECODE, (default, trial(16, 0.5, error="spills"))) == default
    slow, fast = trial(32, 0.1, time_us=9.0), trial(64, 3.0, time_us=7.0)
    assert tuner.pick(DECODE, (default, trial(16, 0.5), slow, fast)) == fast
    assert tuner.pick(DECODE, (trial(16, error="spills"),)) is None


@pytest.mark.parametrize("name", REGISTRY)
def test_checks_pass_right_results_and_catch_wrong_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert measure.check(measure.make_case(REGISTRY[name], SMALL, "cpu", seed=3)) <= 1.0

    right = measure.fallback

    def wrong(case: Any) -> Any:
        out = right(case)
        first = out[0] if isinstance(out, tuple) else out
        first[tuple(size // 3 for size in first.shape)] += 1e-2
        return out

    monkeypatch.setattr(measure, "fallback", wrong)
    assert measure.check(measure.make_case(REGISTRY[name], SMALL, "cpu", seed=3)) > 1.0


def test_sparse_prefill_counts_the_pairs_that_are_read() -> None:
    kernel, shapes = REGISTRY["sparse_prefill"], dataclasses.replace(SHAPES, columns=2048, budget=256)
    operands = kernel.make(shapes, "cpu", 0)
    columns, recent, whole = operands["columns"], operands["recent"], int(operands["lengths"][0]) - shapes.window
    row = torch.arange(shapes.columns)
    chosen = sum(int((columns <= last - recent).sum()) for last in range(whole))
    pairs = chosen + shapes.kv_heads * int(torch.where(row < whole, (row + 1).clamp(max=recent), row + 1).sum())
    counted = cost.evaluate(kernel.cost.flops, shapes, Tile(64, 128))
    assert counted == pytest.approx(2 * shapes.group * (shapes.dim + shapes.value_dim) * pairs, rel=0.02)


def test_compiled_models_take_the_tuned_tile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spec, "device_arch", lambda index: ARCHS["sm_90"])
    winner, kernel, cuda = trial(32, time_us=5.0), DECODE.kernel, torch.device("cuda")
    store.save(Entry(DECODE.key, (winner,), winner))
    keys = torch.empty(1, 8, 1280, 128, dtype=torch.bfloat16, device="meta")
    query = torch.empty(1, 32, 1, 128, dtype=torch.bfloat16, device="meta")
    shapes = kernel.shapes_of({"query": query, "keys": keys, "values": keys, "softcap": 0.0, "sinks": None})
    assert find_tile(kernel, shapes, cuda) == kernel.default_tile(shapes, ARCHS["sm_90"])
    store.save(Entry(store.Key.of(kernel, shapes, "sm_90"), (winner,), winner))
    spec._find_tile.cache_clear()
    assert find_tile(kernel, shapes, cuda) == winner.tile
