"""Bounded answers (generated=): what each row sees behind evictions, and whether what went may have gone.

Formulas are written from R-KV (arXiv 2505.24133, section 3.2, and its published code) and TriAttention (arXiv
2604.04921, and its published code); nothing of specpass is imported.
Symbols: B rows, K KV heads, T columns, W newest tokens, F pairs of dimensions that a rotary embedding turns.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.nn.functional as F
from torch import Tensor

MIX, POOL = 0.1, 7  # lambda, and neighbours whose largest importance counts
TIE = 1e-5
TIES = {"triattention": 1e-3}  # angles of 65,536 radians, in float32


@dataclasses.dataclass
class Event:
    """One eviction of one layer.

    Args:
        layer: its number. time: columns behind the prompt that were written before it.
        first [B, K, C]: the prompt's positions before; positions [B, K, C], numbers [B, K, M]: of the prompt and of the
        answer, that stay; -1 unused.
        most: slots that stay at most, of those to choose among.
    """

    layer: int
    time: int
    first: Tensor
    positions: Tensor
    numbers: Tensor
    most: int

    def held(self, row: int, head: int, start: int, answer: list[int]) -> tuple[list[int], list[int]]:
        """Columns of the prompt's and of the answer's slots right behind it.

        Args: start: the first column of the row's prompt; answer: the columns of its tokens behind it.
        """
        own, numbers = self.positions[row, head], self.numbers[row, head]
        return (own[own >= 0] + start).tolist(), [
            answer[number] for number in numbers[numbers >= 0].tolist() if number < len(answer)
        ]


def shown(events: list[Event], prompt: int, starts: list[int], answers: list[list[int]], seen: Tensor) -> Tensor:
    """[B, K, T, T]: which columns a row sees, of `seen` [B, K, T], which rows see before anything was evicted.

    Args: events: of one layer, in order; prompt: its columns; starts, answers: see Event.held, of each row.
    """
    tokens = seen.shape[2]
    out = seen[:, :, None].expand(-1, -1, tokens, -1).clone()
    for event in events:
        first = prompt + event.time
        for row, answer in enumerate(answers):
            for head in range(seen.shape[1]):
                own = torch.zeros(tokens, dtype=torch.bool)
                own[first:] = True
                for columns in event.held(row, head, starts[row], answer):
                    own[[column for column in columns if column < tokens]] = True
                out[row, head, first:] = own
    return out


def newest(slots: int) -> int:
    """W, which no eviction takes, of so many slots."""
    return min(32, slots // 4)


def noted(policy: str, slots: int) -> int:
    """Newest queries that a policy scores with, of so many slots."""
    window = newest(slots)
    return min(4 * window, slots) if policy == "triattention" else window


def scores(policy: str, keys: Tensor, queries: Tensor, window: int, omega: Tensor) -> Tensor | None:
    """[n] of slots' keys [n + W, D], the newest W of which stay anyway; queries [G, noted, D] with the scale in them.

    Args: omega: [F] by which a layer's first F dimensions turn with the F behind them.

    None where any choice is right, or where the order is looked at instead.
    """
    if policy in ("random", "recent", "lookahead"):  # a draft's tokens are not among those that the oracle read
        return None
    count = len(keys) - window
    if policy == "triattention":
        return expected(keys[:count].double(), queries.double(), omega.double())
    logits = queries @ keys[:count].T  # [G, W, n]
    if policy == "attention":
        return logits.softmax(-1).mean(1).amax(0)
    mean = logits.amax(0).softmax(-1).mean(0)
    important = torch.stack([mean[max(0, at - POOL // 2) : at + POOL // 2 + 1].max() for at in range(count)])
    unit = F.normalize(keys, dim=-1)
    alike = (unit @ unit.T).fill_diagonal_(0.0).mean(1).softmax(0)[:count]
    return -alike if policy == "redundant" else MIX * important - (1 - MIX) * alike


def turned(states: Tensor, angles: Tensor) -> Tensor:
    """States [..., D], whose first F dimensions turn with the F behind them by angles [..., F]."""
    pairs = angles.shape[-1]
    first, second, rest = states[..., :pairs], states[..., pairs : 2 * pairs], states[..., 2 * pairs :]
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], -1)


def expected(keys: Tensor, queries: Tensor, omega: Tensor) -> Tensor:
    """[n] of keys [n, D]: the mean query's logits, turned to 1, 2, 4, ... positions behind the next token's, and what
    lengths say where queries [G, W, D] lie apart."""
    pairs, behind = len(omega), torch.arange(queries.shape[1], 0, -1)
    alike = turned(queries, behind[:, None] * omega)  # as if all stood where the next token will
    far = torch.stack([turned(alike.mean(1), 2**power * omega) for power in range(17)])

    def lengths(states: Tensor) -> Tensor:
        return states[..., : 2 * pairs].unflatten(-1, (2, pairs)).norm(dim=-2)

    apart = lengths(alike).mean(1) - lengths(alike.mean(1))
    score = (far @ keys.T).mean(0) + apart @ lengths(keys).T
    return ((score - score.mean(1, keepdim=True)) / score.std(1, correction=0, keepdim=True).clamp(min=1e-6)).amax(0)


def why_not_least(
    policy: str, before: list[int], after: list[int], most: int, window: int, worth: Tensor | None
) -> str:
    """What is wrong with an eviction of columns `before` to `after`; "" where nothing is.

    Args: most: that stay; window: newest that do; worth [n] of the others, see `scores`.
    """
    if len(after) != min(len(before), most):
        return f"{len(after)} of {len(before)} slots stay, due are {most}"
    left = set(after)
    if not left <= set(before) or not set(before[-window:]) <= left:
        return f"{after} stay of {before}, and the newest {window} are due"
    if policy == "recent" and after != before[len(before) - len(after) :]:
        return f"{after} stay of {before}"
    gone = [place for place, column in enumerate(before[:-window]) if column not in left]
    stay = [place for place, column in enumerate(before[:-window]) if column in left]
    if worth is not None and gone and stay and worth[gone].max() > worth[stay].min() + TIES.get(policy, TIE):
        return f"an evicted slot scores {float(worth[gone].max()):.7f}, more than one that stays"
    return ""
