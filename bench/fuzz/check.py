"""Whether one case is right: its calls, on a cache that was found and behind a document, where it has such."""

from __future__ import annotations

from typing import Any

import torch

from bench.fuzz.beforehand import read_beforehand
from bench.fuzz.cases import Case
from bench.fuzz.particles import Particles
from bench.fuzz.play import Play
from bench.fuzz.subject import Subject
from specpass.benchmarks.coverage.tiny import VOCAB


def check(case: Case, subject: Subject) -> str:
    """ "" where all is well, "tie" where an answer goes another way behind equal logits.

    A document that was read beforehand gets two questions, of which the second finds it as it was.

    Raises: WrongError, and whatever the compiled model raises.
    """
    dice = torch.Generator().manual_seed(case.index)
    played = Play if case.resampled is None else Particles
    with read_beforehand(case, subject, dice) as prefix:
        found = played(case, subject, dice, prefix).run()
        if case.reset or prefix is not None:
            cache = found_cache(subject, case) if case.reset else None
            found = found or played(case, subject, dice, prefix, cache).run()
    return found


def found_cache(subject: Subject, case: Case) -> Any:
    """A cache that has read another prompt and was reset."""
    cache = subject.cache(case)
    ids = torch.randint(1, VOCAB, (len(case.lengths), 33), generator=torch.Generator().manual_seed(1))
    subject.model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=2)
    cache.reset()
    return cache
