"""Speed: first token, decode steps, memory and compile time of each method over prompt length and batch.

Each measurement is a process of its own; the file is written after each, and a rerun goes on.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from specpass.benchmarks import methods
from specpass.benchmarks.methods import LOOKAHEAD, WINDOW
from specpass.benchmarks.models import Pair, label
from specpass.benchmarks.pace import Pace
from specpass.benchmarks.peers import run as peers
from specpass.benchmarks.results import Store
from specpass.benchmarks.speed.floors import floors
from specpass.benchmarks.speed.table import BUDGET, EQUAL, PROMPT_BUDGET, aims, shown
from specpass.errors import BenchmarkError, PeerError

KEY = ("method", "budget", "length", "batch")
# method -> its budget, in order of importance; specpass's other methods are measured at BUDGET when asked for
METHODS: dict[str, int | None] = {
    "full_eager": None,
    "full_static_compiled": None,
    "specpass_speckv": BUDGET,
    "specpass_specpc": PROMPT_BUDGET,
    "specpass_snapkv": BUDGET,
    "kvpress_snapkv": BUDGET,
}
PEER = "kvpress_snapkv"
PROFILED = ("full_eager", "full_static_compiled", "specpass_speckv", "specpass_specpc")
STEPS = 16
SAME_MACHINE = 1.5  # rates further apart are of two machines: virtual ones of one name differ by a factor of two
NOTES = (
    "Every figure is `generate` as users call it; medians; prompts are random tokens. Decode steps run behind caches "
    "of S tokens that are filled with random keys and values: their time does not depend on what they hold.",
    "ttft_s is null where no prefill was timed (batches, and decode-only lengths). peak_bytes is the process's (on "
    "CUDA the device's) high-water mark in prefill and decode, weights included.",
    "full_eager: transformers' generate, DynamicCache. full_static_compiled: generate with a static cache, whose "
    "decode steps transformers compiles with torch.compile (it leaves prefills uncompiled). kvpress_snapkv: its press "
    "in its own environment, an uncompiled loop of forward calls.",
    "Floors: ttft_floor_s is FLOPs over the measured matmul rate, decode_floor_ms weights + K/V bytes over the "
    "measured bandwidth, the best of all starts and resumptions of the run.",
    "equal_kv: decode steps of specpass_snapkv and of full_static_compiled (other_...) at as many slots, a few of each "
    "by turns in one process. Other ratios are of processes one after the other: where a machine is shared, steps of "
    "170 ms have become steps of 225 and back within a minute.",
    "compile_cold_s: the first generation less a second one in a fresh process with an empty Inductor cache, and "
    "compile_warm_s in another process with that cache.",
)


class Config(NamedTuple):
    """One measurement; `prefills` real prefills are timed, none where that takes too long."""

    method: str
    budget: int | None
    length: int
    batch: int
    prefills: int

    @property
    def key(self) -> tuple[Any, ...]:
        return self[:4]

    @property
    def text(self) -> str:
        budget = "" if self.budget is None else f" {self.budget}"
        return f"{self.method}{budget}, S {self.length}, batch {self.batch}"

    @property
    def work(self) -> float:
        """About its seconds on two cores with the default pair: start and compilation, prefills, decode steps."""
        return 40 + self.prefills * 9e-3 * self.length * (1 + self.length / 3e4) + 0.4 * STEPS * self.batch


@dataclass(frozen=True)
class Plan:
    """Which lengths and batches. Raises: BenchmarkError: an unknown method, or nothing to measure."""

    methods: tuple[str, ...] = tuple(METHODS)
    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384)
    batches: tuple[int, ...] = (1, 4, 8)
    timed: int = 8192  # longest prompt whose prefill is timed

    def __post_init__(self) -> None:
        known = dict.fromkeys([*METHODS, *methods.names(), *methods.presets()])
        for name in self.methods:
            if name not in known:
                raise BenchmarkError(f"{name!r} is not a method of this benchmark. Known: {', '.join(known)}.")
        if not self.methods or not self.lengths or not self.batches or min(*self.lengths, *self.batches) < 1:
            raise BenchmarkError(
                f"nothing to measure: methods {self.methods}, lengths {self.lengths}, batches "
                f"{self.batches}; give at least one of each, from 1 up."
            )

    def configs(self) -> list[Config]:
        """In order of importance: one prompt at a time, then the longest prompts in batches, then the rest."""
        first, longest = self.batches[0], max(self.lengths)
        batches = sorted(self.batches[1:], key=lambda batch: batch != 4)  # the aims are stated at batch 4
        found = [
            self._config(method, length, first)
            for length in self.lengths
            for method in self.methods
            if length <= self.timed
        ]
        found += [self._config(method, longest, batch) for batch in batches for method in self.methods]
        found += [config for config, _ in self.equal_kv()]
        found += [
            self._config(method, length, batch)
            for batch in batches
            for length in sorted(self.lengths)
            for method in self.methods
        ]
        found += [self._config(method, length, first) for length in self.lengths for method in self.methods]
        return list(dict.fromkeys(found))

    def equal_kv(self) -> list[tuple[Config, Config]]:
        """A pruned cache and a static one of as many slots, for each batch."""
        if EQUAL not in self.lengths or not {"specpass_snapkv", "full_static_compiled"} <= {*self.methods}:
            return []
        return [
            (
                Config("specpass_snapkv", EQUAL, 4 * EQUAL, batch, 0),
                Config("full_static_compiled", None, EQUAL, batch, 0),
            )
            for batch in self.batches
        ]

    def _config(self, method: str, length: int, batch: int) -> Config:
        prefills = 0 if batch > 1 or length > self.timed else 3 if length <= 2048 else 1
        return Config(method, METHODS.get(method, BUDGET), length, batch, prefills)


QUICK = Plan(
    methods=("full_eager", "full_static_compiled", "specpass_snapkv", "specpass_speckv", "kvpress_snapkv"),
    lengths=(1024,),
    batches=(1,),
)


@dataclass
class Run:
    """One run of the plan on a pair, into a file."""

    pair: Pair
    plan: Plan
    out: Path
    minutes: float
    restart: bool = False
    profiled: int = 2048  # prompt length of the profiles
    quick: bool = False

    def __post_init__(self) -> None:
        settings = {
            "kind": "speed",
            "target": label(self.pair.target_name),
            "draft": label(self.pair.draft_name),
            "dtype": self.pair.dtype,
            "device": self.pair.device.partition(":")[0],
            "lowering": self.pair.lowering,
            "window": WINDOW,
            "lookahead": LOOKAHEAD,
            "steps": STEPS,
        }
        self.store = Store(self.out, settings, KEY, self.restart)
        self.store.parts |= {"notes": NOTES}

    def todo(self) -> list[Config]:
        return [config for config in self.plan.configs() if config.key not in self.store]

    def run(self) -> bool:
        """Fill the file; returns whether the plan is complete.

        Raises: BenchmarkError: a measurement failed, with the end of what its process said.
        """
        with tempfile.TemporaryDirectory(prefix="specpass-inductor-") as caches:
            return self._run(Path(caches))

    def _run(self, caches: Path) -> bool:
        configs = self.todo()
        compiled = self.store.parts.setdefault("compile", {})
        to_compile = {name for name in self.plan.methods if compiles(name)} - compiled.keys()
        pace = Pace(sum(config.work for config in configs) + 120 * len(to_compile), self.minutes)
        rates = self.rates(caches)
        for key, record in self.store.records.items():
            self.store.records[key] = self.with_floors(record, rates)  # all on the same rates
        self.store.save(rates=rates)
        left_out: dict[str, str] = {}
        for config in configs:
            if pace.over or config.method in left_out:
                continue
            if config.method in to_compile:
                to_compile.remove(config.method)
                compiled[config.method] = self.compile(config, caches)
                pace.step(120, f"{config.method} compiled: {compiled[config.method]}")
            try:
                found = self.measure(config, caches)
            except PeerError as error:
                left_out[config.method] = str(error)
                print(f"note: {config.method} left out: {error}", file=sys.stderr, flush=True)
                continue
            times = compiled.get(config.method, {"compile_cold_s": None, "compile_warm_s": None})
            record = {**dict(zip(KEY, config.key, strict=True)), **found, **times}
            self.store.add(self.with_floors({name: _rounded(value) for name, value in record.items()}, rates))
            step = f"{found['decode_ms']:.0f} ms a step"
            pace.step(config.work, f"{config.text}: ttft {shown(found['ttft_s'])} s, {step}")
        equal = self.store.parts.setdefault("equal_kv", {})
        for ours, static in self.plan.equal_kv():
            if str(ours.batch) not in equal and not pace.over and not self.quick:
                equal[str(ours.batch)] = self.child(caches, ours, what="by_turns", other=static._asdict())
                self.store.save()
        profiles = self.store.parts.setdefault("profiles", {})
        for method in PROFILED:
            if method in self.plan.methods and method not in profiles and not pace.over and not self.quick:
                config = Config(method, METHODS[method], self.profiled, 1, 0)
                profiles[method] = {"length": self.profiled, **self.child(caches, config, what="profile")}
        self.store.save(left_out=left_out, aims=aims(self.store.records, equal))
        return not self.todo() and not left_out

    def rates(self, caches: Path) -> dict[str, float]:
        """What the machine can do: the best of the file's rates and of those measured now.

        Raises: BenchmarkError: this machine, though it bears the same name, is a faster or slower one.
        """
        stored = self.store.parts.get("rates")
        if stored and not self.todo():
            return stored
        here = self.child(caches, what="rates")
        stored = stored or here
        ratio = here["flops_per_s"] / stored["flops_per_s"]
        if not 1 / SAME_MACHINE < ratio < SAME_MACHINE:
            raise BenchmarkError(
                f"{self.out} was measured on another machine, or beside other work: matrix products run at {ratio:.2f} "
                "times its rate here, and ratios of its times would mean nothing. Wait until the machine is quiet, "
                "pass --restart, or name another file."
            )
        return {name: max(rate, stored[name]) for name, rate in here.items()}

    def with_floors(self, record: dict[str, Any], rates: dict[str, float]) -> dict[str, Any]:
        method, budget, length, batch = (record[name] for name in KEY)
        bounds = floors(self.pair, method, budget, length, batch, record, rates)
        return {**record, **{name: _rounded(value) for name, value in bounds.items()}}

    def compile(self, config: Config, caches: Path) -> dict[str, float]:
        """Compile times of a method, cold and warm: two processes on one fresh cache."""
        small = config._replace(batch=1)
        cold, warm = (self.child(caches, small, what="compile")["compile_s"] for _ in range(2))
        return {"compile_cold_s": round(cold, 2), "compile_warm_s": round(warm, 2)}

    def measure(self, config: Config, caches: Path) -> dict[str, Any]:
        if config.method == PEER:
            found = peers.speed(self.pair, config.length, config.batch, config.budget or 0, STEPS, config.prefills)
            return {**found, "decode_ms": 1000 * config.batch / found["decode_tokens_per_s"]}
        return self.child(caches, config, what="measure")

    def child(self, caches: Path, config: Config | None = None, **job: Any) -> dict[str, Any]:
        """The result of one fresh process; methods have Inductor caches of their own."""
        job |= {
            "target": self.pair.target_name,
            "draft": self.pair.draft_name,
            "dtype": self.pair.dtype,
            "device": self.pair.device,
            "lowering": self.pair.lowering,
            "trust": self.pair.trust,
            "steps": STEPS,
        }
        job |= config._asdict() if config else {}
        cache = caches / job.get("method", "none")
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump(job, file)
            file.flush()
            # large blocks by mmap: freed memory goes back at once, so the mark shows what is alive
            environment = {
                **os.environ,
                "TORCHINDUCTOR_CACHE_DIR": str(cache),
                "MALLOC_MMAP_THRESHOLD_": "65536",
                "MALLOC_TRIM_THRESHOLD_": "65536",
            }
            if job["what"] == "profile":  # fused kernels show up by name
                environment["TORCHINDUCTOR_CPP_ENABLE_KERNEL_PROFILE"] = "1"
            done = subprocess.run(
                [sys.executable, "-m", "specpass.benchmarks.speed.child", file.name],
                env=environment,
                capture_output=True,
                text=True,
            )
        if done.returncode:
            text = config.text if config else job["what"]
            raise BenchmarkError(
                f"measuring {text} failed: {done.stderr.strip()[-600:]} Leave it out with --methods, "
                "--lengths or --batches."
            )
        return json.loads(done.stdout.strip().splitlines()[-1])


def compiles(method: str) -> bool:
    return method == "full_static_compiled" or method.startswith(methods.PREFIX)


def _rounded(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value
