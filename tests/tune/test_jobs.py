"""What `tune` tunes is what compiled models launch: shapes met in a generation against the jobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import compile_eager, run
from tiny import prompt, tiny

import specpass
from specpass.cache.layer import round_room
from specpass.kernels import launch, reference
from specpass.kernels.shapes import Shapes
from specpass.tune.jobs import Layer, draft_jobs, target_jobs

S, NEW = 100, 6
PC: dict[str, Any] = {"kernel": 5, "neighbours": 3, "first_layer": 0}
METHODS = [
    specpass.SpecKV(budget=24, window=8, lookahead=5),
    specpass.SnapKV(budget=24, window=8),
    specpass.PyramidKV(budget=24, window=8),
    specpass.StreamingLLM(budget=24),
    specpass.SpecPC(budget=40, window=8, lookahead=3, **PC),
    specpass.SpecKVPC(
        budget=24,
        window=8,
        lookahead=5,
        prompt_budget=40,
        prompt_window=8,
        prompt_kernel=5,
        neighbours=3,
        first_layer=0,
    ),
]


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, Shapes]]:
    """(kernel, shapes) of each operator that runs, as the launcher would ask for a tile."""
    found: set[tuple[str, Shapes]] = set()
    importance, gather_kv, attend = reference.importance, reference.gather_kv, reference.attend

    def scored(
        query: Any,
        key: Any,
        rows: Any,
        lengths: Any,
        window: int,
        scale: float,
        reduce: str,
        weights: Any = None,
        *rest: Any,
    ) -> Any:
        found.add(("importance", launch.score_shapes(query, key, window, reduce, weights is not None)))
        return importance(query, key, rows, lengths, window, scale, reduce, weights, *rest)

    def gathered(key: Any, value: Any, positions: Any, room: int) -> Any:
        found.add(("gather", launch.gather_shapes(key, value, positions.shape[2], room)))
        return gather_kv(key, value, positions, room)

    def attended(query: Any, keys: Any, values: Any, *rest: Any) -> Any:
        found.add(("decode", launch.decode_shapes(query, keys, values)))
        return attend(query, keys, values, *rest)

    monkeypatch.setattr(reference, "importance", scored)
    monkeypatch.setattr(reference, "gather_kv", gathered)
    monkeypatch.setattr(reference, "attend", attended)
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_generation_launches_what_is_tuned(method: Any, met: set[tuple[str, Shapes]]) -> None:
    torch._dynamo.reset()
    target, draft = tiny(), tiny(num_key_value_heads=4, seed=1000, layers=1)
    run(compile_eager(target, method, draft if method.drafts else None), prompt(S, seed=1), NEW)
    lookahead = method.lookahead
    sizes = [Layer.of(model.config, 1, "float32") for model in (target, draft)]
    jobs = target_jobs(sizes[0], 2, method, "sm_90", S, lookahead, round_room(NEW))
    jobs += draft_jobs(sizes[1], method, "sm_90", S, lookahead)
    tuned = {(job.kernel.removesuffix("_append"), job.shapes) for job in jobs if job.kernel != "importance_given_lse"}
    assert met == tuned
