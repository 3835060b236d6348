"""One family's checks: exactness at C >= S, what is pruned and why not the rest, SpecPC, batches, bytes."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from typing import Any

import specpass
from specpass.benchmarks.coverage.answers import NEW, answer, difference, padded, prompt
from specpass.benchmarks.coverage.plain import LONG, MIDDLE, ROWS, SHORT, Layer, Plain, UnusableError
from specpass.benchmarks.coverage.tiny import TooLargeError, tiny_model
from specpass.cache.layer import round_room
from specpass.errors import SpecpassError, UnsupportedCallError
from specpass.observe.storage import cache_bytes

C, W, L = 24, 8, 4
KEEP = specpass.SpecKV(budget=C, window=W, lookahead=L)
READ = specpass.SpecPC(budget=C, window=W, kernel=5, neighbours=3)
TOLERANCE = 0.05  # of the bytes that the formula says

Record = dict[str, Any]


def probe(family: str) -> Record:
    """What there is to say of a family. `faults` are checks that failed: name -> what came instead."""
    try:
        model = tiny_model(family)
        plain = Plain.of(model)
    except UnusableError as error:
        return {"family": family, "verdict": "plain", "reasons": [str(error)]}
    except TooLargeError as error:
        return {"family": family, "verdict": "not built", "reasons": [str(error)]}
    except Exception as error:  # of transformers: nothing of ours has run
        return {"family": family, "verdict": "not built", "reasons": [_words(error)]}
    return Probe(family, model, plain).run()


class Probe:
    """The checks of one family; each notes in `record` what it found, and in its `faults` what is wrong."""

    def __init__(self, family: str, model: Any, plain: Plain) -> None:
        self.model, self.plain = model, plain
        kinds = [layer.kind for layer in plain.layers]
        self.record: Record = {
            "family": family,
            "layers": {kind: kinds.count(kind) for kind in ("full", "sliding", "state") if kind in kinds},
            "pruned": 0,
            "reasons": [],
            "faults": {},
        }

    def run(self) -> Record:
        draft = tiny_model("llama", seed=1)
        specpass.compile(self.model, draft=draft, method=KEEP, lowering="eager")
        for check in (self.exact, self.gathered, self.pruned, self.batch):
            self._try(check)
        report = specpass.report(self.model)
        self.record |= {"reasons": reasons(report), "interpreted": report.interpreted}
        specpass.restore(self.model)
        self._try(self.specpc)
        self.record["verdict"] = verdict(self.record)
        return self.record

    def _try(self, check: Callable[[], str]) -> None:
        try:
            found = check()
        except Exception as error:
            kind = "error" if isinstance(error, SpecpassError) else "traceback"
            found = f"{kind}: {_words(error)}"
        if found:
            self.record["faults"][check.__name__] = found

    def exact(self) -> str:
        """Prompts that fit the budget are answered as by the plain model."""
        for length in (SHORT, MIDDLE):
            if apart := difference(answer(self.model, prompt(length)), self.plain.answers[length]):
                return f"{length} tokens: {apart}"
        return ""

    def gathered(self) -> str:
        """So is one that is drafted, scored and gathered all the same: nothing of the lookahead stays."""
        try:
            cache = specpass.BudgetCache(self.model.config, KEEP, max_new_tokens=NEW, early_exit=False)
        except UnsupportedCallError:  # no layer of it can be pruned, as the report says
            return ""
        return difference(answer(self.model, prompt(MIDDLE), past_key_values=cache), self.plain.answers[MIDDLE])

    def pruned(self) -> str:
        """The long prompt: which layers keep C slots, and the bytes of the cache."""
        found = answer(self.model, prompt(LONG))
        pairs = list(zip(self.plain.layers, found.cache.layers, strict=True))
        for theirs, ours in pairs:
            if theirs.kind == "full" and window_of(ours):  # by its mask; the plain cache holds everything all the same
                self._count("full", -1)
                self._count("sliding", 1)
        self.record["pruned"] = pruned = sum(theirs.kind == "full" and is_pruned(ours) for theirs, ours in pairs)
        ours, due = cache_bytes(found.cache), sum(bytes_due(*pair) for pair in pairs) + 8 * L
        if not isinstance(found.cache, specpass.BudgetCache):  # the model's own kind
            due = cache_bytes(self.plain.answers[LONG].cache)
        self.record["bytes"] = {"cache": ours, "formula": due}
        if not found.logits.isfinite().all():
            return "logits that are not finite"
        if not pruned and (apart := difference(found, self.plain.answers[LONG])):
            return f"nothing is pruned, and {apart}"
        return "" if abs(ours - due) <= TOLERANCE * due else f"{ours:,} bytes where {due:,} are due"

    def _count(self, kind: str, by: int) -> None:
        self.record["layers"][kind] = self.record["layers"].get(kind, 0) + by

    def batch(self) -> str:
        """A padded batch of prompts that are pruned is answered like its rows alone."""
        both = answer(self.model, *padded([prompt(length) for length in ROWS]))
        for row, length in enumerate(ROWS):
            if apart := difference(both.row(row), answer(self.model, prompt(length))):
                self.record["batch"] = "no" if self.plain.batches else "as plain"
                return apart if self.plain.batches else ""
        self.record["batch"] = "yes"
        return ""

    def specpc(self) -> str:
        """SpecPC's answer is the plain model's to the tokens that were read."""
        for name, draft in (("own", self.model), ("llama", tiny_model("llama", seed=1))):
            specpass.compile(self.model, draft=draft, method=READ, lowering="eager")
            try:
                found = answer(self.model, prompt(LONG))
                report = specpass.report(self.model)
            finally:
                specpass.restore(self.model)
            read = getattr(found.cache, "prompt_positions", None)
            why = reasons(report)
            if read is not None and read.shape[1] == C:
                self.record["specpc"] = name
                return difference(found, answer(self.model, prompt(LONG)[:, read[0]]))
            self.record["specpc"] = "; ".join(why)
            if not any(reason.startswith("the draft cannot be captured") for reason in why):
                break
        return difference(found, self.plain.answers[LONG])


def is_pruned(layer: Any) -> bool:
    """Whether a layer of our cache holds C positions of a prompt of more."""
    positions = getattr(layer, "positions", None)
    return positions is not None and int((positions >= 0).sum(-1).max()) == C


def window_of(layer: Any) -> int:
    """Positions that a layer's attention reads by its mask; 0 where it reads all."""
    found = getattr(layer, "found", None)
    return 0 if found is None else found.positions


def bytes_due(theirs: Layer, ours: Any) -> int:
    """Bytes of a layer of our cache: float32 K/V in its slots, int64 positions and lengths.

    C + N slots where it is pruned, V + N where it slides, S + N where everything fits; a slot for each token, and no
    room, where it is exact. A layer that is no BudgetLayer holds what the plain cache holds.
    """
    if getattr(ours, "positions", None) is None:
        return theirs.bytes + theirs.other
    exact = ours.exact or ours.cache.exact
    kept = C if is_pruned(ours) else LONG if exact else theirs.window or window_of(ours) or LONG
    slots = kept + (NEW - 1 if exact else round_room(NEW))
    return 4 * theirs.heads * slots * theirs.size + theirs.other + 8 * theirs.heads * (kept + 1)


def reasons(report: Any) -> list[str]:
    """Why layers, or the whole model, run exactly."""
    found = list(report.refusals)
    for read in (*report.graphs, *report.prompts):
        found += [site.exact for site in read.sites if site.exact]
    return sorted(set(found))


def verdict(record: Record) -> str:
    """One word: "wrong" and "traceback" are faults; "pruned" means every layer that reads the whole prompt."""
    faults = record["faults"].values()
    if any(text.startswith("traceback") for text in faults):
        return "traceback"
    if any(text.startswith("error") for text in faults):
        return "error"
    if faults:
        return "wrong"
    full = record["layers"].get("full", 0)
    if not full:
        return "nothing to prune"
    return "pruned" if record["pruned"] == full else "in part" if record["pruned"] else "exact"


def _words(error: BaseException) -> str:
    """An error in one line, with the line of code that raised it, so that the same fault reads the same."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{frame.filename.rsplit('/', 1)[-1]}, {frame.name}"
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]} ({place})"
