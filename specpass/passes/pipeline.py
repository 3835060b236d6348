"""The pipeline: the order of the passes stands here and nowhere else."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Iterable
from pathlib import Path

from torch import fx

from specpass.graph.edit import copy_module
from specpass.passes.annotate import Annotate
from specpass.passes.base import Pass, State
from specpass.passes.canonicalize import Canonicalize
from specpass.passes.gather_prompt import GatherPrompt
from specpass.passes.gather_prune import GatherPrune
from specpass.passes.insert_draft import InsertDraft
from specpass.passes.pack_rows import PackRows
from specpass.passes.resize_prompt import ResizePrompt
from specpass.passes.score_importance import ScoreImportance
from specpass.passes.shift_positions import ShiftPositions
from specpass.passes.specialize import Specialize
from specpass.passes.stages import verify
from specpass.passes.take_last import TakeLast

PASSES: tuple[Pass, ...] = (
    Canonicalize(),  # one spelling, so that annotate has one pattern
    Annotate(),  # refuses before anything is changed
    PackRows(),  # before the draft, which reads packed rows
    InsertDraft(),  # S becomes S + L, unless the prompt is compressed
    GatherPrompt(),  # needs the draft's scores; from here on lengths count the tokens that the target reads
    TakeLast(),  # the logits of the last position; needs the sequence axis to be a symbol still
    ResizePrompt(),  # S becomes the constant C (+ L) where the prompt is compressed
    ScoreImportance(),  # needs the lookahead's rows
    GatherPrune(),  # needs the scores
    ShiftPositions(),  # decode: what generate counts becomes what the target was told
    Specialize(),  # last: masks die, constants stay
)


FOLDER = Path(__file__).parent.parent
PARTS = ("passes", "graph", "dialect", "ops", "kernels")  # what decides a rewritten graph, and what it calls
SOURCES = tuple(file for part in PARTS for file in sorted((FOLDER / part).rglob("*.py")))


class Pipeline:
    """Runs the passes in order, verifies after each, dumps if asked.

    Args:
        skip: names of passes to leave out (for experiments: what a skipped pass promises is then not so).
        full_verify: propagate fake values through the whole graph after each pass.
    """

    def __init__(self, skip: Iterable[str] = (), full_verify: bool = False) -> None:
        self.skip = frozenset(skip)
        unknown = self.skip - {item.name for item in PASSES}
        if unknown:
            names = ", ".join(item.name for item in PASSES)
            raise ValueError(f"skip_passes={sorted(unknown)}: no such pass; the passes are {names}")
        self.full_verify = full_verify
        self.seconds: dict[str, float] = {}
        self.stages: dict[str, fx.GraphModule] = {}

    def run(self, gm: fx.GraphModule, state: State, keep: Iterable[str] = ()) -> fx.GraphModule:
        """Rewrite `gm` in place; graphs of the stages named in `keep` are copied into `stages`."""
        dump = Dump(state.kind)
        dump(gm, "traced")
        last = max(index for index, item in enumerate(PASSES))
        for index, item in enumerate(PASSES):
            if state.kind in item.kinds and item.name not in self.skip:
                start = time.perf_counter()
                item.run(gm, state)
                verify(gm, "FINAL" if index == last and not self.skip else item.stage, item.name, full=self.full_verify)
                self.seconds[item.name] = self.seconds.get(item.name, 0.0) + time.perf_counter() - start
                dump(gm, item.name)
            following = PASSES[index + 1].stage if index < last else ""
            if item.stage in keep and following != item.stage:
                self.stages[item.stage] = copy_module(gm)
        gm.recompile()
        return gm

    def fingerprint(self) -> str:
        """Hash of the passes, their options and every source that decides a rewritten graph; part of cache keys.

        The operators count: a compiled region calls them by name, and has their fake kernels' shapes built in.
        """
        options = [f"{item!r}" for item in PASSES if item.name not in self.skip]
        return hashlib.sha256("\n".join([*options, *map(Path.read_text, SOURCES)]).encode()).hexdigest()[:16]


class Dump:
    """Writes numbered, readable graphs into the folder that SPECPASS_DUMP names."""

    count = 0

    def __init__(self, kind: str) -> None:
        folder = os.environ.get("SPECPASS_DUMP")
        self.folder = Path(folder) if folder else None
        self.kind = kind

    def __call__(self, gm: fx.GraphModule, name: str) -> None:
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        gm.recompile()
        type(gm).__name__ = f"{self.kind}_{name}"  # each GraphModule has a class of its own; the dump names it
        path = self.folder / f"{Dump.count:03d}_{self.kind}_{name}.py"
        partial = path.with_suffix(".tmp")
        partial.write_text(gm.print_readable(print_output=False))
        partial.rename(path)
        Dump.count += 1
