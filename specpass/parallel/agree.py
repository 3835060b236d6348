"""Processes that share a model compile the same, or all of them raise: what one does alone is a hang of the others."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from specpass.errors import RanksDisagreeError, SpecpassError
from specpass.parallel.shards import Ranks, choosing

Told = dict[str, str]


@contextlib.contextmanager
def agreement(ranks: Ranks | None, call: str = "specpass.compile") -> Iterator[Told]:
    """What is put into the dictionary inside is equal on all ranks afterwards; a mistake of one is an error on all.

    Every rank enters this, and each leaves it with an error if one does. Nothing is asked without ranks.

    Args: call: what every rank called, for messages.

    Raises: RanksDisagreeError: they were told different things, or another rank raised. A mistake of this rank's as
        it is.
    """
    told: Told = {}
    own: SpecpassError | None = None
    try:
        yield told
    except SpecpassError as error:
        if ranks is None:
            raise
        own = error
    if ranks is None:
        return
    answers: list[Any] = [None] * ranks.size
    dist.all_gather_object(answers, (told, None if own is None else f"{type(own).__name__}: {own}"), ranks.group)
    if own is not None:
        raise own
    for rank, (_, failed) in enumerate(answers):
        if failed is not None:
            raise RanksDisagreeError(f"{call} failed on rank {rank} of {ranks.size} ({failed})")
    compare([theirs for theirs, _ in answers], call)


def first_ranks(tensor: Tensor, ranks: Ranks | None) -> Tensor:
    """The first rank's tensor on all of them, which are alike in shape; the tensor itself without ranks."""
    if ranks is None:
        return tensor
    ops = torch.ops._c10d_functional
    found: Tensor = ops.wait_tensor(ops.broadcast(tensor.contiguous(), 0, ranks.name))
    return found


def mean_of_ranks(tensors: Sequence[Tensor], ranks: Ranks | None) -> list[Tensor]:
    """Of tensors alike in shape the means over all ranks, the same bits on each; themselves where each has
    all heads.

    One collective: a sum by the network's own order need not be one number on all ranks.
    """
    ranks = choosing(ranks)
    if ranks is None:
        return list(tensors)
    every = all_of_ranks(torch.stack(list(tensors)), ranks)
    return list(every.mean(0).unbind(0))


def all_of_ranks(tensor: Tensor, ranks: Ranks) -> Tensor:
    """[P, ...] of the ranks' tensors, which are alike in shape."""
    ops = torch.ops._c10d_functional
    joined: Tensor = ops.wait_tensor(ops.all_gather_into_tensor(tensor[None].contiguous(), ranks.size, ranks.name))
    return joined


def compare(answers: list[Told], call: str) -> None:
    """Raises: RanksDisagreeError: rank 0 was told another thing than some other rank."""
    for rank, theirs in enumerate(answers):
        for name, first in answers[0].items():
            if theirs.get(name) != first:
                raise RanksDisagreeError(
                    f"{name} is {theirs.get(name)} on rank {rank} and {first} on rank 0: every process calls {call} "
                    "with the same arguments."
                )


def about_ids(ids: Tensor) -> str:
    """Token ids [P] on the host, by their number and a hash."""
    return f"{len(ids)} tokens ({hashlib.sha256(ids.numpy().tobytes()).hexdigest()[:8]})"


def about(model: nn.Module | None) -> str:
    """A model by what decides its graphs: class, sizes, dtype."""
    if model is None:
        return "none"
    text: Any = model.config.get_text_config(decoder=True)
    sizes = ", ".join(f"{name}={getattr(text, name, None)}" for name in ("num_hidden_layers", "hidden_size"))
    return f"{type(model).__name__}({sizes}, vocab_size={text.vocab_size}, {next(model.parameters()).dtype})"
