"""The next token from logits, in numpy: greedy or sampled, as transformers' generate does it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from specpass.errors import SamplingError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Args:
        temperature: 0.0 takes the likeliest token (the lower id where two tie); above, sample.
        top_k: sample among so many tokens; 0 is all. top_p: among the likeliest that hold this much probability.
        repetition_penalty: scores of tokens that were read or written are divided (or multiplied) by it.
        seed: of the draws.

    Raises: SamplingError
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0.0:
            raise SamplingError(f"temperature={self.temperature}: expected 0.0 (greedy) or more.")
        if self.top_k < 0:
            raise SamplingError(f"top_k={self.top_k}: expected 0 (all) or a number of tokens.")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"top_p={self.top_p}: expected more than 0, at most 1.")
        if not self.repetition_penalty > 0.0:
            raise SamplingError(f"repetition_penalty={self.repetition_penalty}: expected more than 0; 1.0 is none.")


class Sampler:
    """Draws one token a row and call."""

    def __init__(self, how: Sampling) -> None:
        self.how = how
        self.random = np.random.default_rng(how.seed)

    def __call__(self, logits: np.ndarray, seen: Sequence[Sequence[int]]) -> np.ndarray:
        """Ids [B] int64 from logits [B, V]; `seen` holds each row's tokens so far."""
        how = self.how
        scores = logits.astype(np.float32)
        if how.repetition_penalty != 1.0:
            for row, tokens in zip(scores, seen, strict=True):
                ids = np.unique(np.asarray(tokens, dtype=np.int64))
                old = row[ids]
                row[ids] = np.where(old < 0, old * how.repetition_penalty, old / how.repetition_penalty)
        if how.temperature == 0.0:
            return scores.argmax(-1)
        return np.array([self._draw(row.astype(np.float64) / how.temperature) for row in scores], dtype=np.int64)

    def _draw(self, row: np.ndarray) -> int:
        how = self.how
        order = np.argsort(-row, kind="stable")
        if how.top_k:
            order = order[: how.top_k]
        weights = np.exp(row[order] - row[order[0]])
        weights /= weights.sum()
        if how.top_p < 1.0:  # the token that crosses top_p is the last one in
            order = order[: int((np.cumsum(weights) < how.top_p).sum()) + 1]
            weights = weights[: len(order)] / weights[: len(order)].sum()
        return int(self.random.choice(order, p=weights))
