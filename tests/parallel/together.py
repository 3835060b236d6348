"""One of two processes that come after those of ranks.py, decide together, and of which the second one dies at the end.

Started by test_tensor_parallel.py: `python together.py RANK FOLDER`. As ranks.py: a JSON file says what became of each
case.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import HEADS, batch, check_heads, kept, on_rank_0, raises, spread, told
from support import compile_eager
from tiny import prompt, tiny
from torch._dynamo.utils import counters
from two_ranks import run_cases

import specpass
from specpass import errors
from specpass.backend.kept import NOTE
from specpass.methods import base

# The draft samples and the heads of both processes share; the draft chooses the prompt's tokens and proposes.
SHARED = specpass.SpecKV(budget=24, window=8, lookahead=4, temperature=0.8, seed=3, spread="global")
CHOSEN = specpass.SpecKVPC(budget=16, window=4, lookahead=4, prompt_budget=32, prompt_window=8)
AUTO = specpass.SnapKV(budget="auto", window=8, share=0.6)
LADDER = (16, 32, 48, 56)  # of sizes for prompts of 60 tokens
DIED = 7  # exit code of the process that dies


def generated(model: Any, method: Any, ids: torch.Tensor, new: int = 1, **options: Any) -> tuple[Any, Any]:
    """Tokens, and their cache."""
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=new)
    out = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False, **options)
    assert not specpass.report(model).interpreted, specpass.report(model).interpreted
    return out, cache


def behind(model: Any, method: Any, new: int = 1) -> tuple[Any, Any]:
    """The same behind a document."""
    return generated(model, method, prompt(11, seed=1), new, prefix=specpass.read(model, prompt(60)))


def talked(model: Any, method: Any, new: int) -> list[tuple[Any, Any]]:
    """Two turns that hold what they drop."""
    found, ids = [], prompt(60, seed=4)
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=24, dropped="host")
    for turn in range(2):
        ids = model.generate(ids, past_key_values=cache, max_new_tokens=new, do_sample=False)
        found.append((ids, copy.deepcopy(cache)))
        ids = torch.cat([ids, prompt(7, seed=turn)], 1)
    return found


def check(whole: Any, parts: Any, draft: Any, method: Any, answers: Callable[[Any], Iterable[tuple[Any, ...]]]) -> None:
    """What one process answers and keeps, both do, with the draft of the first one.

    Args: answers: of a model tokens, positions and further numbers.
    """
    compile_eager(parts, method, draft)
    every = on_rank_0(lambda: list(answers(compile_eager(whole, method, draft))))
    for mine, due in zip(answers(parts), every, strict=True):
        assert mine[0] == due[0]
        check_heads(mine[1], due[1])
        assert mine[2:] == pytest.approx(due[2:], abs=1e-5)


def from_each(mine: Any) -> list[Any]:
    """What each process says."""
    found: list[Any] = [None, None]
    dist.all_gather_object(found, mine)
    return found


def count(cache: Any) -> list[int]:
    """Slots of each layer that are in use."""
    return [sum(len(head) for row in layer for head in row) for layer in kept(cache)]


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    whole, parts = spread("llama", folder)
    rank = dist.get_rank()
    own = tiny("llama", layers=1, seed=7 + rank)  # another draft in each process: the first one's counts
    disagree = errors.RanksDisagreeError

    def found_again() -> None:
        """Each process finds the graphs of the one before it, and traces none."""
        counters.clear()
        specpass.compile(parts, draft=own, method=HEADS)
        ids, mask = batch()
        found = told(*generated(parts, HEADS, ids, 5, attention_mask=mask))
        assert list(found) == json.loads((folder.parent / "first" / f"inductor{rank}.json").read_text())
        notes = [graph.notes for graph in specpass.report(parts).graphs]
        assert len(notes) == 2
        assert all(NOTE in each for each in notes), notes
        assert not counters["stats"]["unique_graphs"]

    yield "kept graphs", found_again

    def heads() -> None:
        """All layers of a process have the slots of the one that keeps most."""
        method, caches = specpass.SnapKV(budget=24, window=8, spread="heads"), []

        def answers(model: Any) -> Iterator[tuple[Any, ...]]:
            for out, cache in (behind(model, method), *talked(model, method, 1)):
                caches.append(cache)
                yield told(out, cache)

        check(*spread("llama", folder, layers=2), None, method, answers)
        cache = caches[-1]
        assert count(cache) != [24, 24], "or nothing was shared"
        for layer in cache.layers:
            assert layer.kept_positions.shape[1] == max(count(cache))
            assert layer.key_buffer.shape[1] == max(count(cache)) + layer.room

    yield "heads of a layer share", heads

    def shared() -> None:
        """In a prompt's graph, behind a document and in turns that are held; no slot is kept for nothing."""
        caches: list[Any] = []

        def answers(model: Any) -> Iterator[tuple[Any, ...]]:
            runs = generated(model, SHARED, prompt(60), 9), behind(model, SHARED, 3), *talked(model, SHARED, 4)
            for out, cache in runs:
                caches.append(cache)
                yield told(out, cache)

        check(whole, parts, own, SHARED, answers)
        for cache in caches[-4:]:
            (kept,) = count(cache)
            assert from_each(kept) != [24, 24], "or nothing was shared"
            first = cache.layers[0]
            assert first.kept_positions.shape[1] == kept
            assert first.key_buffer.shape[1] == kept + first.room

    yield "heads of all processes share", shared

    def chosen() -> None:
        """By the attention that all heads keep, in a prompt's graph and behind a document."""
        both = torch.cat([prompt(60), prompt(11, seed=1)], 1)

        def answers(model: Any) -> Iterator[tuple[Any, ...]]:
            for graph in (False, True):  # one process keeps the same either way (tests/backend/test_prefix.py)
                out, cache = generated(model, AUTO, both) if graph and model is parts else behind(model, AUTO)
                assert cache.kept.budget in LADDER[1:-1]
                numbers = cache.kept.budget, *cache.kept.layers, *cache.layers[0].shares.tolist()
                yield *told(out[:, -1:], cache), *numbers

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(base, "LADDER", LADDER)
            check(whole, parts, None, AUTO, answers)

    yield "a budget that is chosen", chosen

    def mistakes() -> None:
        method = specpass.SnapKV(budget=24, window=8)
        mine, other = (specpass.read(compile_eager(each, method), prompt(60)) for each in (parts, whole))
        raises(disagree, "the document is", "specpass.read")(lambda: specpass.read(parts, prompt(60 + rank)))

        def ask(prefix: Any) -> Callable[[], Any]:
            return lambda: generated(parts, method, prompt(11), prefix=prefix)

        raises(errors.PrefixModelError, "other weights")(ask(other))
        alone = (disagree, "generate", "rank 1", "PrefixModelError") if rank == 0 else (errors.PrefixModelError,)
        raises(*alone)(ask(mine if rank == 0 else other))
        generated(parts, method, prompt(11), prefix=mine)

    yield "prefixes that differ", mistakes

    def first() -> None:
        tokens, cache = generated(compile_eager(parts, CHOSEN, own, speculate=3), CHOSEN, prompt(60), 9)
        found = from_each((tokens.tolist(), cache.prompt_positions.tolist(), cache.lookahead_ids.tolist()))
        assert found[0] == found[1]
        assert specpass.report(parts).proposed

    yield "the first draft counts", first

    class Dying(transformers.LogitsProcessor):
        def __call__(self, ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            if rank == 1 and ids.shape[1] == 66:
                os._exit(DIED)
            return scores

    def dying() -> None:
        start = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)gloo|connection"):
            parts.generate(prompt(60), max_new_tokens=9, logits_processor=[Dying()])
        assert time.monotonic() - start < 30

    yield "a process that dies", dying


def main(rank: int, folder: Path) -> None:
    run_cases(rank, folder, cases)
    os._exit(0)  # a group that has lost a process cannot be left


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
