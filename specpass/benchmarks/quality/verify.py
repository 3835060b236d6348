"""Check a quality file from its seeds: the same prompts, the same scores, the same summary."""

from __future__ import annotations

import math
import platform
from pathlib import Path
from typing import Any

from specpass.benchmarks.models import label, load_tokenizer
from specpass.benchmarks.pace import Pace
from specpass.benchmarks.quality.summary import summarise
from specpass.benchmarks.results import read_results
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.benchmarks.tasks.table import TASKS
from specpass.errors import BenchmarkError, VerificationError
from specpass.hub import at_revision

TOLERANCE = 1e-6
FIELDS = ("task", "length", "seed", "digest", "expected", "answer", "tokens", "score")


def verify(path: Path, target: str | None = None, revision: str | None = None) -> int:
    """The number of records found right.

    Args:
        target: model name or folder whose tokenizer wrote the prompts; None: the file's own.
        revision: of a model on the hub, where the name has none.

    Raises: BenchmarkError: no quality file, or another tokenizer. VerificationError: what differs.
    """
    document = read_results(path)
    records, named = document["results"], document["settings"].get("target")
    if document["settings"].get("kind") != "quality" or not records:
        raise BenchmarkError(f"{path} holds no answers to verify: name a file that `specpass bench quality` wrote.")
    asked = target or named
    at = at_revision(asked, revision)
    if named not in (label(asked), label(at)):
        raise BenchmarkError(f"{path} was made with --target {named}, not {label(at)}: its tokenizer is needed.")
    tokenizer = load_tokenizer(at)
    made = _Prompts(tokenizer, {_key(record) for record in records})
    wrong = [fault for record in records for fault in _faults(record, made)]
    if not wrong and document.get("summary") != summarise(records):
        wrong = ["the summary is not that of the records"]
    if wrong:
        written, here = document.get("versions", {}).get("python"), platform.python_version()
        why = "" if written == here else f" Prompts quote Python's own texts: made with {written}, here is {here}."
        raise VerificationError(
            f"{path}: {len(wrong)} faults, first: {wrong[0]}.{why} Restore the file, or run "
            "`specpass bench quality --restart` to make it anew."
        )
    return len(records)


def _key(record: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in ("task", "length", "seed"))


class _Prompts:
    """The prompts of a file's keys, each made once, with progress."""

    def __init__(self, tokenizer: Any, keys: set[tuple[Any, ...]]) -> None:
        self.tokenizer, self.made = tokenizer, dict[tuple[Any, ...], Prompt]()
        self.pace = Pace(len(keys), math.inf)

    def __getitem__(self, key: tuple[Any, ...]) -> Prompt:
        if key not in self.made:
            task, length, seed = key
            self.made[key] = TASKS[task].prompt(seed, length, self.tokenizer)
            self.pace.step(1, f"{task} {length} seed {seed}")
        return self.made[key]


def _faults(record: dict[str, Any], prompts: _Prompts) -> list[str]:
    """What is wrong with a record, as texts."""
    missing = [name for name in FIELDS if name not in record]
    if missing or record["task"] not in TASKS:
        return [f"a record without {', '.join(missing) or 'a known task'}"]
    task, prompt = TASKS[record["task"]], prompts[_key(record)]
    name = f"{record.get('method')} {record['task']} {record['length']} seed {record['seed']}"
    found = []
    if record["digest"] != prompt.digest or record["expected"] != list(prompt.expected):
        found.append(f"{name}: the prompt is not what its seed gives")
    if record["answer"] != prompts.tokenizer.decode(record["tokens"], skip_special_tokens=True):
        found.append(f"{name}: the answer is not its tokens' text")
    score = task.score(record["answer"], prompt.expected)
    if abs(score - record["score"]) > TOLERANCE:
        found.append(f"{name}: the score is {record['score']}, the answer's is {score}")
    return found
