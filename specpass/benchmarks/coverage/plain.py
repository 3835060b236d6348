"""What the plain model does: answers to compare with, and what its cache holds of each layer."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from specpass.benchmarks.coverage.answers import Answer, answer, difference, padded, prompt
from specpass.observe.storage import cache_bytes

SHORT, MIDDLE, LONG = 13, 22, 41  # prompts; two fit the budget, one does not
ROWS = (LONG, 29)  # of the padded batch


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer of the plain cache after the long prompt's answer.

    Args:
        kind: "full" where it holds every token, "sliding" where fewer, "state" where it has no keys.
        bytes: of its keys and values. other: of its other tensors, states say.
        heads: K. size: numbers of one head's key and value, D + Dv. window: of a sliding one.
    """

    kind: str
    bytes: int
    other: int = 0
    heads: int = 0
    size: int = 0
    window: int = 0


class UnusableError(Exception):
    """The plain model is nothing to compare with."""


@dataclasses.dataclass(frozen=True)
class Plain:
    """Answers to the prompts, the layers, and whether a padded batch is answered like its rows."""

    answers: dict[int, Answer]
    layers: list[Layer]
    batches: bool

    @classmethod
    def of(cls, model: Any) -> Plain:
        """Raises: UnusableError, and whatever `generate` raises."""
        answers = {length: answer(model, prompt(length)) for length in (SHORT, MIDDLE, LONG, ROWS[1])}
        long = answers[LONG]
        if not all(bool(found.logits.isfinite().all()) for found in answers.values()):
            raise UnusableError("logits that are not finite")
        if not hasattr(long.cache, "layers"):
            raise UnusableError("no KV cache of transformers")
        layers = [_layer(layer, LONG) for layer in long.cache.layers]
        if not any(layer.bytes + layer.other for layer in layers):
            raise UnusableError("it puts nothing into its cache")
        apart = difference(answer(model, prompt(LONG), use_cache=False), long)
        if apart:
            raise UnusableError(f"the cache changes its answer ({apart})")
        both = answer(model, *padded([prompt(length) for length in ROWS]))
        batches = not any(difference(both.row(row), answers[length]) for row, length in enumerate(ROWS))
        return cls(answers, layers, batches)


def _layer(layer: Any, tokens: int) -> Layer:
    total = cache_bytes(_Only(layer))
    keys = getattr(layer, "keys", None)
    if not isinstance(keys, torch.Tensor) or not keys.numel():
        return Layer("state", 0, total)
    kind = "full" if keys.shape[-2] >= tokens else "sliding"
    window = 0 if kind == "full" else layer.sliding_window
    own = keys.untyped_storage().nbytes() + layer.values.untyped_storage().nbytes()
    return Layer(kind, own, total - own, keys.shape[1], keys.shape[-1] + layer.values.shape[-1], window)


class _Only:
    """A cache of one layer."""

    def __init__(self, layer: Any) -> None:
        self.layers = [layer]
