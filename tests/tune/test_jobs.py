"""What `tune` tunes is what compiled models launch: shapes met in a generation against the jobs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import compile_eager, run
from tiny import prompt, tiny

import specpass
import specpass.lowering.lower  # imported later, it would ask for its graphs what `met` counts
from specpass.cache.layer import round_room
from specpass.kernels import dispatch
from specpass.kernels.archs import ARCHS
from specpass.kernels.dispatch import Choice
from specpass.kernels.registry import kernels_of
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Kernel
from specpass.tune.jobs import Layer, draft_jobs, target_jobs

S, NEW = 100, 6
PC: dict[str, Any] = {"kernel": 5, "neighbours": 3, "first_layer": 0}
METHODS = [
    specpass.SpecKV(budget=24, window=8, lookahead=5),
    specpass.SpecKV(budget=24, window=8, lookahead=5, sparse_prefill=20),
    specpass.SpecKV(budget=24, window=8, lookahead=5, futures=3),
    specpass.SnapKV(budget=24, window=8),
    specpass.SpecKV(budget=24, window=8, lookahead=5, spread="global"),
    specpass.SpecKV(budget=24, window=8, lookahead=5, reconstruction=True),
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


def family(kernel: Kernel) -> str:
    """Kernels of one shape go by one name: on a CPU a token is not written in attention's launch."""
    return kernel.name.removesuffix("_given_lse").removesuffix("_lse").removesuffix("_append")


@pytest.fixture
def met(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, Shapes]]:
    """(kernel, shapes) of each operator that runs, as its launch would ask for a tile."""
    found: set[tuple[str, Shapes]] = set()
    real = dispatch.choose

    def choose(operator: str, operands: Any) -> Choice:
        kernels = [kernel for kernel in kernels_of(operator) if kernel.applies(operands)]
        found.update((family(kernel), kernel.shapes_of(operands)) for kernel in kernels)
        return real(operator, operands)

    monkeypatch.setattr(dispatch, "choose", choose)
    return found


@pytest.mark.parametrize(
    "method",
    METHODS,
    ids=lambda method: f"{method.name}{'_sparse' * bool(method.sparse_prefill)}{'_futures' * (method.futures > 1)}",
)
def test_a_generation_launches_what_is_tuned(method: Any, met: set[tuple[str, Shapes]]) -> None:
    torch._dynamo.reset()
    target, draft = tiny(), tiny(num_key_value_heads=4, seed=1000, layers=1)
    run(compile_eager(target, method, draft if method.drafts else None), prompt(S, seed=1), NEW)
    lookahead = method.lookahead
    sizes = [Layer.of(model.config, 1, "float32") for model in (target, draft)]
    jobs = target_jobs(sizes[0], 2, method, ARCHS["sm_90"], S, lookahead, round_room(NEW))
    jobs += draft_jobs(sizes[1], method, ARCHS["sm_90"], S, lookahead)
    assert met == {(family(job.kernel), job.shapes) for job in jobs}
