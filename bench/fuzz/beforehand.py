"""A document that a case reads beforehand (`specpass.read`): where it lies; questions leave it as it was."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

import specpass
from bench.fuzz.cases import Case
from bench.fuzz.prompts import WrongError
from bench.fuzz.subject import Subject
from specpass.benchmarks.coverage.tiny import VOCAB


@contextlib.contextmanager
def read_beforehand(case: Case, subject: Subject, dice: torch.Generator) -> Iterator[specpass.Prefix | None]:
    """The case's document, which the compiled model has read; None: it reads none.

    Raises: WrongError: what is loaded, or what questions leave, is not what was read.
    """
    if case.prefix is None:
        yield None
        return
    place, tokens = case.prefix
    ids = torch.randint(1, VOCAB, (tokens,), generator=dice)
    prefix = specpass.read(subject.model, ids, device="cpu" if place == "cpu" else None)
    before = bits(prefix)
    if not torch.equal(prefix.ids, ids):
        raise WrongError(f"the prefix holds {prefix.ids.tolist()}, read was {ids.tolist()}")
    with tempfile.TemporaryDirectory() as folder:
        if place == "file":
            path, key = Path(folder) / "document.prefix", prefix.key
            prefix.save(path)
            prefix = specpass.Prefix.load(path)
            if prefix.key != key or bits(prefix) != before:
                raise WrongError("a prefix that was saved and loaded is another")
        yield prefix
        if bits(prefix) != before:
            raise WrongError("questions have changed the prefix")


def bits(prefix: specpass.Prefix) -> list[bytes]:
    """Of its tokens, keys and values, in order."""
    tensors = [prefix.ids, *(states for pair in prefix.pairs for states in pair)]
    return [tensor.detach().cpu().contiguous().numpy().tobytes() for tensor in tensors]
