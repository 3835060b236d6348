"""The order of the passes: of a target's graphs, and of a draft's. It stands here and nowhere else."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from specpass.methods.base import Method
from specpass.methods.specpc import SpecPC
from specpass.passes.annotate import Annotate
from specpass.passes.attend_branches import AttendBranches
from specpass.passes.attend_packed import AttendPacked
from specpass.passes.attend_slots import AttendSlots
from specpass.passes.attend_sparsely import AttendDraftSparsely, AttendSparsely
from specpass.passes.canonicalize import Canonicalize
from specpass.passes.gather_prompt import GatherPrompt, KeepPrompt
from specpass.passes.gather_prune import GatherPrune
from specpass.passes.insert_draft import InsertDraft
from specpass.passes.note_queries import NoteQueries
from specpass.passes.pack_rows import PackRows
from specpass.passes.resize_prompt import ResizePrompt
from specpass.passes.score_draft import ScoreDraftPrefill, ScoreDraftStep
from specpass.passes.score_importance import ScoreImportance
from specpass.passes.shift_positions import ShiftPositions
from specpass.passes.skip_padding import SkipPadding
from specpass.passes.specialize import Specialize
from specpass.passes.take_ahead import TakeAhead
from specpass.passes.take_last import TakeLast
from specpass.rewrite import Pass

PASSES: tuple[Pass, ...] = (
    Canonicalize(),  # one spelling, so that annotate has one pattern
    Annotate(),  # refuses before anything is changed
    AttendPacked(),  # the masks die, so that nothing is left that reads the padding mask
    PackRows(),  # before the draft, which reads packed rows
    InsertDraft(),  # S becomes S + L, unless the prompt is compressed
    GatherPrompt(),  # needs the draft's scores; from here on lengths count the tokens that the target reads
    KeepPrompt(),  # the same for a prompt that fits
    TakeLast(),  # the logits of the last position; needs the sequence axis to be a symbol still
    TakeAhead(),  # the logits behind the lookahead, by the rows that take_last takes
    ResizePrompt(),  # S becomes the constant C (+ L) where the prompt is compressed
    AttendBranches(),  # needs the futures' columns; importance takes its log-sum-exp
    ScoreImportance(),  # needs the lookahead's rows
    AttendSparsely(),  # needs the scores, which importance finds by itself then
    GatherPrune(),  # needs the scores
    ShiftPositions(),  # decode: what generate counts becomes what the target was told
    AttendSlots(),  # decode: the masks die
    SkipPadding(),  # decode: what nobody else reads of a mask
    NoteQueries(),  # decode: needs the packed rows of skip_padding
    Specialize(),  # last: what nobody reads goes
)


def draft_prefill_passes(layers: int, method: Method | None = None) -> tuple[Pass, ...]:
    """Of the prefill of a draft of so many layers, whose rows come packed, as the target's `method` needs it."""
    passes: list[Pass] = [Canonicalize(), Annotate(layers), AttendPacked(), TakeLast()]
    if method is not None and method.sparse_prefill:
        passes.append(AttendDraftSparsely(method.sparse_prefill, method.window))
    if method is not None and method.prompt is not None:
        passes.append(ScoreDraftPrefill(method.prompt))
    return tuple(passes)


def draft_step_passes(layers: int, prompt: SpecPC | None) -> tuple[Pass, ...]:
    """Of a draft's decode step."""
    scoring = () if prompt is None else (ScoreDraftStep(prompt),)
    return (Canonicalize(), Annotate(layers), AttendSlots(), *scoring)


FOLDER = Path(__file__).parent.parent
PARTS = ("graph", "dialect", "rewrite", "passes", "ops", "kernels")  # what decides a rewritten graph and what it calls
SOURCES = tuple(file for part in PARTS for file in sorted((FOLDER / part).rglob("*.py")))


def fingerprint(skip: Iterable[str] = ()) -> str:
    """Hash of the passes, their options and every source that decides a rewritten graph; part of cache keys.

    The operators count: a compiled region calls them by name, and has their fake kernels' shapes built in.
    """
    skipped = frozenset(skip)
    options = [f"{item!r}" for item in PASSES if item.name not in skipped]
    return hashlib.sha256("\n".join([*options, *map(Path.read_text, SOURCES)]).encode()).hexdigest()[:16]
