"""What may be kept: scores and choices by the field's formulas, in plain torch, and whether a choice is a top one.

Written from the papers, apart from specpass: "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373), SnapKV
(2404.14469), StreamingLLM (2309.17453), and what each formula names. One row, no padding.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TIE = 1e-6
FLOOR = 0.2  # of its even share that a head keeps at least where several share


def head_scores(weights: Tensor, values: Tensor, length: int, how: dict) -> tuple[Tensor, Tensor]:
    """Probabilities [H, W + L, T], values [K, T, Dv] -> pooled scores [K, S - W], and how far rounding may move them.

    By `how` attention counts as it is, or times the value's norm (arXiv 2406.12335), or as how far a row's output moves
    where a column goes and the others share its attention (ReST-KV, arXiv 2605.08840).
    """
    rows = weights.unflatten(0, (len(values), -1)).flatten(1, 2).double()  # [K, G (W + L), T]
    near, norms = torch.full_like(rows, TIE), values.double().norm(dim=-1)[:, None]
    if how["reconstruction"]:
        rows, near = moves(rows, values.double())
    elif how["value_norms"]:
        rows, near = rows * norms, near * norms
    end = length - how["window"]
    return _pooled(rows[..., :end], how), _pooled(near[..., :end], how)


def moves(weights: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Of [K, M, T] and [K, T, Dv] how far each output moves without a column [K, M, T], and what float32 may say else:
    it has the distance of a value from an output by squares, which cancel where they are near."""
    out = weights @ values
    rest = (1 - weights).clamp(min=TIE)
    without = (out[:, :, None] - weights[..., None] * values[:, None]) / rest[..., None]
    moved = (out[:, :, None] - without).norm(dim=-1)
    squares = values.square().sum(-1)[:, None] + out.square().sum(-1, keepdim=True)
    share = weights / rest
    far, off = moved / share.clamp(min=1e-12), TIE * squares
    blurred = share * torch.minimum(off.sqrt(), off / far.clamp(min=1e-12))
    return moved, blurred + moved * TIE / rest + TIE


def _pooled(rows: Tensor, how: dict) -> Tensor:
    """[K, M, S - W] -> [K, S - W]."""
    reduced = rows.max(1).values if how["reduce"] == "max" else rows.mean(1)
    pad = how["kernel"] // 2
    padded = F.pad(reduced, (pad, pad), value=0.0)
    return F.max_pool1d(padded, how["kernel"], 1) if how["pool"] == "max" else F.avg_pool1d(padded, how["kernel"], 1)


def looked_up(tokens: list[int], length: int) -> list[int]:
    """What the prompt's own `tokens` say comes next, `length` tokens: copied from behind the latest place where the
    most of its last eight stood, and what was copied again; the last token where there is no such place."""
    places = [
        (count, end)
        for count in range(1, 9)
        for end in range(count, len(tokens))
        if tokens[end - count : end] == tokens[len(tokens) - count :]
    ]
    start, grown = max(places)[1] if places else len(tokens) - 1, list(tokens)
    while len(grown) < len(tokens) + length:
        grown.append(grown[start + len(grown) - len(tokens)])
    return grown[len(tokens) :]


def why_not_top(kept: list[Tensor], scores: list[tuple[Tensor, Tensor]], length: int, budget: int, window: int) -> str:
    """What is wrong with what heads that share their budgets keep, each ascending positions, -1 where unused.

    Args: scores: of each of n heads [S - W], and how far rounding may move them; budget: C of a head in the mean.

    Returns: "" where nothing is wrong: the window of each head, its best fifth of C - W at least (AdaKV, arXiv
    2407.11550), and of all scores of the heads the n (C - W) best.
    """
    used = [own[own >= 0] for own in kept]
    for head, own in enumerate(used):
        if (own.diff() <= 0).any() or own[-1] >= length:
            return f"head {head}: {own.tolist()} is not ascending inside the prompt"
        if not set(range(max(0, length - window), length)) <= set(own.tolist()):
            return f"head {head} lacks some of its window"
    if sum(map(len, used)) != len(used) * min(budget, length):
        return f"heads keep {[len(own) for own in used]} positions of {length}, budget {budget}"
    if budget >= length:
        return ""
    floor, worst, missed = int(FLOOR * (budget - window)), [], []
    for head, (own, (score, near)) in enumerate(zip(used, scores, strict=True)):
        if len(own) - window < min(floor, length - window):
            return f"head {head} keeps {len(own)} positions, its floor is {window + floor}"
        chosen = torch.zeros(length - window, dtype=torch.bool)
        chosen[own[own < length - window]] = True
        worst.append(float((score + near)[chosen].min()) if chosen.any() else math.inf)
        missed.append(float((score - near)[~chosen].max()) if not chosen.all() else -math.inf)
        if worst[-1] < missed[-1]:
            return f"head {head}: a dropped position scores {missed[-1]:.6f}, more than a kept"
    least = min((low for low, own in zip(worst, used, strict=True) if len(own) - window > floor), default=math.inf)
    if least < max(missed):
        return (
            f"a dropped position of head {missed.index(max(missed))} scores {max(missed):.6f}, more than another's kept"
        )
    return ""


def falling(mean: int, how: Any, depth: int, layers: int) -> float:
    """PyramidKV (arXiv 2406.02069): slots of layer `depth` of `layers`, before rounding."""
    free = mean - how.window
    last = max(free / how.beta, 1.0)
    first = 2 * free - last
    return how.window + first + (last - first) * depth / max(layers - 1, 1)


def streamed(length: int, budget: int, sinks: int = 4) -> Tensor:
    """Positions that StreamingLLM keeps."""
    if budget >= length:
        return torch.arange(length)
    return torch.cat([torch.arange(sinks), torch.arange(length - budget + sinks, length)])


def token_scores(weights: list[Tensor], length: int, how: dict) -> Tensor:
    """The draft's probabilities [H, W + L - 1, T] of each layer -> unpooled scores [S] of the prompt's tokens (max)."""
    window = how["window"]
    first = how["first_layer"] if how["first_layer"] is not None else min(8, len(weights) // 3)
    row = torch.ones(weights[0].shape[1])
    row[:window] = torch.linspace(0.0, 1.0, window) if window > 1 else torch.ones(1)
    layers = torch.stack([layer[:, :, :length] for layer in weights[first:]])  # [layers, H, rows, S]
    return (layers * row[:, None]).flatten(0, 2).amax(0)


def read_tokens(scores: Tensor, budget: int, how: dict) -> list[int]:
    """Prompt tokens that SpecPC reads, from unpooled scores [S]; ties go to the lower position."""
    length, kernel, count = len(scores), how["kernel"], how["neighbours"]
    if budget >= length:
        return list(range(length))
    left = (kernel - 1) // 2
    pooled = F.max_pool1d(F.pad(scores[None], (left, kernel - 1 - left), value=0.0), kernel, 1)[0]
    peaks = sorted(range(length), key=lambda at: (-float(pooled[at]), at))[:budget]
    low, high = -((count - 1) // 2), count - 1 - (count - 1) // 2
    steps = sorted(range(low, high + 1), key=lambda step: (abs(step), step > 0))
    order = list(range(length - how["window"], length))
    order += [min(max(peak + step, 0), length - 1) for peak in peaks for step in steps]
    return sorted(list(dict.fromkeys(order))[:budget])
