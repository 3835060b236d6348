"""Quality: the grid of methods, budgets, tasks, lengths and seeds, answer by answer into a result file.

The order is that of importance, so that a run that stops at its time limit has the separating tasks at the first
length; a rerun goes on where it stopped.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from specpass.benchmarks.methods import LOOKAHEAD, PROMPT_BUDGET, WINDOW
from specpass.benchmarks.models import Answer, Pair, answers, label
from specpass.benchmarks.pace import Pace
from specpass.benchmarks.peers import run as peers
from specpass.benchmarks.quality.summary import summarise
from specpass.benchmarks.quality.variants import FULL, GRID, ORACLE, Variant, variants
from specpass.benchmarks.results import Store
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.benchmarks.tasks.table import SEPARATING, TASKS, WITHOUT_DATA, check_task
from specpass.errors import BenchmarkError, PeerError

KEY = ("method", "budget", "task", "length", "seed")
NOTES = (
    "Greedy decoding; prompts include the question, and the answer's beginning stands behind the chat template.",
    "Where the first answer token comes from differs between implementations: in specpass (SpecPC apart), and in "
    "kvpress as it is called here, it comes from the full prefill; other code feeds the last prompt token again and "
    "takes it from the pruned cache. Every answer that is scored is longer than one token, so that pruned K/V decide.",
    "kvpress: its own presses at compression_ratio = 1 - budget / prompt tokens, SnapKV with window_size=32 as here, "
    "else its defaults. Its AdaKV and KVzip mask what they drop; kept slots are counted over all heads (and layers).",
)


class Cell(NamedTuple):
    """One answer of the grid."""

    variant: Variant
    task: str
    length: int
    seed: int

    @property
    def key(self) -> tuple[Any, ...]:
        return (self.variant.method, self.variant.budget, self.task, self.length, self.seed)


AGNOSTIC = tuple(name for name in GRID if name != ORACLE)


@dataclass(frozen=True)
class Grid:
    """What to run. `agnostic`: compressors see a prompt's context, and what is asked of it comes behind.

    Raises: BenchmarkError: a method, task, data set or length that there is not.
    """

    methods: tuple[str, ...] = tuple(GRID)
    tasks: tuple[str, ...] = WITHOUT_DATA
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    seeds: int = 8
    rounds: tuple[int, ...] = (0, 1)  # which of a method's budgets in variants.GRID; the first alone at more lengths
    agnostic: bool = False
    budgets: tuple[int | float, ...] = ()  # of all methods and lengths, in the place of those

    def __post_init__(self) -> None:
        self.variants(self.methods)
        for name in self.tasks:
            check_task(name)
        if self.agnostic and ORACLE in self.methods:
            raise BenchmarkError(f"{ORACLE} is told the answer, so it sees what is asked: leave it out of --methods.")
        if not self.methods or not self.tasks or not self.lengths or self.seeds < 1 or min(self.lengths) < 1:
            raise BenchmarkError(
                f"nothing to run: methods {self.methods}, tasks {self.tasks}, lengths {self.lengths}, "
                f"{self.seeds} seeds; give at least one of each, lengths in tokens."
            )

    def variants(self, methods: Iterable[str], longer: bool = False) -> list[Variant]:
        """Args: longer: of prompts that are not of the first length."""
        return variants(methods, self.rounds[:1] if longer else self.rounds, self.budgets)

    def stages(self) -> Iterator[list[Cell]]:
        """The grid in parts, the most important one first: the cells of each have one length."""
        methods = dict.fromkeys(self.methods)
        if ORACLE in methods:
            methods[FULL] = None  # whose answers it is told
        first, *longer = self.lengths
        separating = [name for name in SEPARATING if name in self.tasks] or list(self.tasks)
        fewer = self.variants(methods, longer=True)
        stages = [(self.variants(methods), first, separating)]
        stages += [(fewer, length, separating) for length in longer]
        stages.append((fewer, first, [task for task in self.tasks if task not in separating]))
        for number, (chosen, length, tasks) in enumerate(stages):
            # what takes long is done for two seeds first, so that a run that is cut off has every method
            some = self.seeds if number == 0 else min(2, self.seeds)
            for seeds in (range(some), range(some, self.seeds)):
                yield [Cell(v, t, length, s) for v, s, t in itertools.product(chosen, seeds, tasks)]


QUICK = Grid(
    methods=(FULL, "specpass_speckv", "specpass_snapkv", "specpass_specpc", "kvpress_snapkv"),
    tasks=SEPARATING,
    lengths=(1024,),
    seeds=1,
    rounds=(1,),
)


@dataclass
class Run:
    """One run of the grid on a pair, into a file."""

    pair: Pair
    grid: Grid
    out: Path
    minutes: float
    restart: bool = False
    prompts: dict[tuple[str, int, int], Prompt] = field(default_factory=dict)

    def __post_init__(self) -> None:
        settings = {
            "kind": "quality",
            "target": label(self.pair.target_name),
            "draft": label(self.pair.draft_name),
            "dtype": self.pair.dtype,
            "device": self.pair.device.partition(":")[0],
            "window": WINDOW,
            "lookahead": LOOKAHEAD,
            "prompt_budget": PROMPT_BUDGET,
            **({"compressors": "see the context, not the question"} if self.grid.agnostic else {}),
        }
        self.store = Store(self.out, settings, KEY, self.restart, summarise)
        self.store.parts |= {"notes": NOTES}
        self.tokenizer = self.pair.tokenizer

    def prompt(self, task: str, length: int, seed: int) -> Prompt:
        key = (task, length, seed)
        if key not in self.prompts:
            prompt = TASKS[task].prompt(seed, length, self.tokenizer)
            self.prompts[key] = dataclasses.replace(prompt, agnostic=self.grid.agnostic)
        return self.prompts[key]

    def full_answer(self, prompt: Prompt) -> list[int]:
        return self.store[FULL, None, prompt.task, prompt.length, prompt.seed]["tokens"]

    def todo(self) -> list[list[Cell]]:
        """What the grid has and the file has not, in batches that share a compilation (or a peer's prefill)."""
        batches: dict[Any, list[Cell]] = {}
        for number, stage in enumerate(self.grid.stages()):
            for cell in stage:
                if cell.key not in self.store:
                    method = cell.variant.method
                    shared = "peers" if method in peers.SHARING else method if cell.variant.is_peer else cell.variant
                    batches.setdefault((number, shared), []).append(cell)
        return list(batches.values())

    def work(self, cell: Cell) -> float:
        return cell.variant.work(cell.length, TASKS[cell.task].new_tokens, self.pair.draft_share)

    def run(self) -> bool:
        """Fill the file; returns whether the grid is complete.

        Raises: what loading and compiling the pair raise; BenchmarkError: a length that a task does not fill.
        """
        batches = self.todo()
        pace = Pace(sum(self.work(cell) for batch in batches for cell in batch), self.minutes)
        left_out: dict[str, str] = {}
        for batch in batches:
            names = dict.fromkeys(cell.variant.label for cell in batch)
            if pace.over:
                break
            print(f"{', '.join(names)}, {batch[0].length} tokens: {len(batch)} answers", file=sys.stderr, flush=True)
            try:
                for answer in self.answer(batch, pace):
                    self.record(answer, pace)
            except PeerError as error:
                left_out |= dict.fromkeys(names, str(error))
                pace.total -= sum(self.work(cell) for cell in batch if cell.key not in self.store)
                print(f"note: {', '.join(names)} left out: {error}", file=sys.stderr, flush=True)
        self.store.save(left_out=left_out)
        return not self.todo()

    def answer(self, batch: list[Cell], pace: Pace) -> Iterator[Answer]:
        """The batch's answers one by one, until the time is over."""
        cells = itertools.takewhile(lambda _: not pace.over, batch)
        if batch[0].variant.is_peer:
            jobs: dict[tuple[str, int, int], list[Variant]] = {}
            for cell in batch:
                jobs.setdefault((cell.task, cell.length, cell.seed), []).append(cell.variant)
            work = [(self.prompt(*key), TASKS[key[0]].new_tokens, chosen) for key, chosen in jobs.items()]
            for found in peers.answers(self.pair, work):
                yield found
                if pace.over:
                    return
        else:
            prompts = ((self.prompt(c.task, c.length, c.seed), TASKS[c.task].new_tokens) for c in cells)
            yield from answers(self.pair, batch[0].variant, prompts, self.full_answer)

    def record(self, answer: Answer, pace: Pace) -> None:
        """Score an answer and write it into the file."""
        prompt, variant = answer.prompt, answer.variant
        cell = Cell(variant, prompt.task, prompt.length, prompt.seed)
        scored = TASKS[prompt.task].scored(prompt, answer.tokens, self.tokenizer)
        self.store.add(
            {
                **dict(zip(KEY, cell.key, strict=True)),
                "prompt_tokens": len(prompt.ids),
                **scored,
                "seconds": round(answer.seconds, 2),
                **({} if answer.kept is None else {"kept_slots": answer.kept}),
            }
        )
        name = f"{variant.label} {prompt.task} {prompt.length} seed {prompt.seed}"
        pace.step(self.work(cell), f"{name}: {scored['score']:.2f}")
