"""One of two processes whose heads or drafts decide together, and of which the second one dies at the end.

Started by test_together.py: `python together.py RANK FOLDER`. As ranks.py: a JSON file says what became of each case.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from support import compile_eager
from tiny import prompt, tiny
from transformers.distributed import DistributedConfig
from two_ranks import run_cases

import specpass

# The draft samples and the heads of both processes share; the draft chooses the prompt's tokens and proposes.
SHARED = specpass.SpecKV(budget=24, window=8, lookahead=4, temperature=0.8, seed=3, spread="global")
CHOSEN = specpass.SpecKVPC(budget=16, window=4, lookahead=4, prompt_budget=32, prompt_window=8)
DIED = 7  # exit code of the process that dies


def spread(folder: Path) -> tuple[Any, Any]:
    """(a model of one process, the same one spread over both)."""
    whole = tiny("llama", layers=1)
    if dist.get_rank() == 0:
        whole.save_pretrained(folder / "model")
    dist.barrier()
    plan = DistributedConfig(tp_plan="auto", tp_size=2)
    parts = type(whole).from_pretrained(folder / "model", distributed_config=plan, dtype=torch.float32)
    return whole, parts.eval()


def answer(model: Any, method: Any, draft: Any) -> tuple[list[int], Any]:
    """Tokens, and their cache."""
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=9)
    out = model.generate(prompt(60), past_key_values=cache, max_new_tokens=9, do_sample=False)
    assert not specpass.report(model).interpreted, specpass.report(model).interpreted
    return out[0].tolist(), cache


def kept(cache: Any) -> list[list[list[int]]]:
    """Of each layer and KV head the positions in use."""
    layers = [layer.positions[0].tolist() for layer in cache.layers]
    return [[[at for at in head if at >= 0] for head in layer] for layer in layers]


def from_each(mine: Any) -> list[Any]:
    """What each process says."""
    found: list[Any] = [None, None]
    dist.all_gather_object(found, mine)
    return found


def cases(folder: Path) -> Iterator[tuple[str, Callable[[], Any]]]:
    whole, parts = spread(folder)
    rank = dist.get_rank()
    own = tiny("llama", layers=1, seed=7 + rank)  # another draft in each process: the first one's counts

    def shared() -> None:
        """Tokens and positions are those of one process with the first draft, and no slot is kept for nothing."""
        alone = None
        if rank == 0:
            tokens, cache = answer(compile_eager(whole, SHARED, own), SHARED, own)
            alone = tokens, kept(cache)
        expected, positions = from_each(alone)[0]
        tokens, cache = answer(compile_eager(parts, SHARED, own), SHARED, own)
        assert tokens == expected
        both = from_each(kept(cache))
        assert [first + second for first, second in zip(*both, strict=True)] == positions
        counts = [sum(len(head) for layer in each for head in layer) for each in both]
        assert counts[0] != counts[1], "or nothing was shared"
        first, heads = cache.layers[0], sum(layer.kv_heads for layer in cache.layers)
        assert first.kept_positions.shape[1] == -(-counts[rank] // heads) * heads
        assert first.key_buffer.shape[1] == first.kept_positions.shape[1] + heads * first.room

    yield "heads of all processes share", shared

    def first() -> None:
        tokens, cache = answer(compile_eager(parts, CHOSEN, own, speculate=3), CHOSEN, own)
        found = from_each((tokens, cache.prompt_positions.tolist(), cache.lookahead_ids.tolist()))
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
