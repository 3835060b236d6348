"""cudagraphs=True: when a step is recorded, what is copied, what is recorded anew. A stand-in plays CUDA's part."""

from __future__ import annotations

import dataclasses
import functools
import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import compile_eager, run
from tiny import prompt, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map

import specpass
from specpass.backend import compile as backend
from specpass.errors import NoCudaError
from specpass.lowering import lower as lowering
from specpass.lowering.cuda_graph import KEPT, GraphedStep, input_kinds, on_cuda
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
        outputs = tree_map(lambda out: torch.full_like(out, float("nan")), run(*scratch))

        def replay() -> None:
            self.replayed += 1
            tree_map(lambda buffer, out: buffer.copy_(out), outputs, run(*args))

        return outputs, replay


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    """CPU tensors count as CUDA's, and recording is the stand-in's."""
    stand = Stand()
    monkeypatch.setattr(backend.checks, "check_cudagraphs", lambda wanted: None)
    monkeypatch.setattr(lowering, "on_cuda", lambda gm: True)
    monkeypatch.setattr(lowering, "GraphedStep", functools.partial(GraphedStep, record=stand))
    return stand


def test_a_generation_is_the_same_and_replays_all_but_its_first_step(stand: Stand) -> None:
    steps, ids = 8, prompt(40, seed=1)
    plain = compile_eager(tiny(), METHOD, cudagraphs=False)
    expected = run(plain, ids, steps)
    model = compile_eager(tiny(), METHOD, cudagraphs=True)
    found = run(model, ids, steps)
    assert found.tokens == expected.tokens
    assert torch.equal(found.logits, expected.logits)
    for mine, theirs in zip(found.cache.layers, expected.cache.layers, strict=True):
        assert torch.equal(mine.lengths, theirs.lengths)
        assert torch.equal(mine.key_buffer, theirs.key_buffer)
    assert (stand.recorded, stand.replayed) == (1, steps - 2)  # the prefill gives the first token
    assert "one CUDA graph" in str(specpass.report(model))
    again = run(model, prompt(33, seed=2), 4)  # another cache while the first one is held: other addresses
    assert again.tokens == run(plain, prompt(33, seed=2), 4).tokens
    assert stand.recorded == 2
    kept = found.cache.layers[0].key_buffer.clone()
    del again
    gc.collect()
    third = run(model, prompt(50, seed=4), 4)  # moves into the storage that nobody reads any more
    assert third.tokens == run(plain, prompt(50, seed=4), 4).tokens
    assert (stand.recorded, stand.replayed) == (2, steps - 2 + 3 + 3)
    assert torch.equal(found.cache.layers[0].key_buffer, kept), "a cache that is still held"


@pytest.mark.parametrize(
    "method", [specpass.SpecKV(budget=12, window=4, lookahead=6), specpass.SpecPC(12, window=4, lookahead=6)]
)
def test_the_drafts_steps_are_replayed(stand: Stand, method: Any) -> None:
    def pair(**options: Any) -> Any:
        return compile_eager(tiny(), method, draft=tiny(seed=1, layers=1), **options)

    model, plain = pair(cudagraphs=True), pair(cudagraphs=False)
    for turn, length in enumerate((40, 33, 40)):
        ids = prompt(length, seed=turn)
        assert run(model, ids, 1).tokens == run(plain, ids, 1).tokens
    assert (stand.recorded, stand.replayed) == (3, 2 * 4 + 5)  # of five steps; the third prompt's shapes have run
    assert "the draft's steps are replayed as one CUDA graph" in str(specpass.report(model))


def test_a_step_that_cannot_be_recorded_runs_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []

    def refuse(run: Callable[..., Any], args: tuple[Any, ...]) -> Any:
        tried.append(args)
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    monkeypatch.setattr(lowering, "on_cuda", lambda gm: True)
    monkeypatch.setattr(lowering, "GraphedStep", functools.partial(GraphedStep, record=refuse))
    model = compile_eager(tiny(), METHOD)
    assert (
        run(model, prompt(40), 8).tokens == run(compile_eager(tiny(), METHOD, cudagraphs=False), prompt(40), 8).tokens
    )
    assert len(tried) == 1
    told = "decode steps cannot be recorded as a CUDA graph (operation not permitted when stream is capturing)"
    assert told in str(specpass.report(model))


def test_a_cache_that_grows_is_recorded_anew(stand: Stand) -> None:
    steps, ids = 70, prompt(20, seed=3)  # 64 slots, then a block more
    cache = [specpass.BudgetCache(tiny().config, METHOD, max_new_tokens=1) for _ in range(2)]
    plain = compile_eager(tiny(), METHOD, cudagraphs=False)
    expected = run(plain, ids, steps, past_key_values=cache[0])
    found = run(compile_eager(tiny(), METHOD, cudagraphs=True), ids, steps, past_key_values=cache[1])
    assert found.tokens == expected.tokens
    assert stand.recorded == 2


def test_results_are_the_callers_and_old_recordings_go() -> None:
    stand, state = Stand(), torch.zeros(3)

    def step(ids: torch.Tensor, total: torch.Tensor) -> tuple[torch.Tensor]:
        total.add_(ids)
        return (total * 2,)

    graphed = GraphedStep(step, ("moving", "state"), record=stand)
    results = [graphed(torch.full((3,), float(i)), state)[0] for i in range(4)]
    assert [result[0].item() for result in results] == [0.0, 2.0, 6.0, 12.0]
    keep = [torch.zeros(3) for _ in range(KEPT + 2)]
    for other in keep:
        graphed(torch.ones(3), other)
    assert len(graphed.recordings) == KEPT
    assert all(other[0] == 1 for other in keep)
    graphed(torch.ones(3), keep[-2])  # not the first recording of its shapes
    assert keep[-2][0] == 2
    assert len(graphed.recordings) == KEPT


def test_a_recording_that_keeps_nothing_lets_the_state_die() -> None:
    graphed = GraphedStep(lambda ids, total: total.add_(ids) * 2, ("moving", "state"), keeps=False, record=forgetful)
    state = torch.zeros(3)
    for _ in range(3):
        graphed(torch.ones(3), state)
    gone = weakref.ref(state)
    del state
    assert gone() is None


def forgetful(run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Callable[[], None]]:
    """As a CUDA graph, which knows addresses alone."""
    return run(*(arg.clone() for arg in args)), lambda: None


def test_a_view_that_somebody_holds_is_not_written_to() -> None:
    """A cache may be gone while a view of its storage is not."""
    graphed = GraphedStep(lambda ids, total: total.add_(ids) * 2, ("moving", "state"), record=forgetful)
    state = torch.zeros(4)
    for _ in range(2):
        graphed(torch.ones(4), state)
    view, recording = state[1:], graphed.recordings[0]
    del state
    assert not recording.free
    del view
    assert recording.free


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
        assert input_kinds(gm) == ("moving",)
        done = lowering.lower(gm, "eager", Request("decode" if decode else "append"), cudagraphs=True)
        assert isinstance(done.run, GraphedStep) == graphed
        assert bool(done.notes) == graphed
