"""Times on a GPU: calls replayed as one graph, less what surrounds them. A stand-in plays the GPU's part."""

from __future__ import annotations

import contextlib
import statistics
import warnings
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specpass.kernels import clock, measure, recording, tuner
from specpass.kernels.archs import ARCHS
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.tiles import Tile

PYTHON_US, REPLAY_US, FLUSH_US = 90.0, 8.0, 60.0  # to launch from Python, to launch a graph; a flush of the cache
SMALL = Shapes("float32", 2, 2, 3, 16, 16, rows=6, window=4, budget=20, room=12, columns=64)


class Stand:
    """A clock of a GPU that works through what arrives: `host` and `device` are microseconds until each is free."""

    def __init__(self) -> None:
        self.host = self.device = 0.0
        self.records = True
        self.recording: list[tuple[str, float]] | None = None
        self.graphs: list[list[str]] = []

    def arrive(self, launch: float, work: float) -> None:
        self.host += launch
        self.device = max(self.device, self.host) + work

    def launch(self, name: str, us: float) -> None:
        if self.recording is None:
            self.arrive(PYTHON_US, us)
        else:
            self.recording.append((name, us))

    def flush(self) -> None:
        self.launch("flush", FLUSH_US)

    def span_us(self, call: Callable[[], object], before: Callable[[], object], repeats: int) -> float:
        spans = []
        for _ in range(repeats):
            before()
            start = max(self.device, self.host)
            call()
            spans.append(self.device - start)
        self.host = self.device
        return statistics.median(spans)

    def record(self, run: Callable[[], object]) -> Callable[[], object]:
        if not self.records:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.recording = held = []
        run()
        self.recording = None
        self.graphs.append([name for name, _ in held])
        return lambda: self.arrive(REPLAY_US, sum(us for _, us in held))


@pytest.fixture
def stand(monkeypatch: pytest.MonkeyPatch) -> Stand:
    stand = Stand()
    monkeypatch.setattr(measure, "Clock", lambda device: stand)
    return stand


@pytest.mark.parametrize("us", [3.0, 90.0, 5000.0])
@pytest.mark.parametrize("rewinds", [False, True])
@pytest.mark.parametrize("cold", [False, True])
def test_the_time_is_the_calls_own(stand: Stand, cold: bool, rewinds: bool, us: float) -> None:
    before = (lambda: stand.launch("back", 2.0)) if rewinds else measure.nothing
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = measure.time_us(lambda: stand.launch("call", us), "cuda", cold=cold, before=before)
    assert found == pytest.approx(us, rel=2e-3)  # by events a call of 3 us takes 93
    ahead = ["flush"] * cold + ["back"] * rewinds
    whole, *alone = stand.graphs
    calls = whole.count("call")
    assert whole == [*ahead, "call"] * calls
    assert alone == ([ahead * calls] if ahead else [])
    assert 7 <= calls <= 50 if us < 1000 else calls == 1


def test_what_no_graph_holds_is_timed_by_events_and_says_so(stand: Stand) -> None:
    stand.records = False
    with pytest.warns(UserWarning, match=r"timed by events around Python.*when stream is capturing"):
        found = measure.time_us(
            lambda: stand.launch("call", 3.0), "cuda", cold=True, before=lambda: stand.launch("back", 2.0)
        )
    assert found > PYTHON_US


def test_the_tuner_and_the_bench_time_so(stand: Stand, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, real = REGISTRY["decode_append"], measure.make_case
    tiles = {Tile(16): 7.0, Tile(32): 4.0}
    monkeypatch.setattr(measure, "make_case", lambda kernel, shapes, device, seed=0: real(kernel, shapes, "cpu", seed))
    monkeypatch.setattr(measure, "check", lambda case, tile: 0.5)
    monkeypatch.setattr(measure, "run", lambda case, tile: stand.launch("call", tiles[tile]))
    job = tuner.Job(kernel, SMALL, ARCHS["sm_89"])
    trials = tuple(tuner.measure_trial(job, tuner.Trial(tile, 40, 0, 0, 1e-6)) for tile in tiles)
    assert [trial.time_us for trial in trials] == pytest.approx([7.0, 4.0])
    assert [trial.warm_us for trial in trials] == pytest.approx([7.0, 4.0])
    assert tuner.pick(job, trials) == trials[1]


def test_only_what_moves_on_is_put_back() -> None:
    for kernel in REGISTRY.values():
        case = measure.make_case(kernel, SMALL, "cpu")
        back = measure.rewind(case)
        assert (back is measure.nothing) == (not kernel.advances)
        starts = {name: case.operands[name].clone() for name in kernel.advances}
        measure.fallback(case)
        assert not any(torch.equal(case.operands[name], start) for name, start in starts.items())
        back()
        assert all(torch.equal(case.operands[name], start) for name, start in starts.items())


def test_a_recording_is_the_devices_and_ends_where_the_call_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @contextlib.contextmanager
    def context(entered: Any) -> Iterator[None]:
        seen.append(entered)
        yield
        seen.append(f"leaves {entered}")

    def begin(**options: str) -> None:
        seen.append(options)

    graph = SimpleNamespace(capture_begin=begin, capture_end=lambda: seen.append("end"), replay=lambda: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: graph)
    monkeypatch.setattr(recording, "capture_stream", lambda device: f"stream of {device}")
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, context)
    assert clock.Clock("cuda:1").record(lambda: seen.append("run")) is graph.replay
    others_go_on = {"capture_error_mode": "thread_local"}
    entered = [torch.device("cuda:1"), "stream of cuda:1", others_go_on]
    assert seen == [*entered, "run", "end", "leaves stream of cuda:1", "leaves cuda:1"]
    del seen[:]

    def fail() -> None:
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        clock.Clock("cuda:1").record(fail)
    assert seen == [*entered, "end"]  # these contexts leave nothing to see behind an error
