"""cudagraphs=True: when a step is recorded, what is copied, what is recorded anew. A stand-in plays CUDA's part."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import compile_eager, run
from tiny import prompt, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import specpass
from specpass.backend import compile as backend
from specpass.errors import NoCudaError
from specpass.lowering import lower as lowering
from specpass.lowering.cuda_graph import KEPT, GraphedStep, moving_inputs, on_cuda
from specpass.rewrite import Request

METHOD = specpass.SnapKV(budget=12, window=4)


@dataclasses.dataclass
class Stand:
    """Records like CUDA: nothing of the caller's changes while recording, and a replay reads the recorded tensors."""

    recorded: int = 0
    replayed: int = 0

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Callable[[], None]]:
        self.recorded += 1
        scratch = tuple(arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args)
        outputs = tuple(torch.full_like(out, float("nan")) for out in run(*scratch))

        def replay() -> None:
            self.replayed += 1
            for buffer, out in zip(outputs, run(*args), strict=True):
                buffer.copy_(out)

        return outputs, replay


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """CPU tensors count as CUDA's, and recording is the stand-in's."""
    stand = Stand()
    monkeypatch.setattr(backend.checks, "check_cudagraphs", lambda wanted: None)
    monkeypatch.setattr(lowering, "on_cuda", lambda gm: True)
    monkeypatch.setattr(lowering, "GraphedStep", lambda run, moving: GraphedStep(run, moving, stand))
    return stand


def test_a_generation_is_the_same_and_replays_all_but_its_first_step(stand: Stand) -> None:
    steps, ids = 8, prompt(40, seed=1)
    expected = run(compile_eager(tiny(), METHOD), ids, steps)
    model = compile_eager(tiny(), METHOD, cudagraphs=True)
    found = run(model, ids, steps)
    assert found.tokens == expected.tokens
    assert torch.equal(found.logits, expected.logits)
    for mine, theirs in zip(found.cache.layers, expected.cache.layers, strict=True):
        assert torch.equal(mine.lengths, theirs.lengths)
        assert torch.equal(mine.key_buffer, theirs.key_buffer)
    assert (stand.recorded, stand.replayed) == (1, steps - 2)  # the prefill gives the first token
    assert "one CUDA graph" in str(specpass.report(model))
    again = run(model, prompt(33, seed=2), 4)  # another cache: other addresses
    assert again.tokens == run(compile_eager(tiny(), METHOD), prompt(33, seed=2), 4).tokens
    assert stand.recorded == 2


def test_a_cache_that_grows_is_recorded_anew(stand: Stand) -> None:
    steps, ids = 70, prompt(20, seed=3)  # 64 slots, then a block more
    cache = [specpass.BudgetCache(tiny().config, METHOD, max_new_tokens=1) for _ in range(2)]
    expected = run(compile_eager(tiny(), METHOD), ids, steps, past_key_values=cache[0])
    found = run(compile_eager(tiny(), METHOD, cudagraphs=True), ids, steps, past_key_values=cache[1])
    assert found.tokens == expected.tokens
    assert stand.recorded == 2


def test_results_are_the_callers_and_old_recordings_go() -> None:
    stand, state = Stand(), torch.zeros(3)

    def step(ids: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor]:
        total.add_(ids)
        return (total * 2,)

    graphed = GraphedStep(step, (0,), stand)
    results = [graphed(torch.full((3,), float(i)), state)[0] for i in range(4)]
    assert [result[0].item() for result in results] == [0.0, 2.0, 6.0, 12.0]
    keep = [torch.zeros(3) for _ in range(KEPT + 2)]
    for other in keep:
        graphed(torch.ones(3), other)
    assert len(graphed.recordings) == KEPT
    assert all(other[0] == 1 for other in keep)


def test_without_cuda_it_is_an_error_at_both_doors() -> None:
    with pytest.raises(NoCudaError, match="leave it out"):
        specpass.Backend(method=METHOD, cudagraphs=True)
    target = tiny()
    with pytest.raises(NoCudaError):
        specpass.compile(target, method=METHOD, cudagraphs=True)
    assert "_specpass" not in target.__dict__


def test_only_decode_on_cuda_is_graphed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lowering, "fuse", lambda *_: {})  # which asks for a decode step's operators

    def step(x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + 1,)

    for device, decode, graphed in (("cuda", True, True), ("cuda", False, False), ("cpu", True, False)):
        with FakeTensorMode():
            gm = make_fx(step)(torch.empty(2, 1, device=device))
        gm.graph.find_nodes(op="placeholder")[0].meta["specpass_source"] = "L['kwargs']['input_ids']"
        assert on_cuda(gm) == (device == "cuda")
        assert moving_inputs(gm) == (0,)
        done = lowering.lower(gm, "eager", Request("decode" if decode else "append"), cudagraphs=True)
        assert isinstance(done.run, GraphedStep) == graphed
        assert bool(done.notes) == graphed
