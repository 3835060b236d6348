"""What may be kept: scores and choices by the field's formulas, in plain torch, and whether a choice is a top one.

Written from the papers, apart from specpass: "Draft-based Approximate Inference for LLMs" (arXiv 2506.08373), SnapKV
(2404.14469), StreamingLLM (2309.17453). One row, no padding.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TIE = 1e-6


def head_scores(weights: Tensor, kv_heads: int, length: int, how: dict) -> Tensor:
    """Probabilities [H, W + L, T] -> pooled scores [K, S - W]."""
    columns = weights[:, :, : length - how["window"]]
    rows = columns.reshape(kv_heads, -1, columns.shape[-1])
    reduced = rows.max(1).values if how["reduce"] == "max" else rows.mean(1)
    pad = how["kernel"] // 2
    if how["pool"] == "max":
        return F.max_pool1d(F.pad(reduced, (pad, pad), value=0.0), how["kernel"], 1)
    return F.avg_pool1d(F.pad(reduced, (pad, pad), value=0.0), how["kernel"], 1)


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


def why_not_top(kept: Tensor, scores: Tensor, length: int, budget: int, window: int) -> str:
    """What is wrong with positions [K, C] for scores [K, S - W]; "" where nothing is."""
    for head, own in enumerate(kept):
        used = own[own >= 0]
        if len(used) != min(budget, length):
            return f"head {head} keeps {len(used)} positions of {length}, budget {budget}"
        if (used.diff() <= 0).any() or used[-1] >= length:
            return f"head {head}: {used.tolist()} is not ascending inside the prompt"
        if not set(range(max(0, length - window), length)) <= set(used.tolist()):
            return f"head {head} lacks some of its window"
        if budget >= length:
            continue
        chosen = torch.zeros(length - window, dtype=torch.bool)
        chosen[used[used < length - window]] = True
        if scores[head][chosen].min() < scores[head][~chosen].max() - TIE:
            return f"head {head}: a dropped position scores {float(scores[head][~chosen].max()):.6f}, more than a kept"
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
