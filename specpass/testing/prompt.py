"""SpecPC in plain eager PyTorch: which prompt tokens the target reads, and what it answers from them.

Batch 1, no padding, nothing of specpass: the draft's attention comes from transformers' own `output_attentions`, the
list of peaks and neighbours is built one by one in Python. Source: "Draft-based Approximate Inference for LLMs"
(arXiv 2506.08373), Algorithm 2. Symbols as in eager.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from specpass.testing import eager


@dataclasses.dataclass(frozen=True)
class PromptScoring:
    """SpecPC's hyperparameters by their names in `specpass.SpecPC`."""

    window: int = 64
    lookahead: int = 1
    kernel: int = 64
    neighbours: int = 64
    first_layer: int | None = None
    reduce: str = "max"
    pool: str = "max"


@torch.no_grad()
def prompt_scores(draft: PreTrainedModel, ids: torch.Tensor, how: PromptScoring) -> torch.Tensor:
    """Scores [S] of the prompt `ids` [1, S] before pooling."""
    length, layers = ids.shape[1], draft.config.num_hidden_layers
    first = min(8, layers // 3) if how.first_layer is None else how.first_layer
    kinds = getattr(draft.config, "layer_types", None) or ["full_attention"] * layers  # windows do not score
    scoring = [layer for layer in range(first, layers) if kinds[layer] == "full_attention"]
    stops, ended = eager.eos_ids_of(draft), False
    cache, before = DynamicCache(), draft.config._attn_implementation
    draft.set_attn_implementation("eager")
    try:
        steps, tokens = [], ids
        for step in range(how.lookahead):
            out = draft(input_ids=tokens, past_key_values=cache, output_attentions=True, logits_to_keep=1)
            if not ended or step == 0:
                rows = how.window if step == 0 else 1
                attention = torch.stack([out.attentions[layer] for layer in scoring])[:, 0, :, -rows:, :length].float()
                steps.append(_reduce(_weighted(attention, how.window if step == 0 else 1), how.reduce))
            if step > 0 and int(tokens) in stops:
                ended = True
            tokens = out.logits[:, -1:].argmax(-1)
    finally:
        draft.set_attn_implementation(before)
    return _over(torch.stack(steps), 0, how.reduce)


def _weighted(attention: torch.Tensor, window: int) -> torch.Tensor:
    weights = torch.linspace(0, 1, window) if window > 1 else torch.ones(1)
    return attention * weights[-attention.shape[2] :, None]


def _reduce(attention: torch.Tensor, how: str) -> torch.Tensor:
    """[layers, H, rows, S] -> [S]: heads and rows first, then layers."""
    return _over(_over(attention.flatten(1, 2), 1, how), 0, how)


def _over(scores: torch.Tensor, axis: int, how: str) -> torch.Tensor:
    return scores.amax(axis) if how == "max" else scores.sum(axis)


def pooled(scores: torch.Tensor, how: PromptScoring) -> torch.Tensor:
    """[S] -> [S]: kernel k, stride 1, zero padding (k - 1) // 2 on the left and the rest on the right."""
    left = (how.kernel - 1) // 2
    padded = F.pad(scores[None, None], (left, how.kernel - 1 - left))
    pool = F.max_pool1d if how.pool == "max" else F.avg_pool1d
    return pool(padded, how.kernel, 1)[0, 0]


def choose(scores: torch.Tensor, budget: int, how: PromptScoring) -> list[int]:
    """Pooled scores [S] -> ascending positions of the tokens to read."""
    length = len(scores)
    if length <= budget:
        return list(range(length))
    peaks = scores.sort(descending=True, stable=True).indices[:budget].tolist()
    low, high = -((how.neighbours - 1) // 2), how.neighbours - 1 - (how.neighbours - 1) // 2
    offsets = [0]
    for distance in range(1, how.neighbours):
        offsets += [sign * distance for sign in (-1, 1) if low <= sign * distance <= high]
    listed = list(range(length - how.window, length))
    listed += [min(max(peak + offset, 0), length - 1) for peak in peaks for offset in offsets]
    return sorted(list(dict.fromkeys(listed))[:budget])


@torch.no_grad()
def answer(
    target: PreTrainedModel, ids: torch.Tensor, read: Sequence[int], new: int, positions: str = "renumber"
) -> eager.Generation:
    """Greedy answer of `new` tokens to the prompt's tokens `read` alone."""
    chosen = torch.tensor(read)
    numbers = torch.arange(len(read)) if positions == "renumber" else chosen
    following = len(read) if positions == "renumber" else ids.shape[1]
    cache = DynamicCache()
    logits = target(input_ids=ids[:, chosen], position_ids=numbers[None], past_key_values=cache).logits[:, -1:]
    tokens: list[int] = []
    seen: list[torch.Tensor] = []
    while True:
        seen.append(logits[0, -1].float())
        tokens.append(int(seen[-1].argmax()))
        if len(tokens) == new:
            return eager.Generation(tokens, torch.stack(seen))
        position = torch.tensor([[following + len(tokens) - 1]])
        logits = target(input_ids=torch.tensor([[tokens[-1]]]), position_ids=position, past_key_values=cache).logits
