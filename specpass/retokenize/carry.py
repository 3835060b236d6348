"""Scores of one tokenizer's tokens become scores of another's, by the characters that they spell.

A token's score is the highest of the tokens whose spans overlap with its own. What a tokenizer puts in front of every
text (BOS) spells nothing: where both do, these stand for each other; a draft's alone counts for the first token that
spells something, and so do other tokens of the target's that spell nothing for the next that does. Where nothing
overlaps, the score is 0, the lowest. With one tokenizer on both sides every token keeps its own score.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from specpass.retokenize.spans import Span

LEAST = 1e-6  # of a character; what overlaps by less is rounding


@dataclasses.dataclass(frozen=True)
class Pairs:
    """Which tokens overlap: ours[i] with theirs[i]. `count`: how many of ours there are."""

    ours: list[int]
    theirs: list[int]
    count: int

    def carry(self, scores: Tensor) -> Tensor:
        """[count] of scores >= 0 [n] of their tokens."""
        index = torch.tensor([self.ours, self.theirs], dtype=torch.int64, device=scores.device)
        return scores.new_zeros(self.count).scatter_reduce(0, index[0], scores[index[1]], "amax")


def paired(ours: Sequence[Span], theirs: Sequence[Span], our_front: int = 0, their_front: int = 0) -> Pairs:
    """Args: ours, theirs: spans, in order. our_front, their_front: so many first ones stand in front of the text."""
    both = [(i, j) for i in range(our_front) for j in range(their_front)]
    spelled = [i for i in range(our_front, len(ours)) if ours[i][1] > ours[i][0]]
    if their_front and not our_front and spelled:
        both += [(spelled[0], j) for j in range(their_front)]
    found: dict[int, list[int]] = {}
    for i, j in both + overlapping(ours, theirs, our_front, their_front):
        found.setdefault(i, []).append(j)
    behind: list[int] = []  # what the next token that spells something has
    for i in reversed(range(len(ours))):
        if ours[i][1] > ours[i][0] and i >= our_front:
            behind = found.get(i, [])
        elif i not in found:
            found[i] = behind
    return Pairs([i for i in found for _ in found[i]], [j for js in found.values() for j in js], len(ours))


def overlapping(ours: Sequence[Span], theirs: Sequence[Span], i: int, j: int) -> list[tuple[int, int]]:
    """Pairs of overlapping spans from ours[i] and theirs[j] on; both are in order."""
    pairs = []
    while i < len(ours) and j < len(theirs):
        if min(ours[i][1], theirs[j][1]) - max(ours[i][0], theirs[j][0]) > LEAST:
            pairs.append((i, j))
        if theirs[j][1] <= ours[i][1] + LEAST:
            j += 1
        else:
            i += 1
    return pairs
