"""Greedy answers of a model, plain or compiled, and whether two of them are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from specpass.benchmarks.coverage.tiny import VOCAB

NEW = 8
CLOSE = 1e-3  # logits, which spread over tens of units here


@dataclasses.dataclass(frozen=True)
class Answer:
    """New tokens [B, NEW], the logits [B, NEW, V] that chose them, and the cache."""

    tokens: Tensor
    logits: Tensor
    cache: Any

    def row(self, index: int) -> Answer:
        return Answer(self.tokens[[index]], self.logits[[index]], self.cache)


def prompt(length: int) -> Tensor:
    """Random ids [1, length], another prompt for each length."""
    return torch.randint(1, VOCAB, (1, length), generator=torch.Generator().manual_seed(length))


def padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [1, S_i] padded on the left with an ordinary token: ids [B, S] and mask."""
    size = max(ids.shape[1] for ids in prompts)
    ids, mask = torch.full((len(prompts), size), 9), torch.zeros(len(prompts), size, dtype=torch.int64)
    for row, own in enumerate(prompts):
        ids[row, size - own.shape[1] :] = own[0]
        mask[row, size - own.shape[1] :] = 1
    return ids, mask


def answer(model: Any, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Answer:
    """NEW greedy tokens from `generate`."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=NEW,
        min_new_tokens=NEW,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **options,
    )
    return Answer(out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1).float(), out.past_key_values)


def difference(ours: Answer, theirs: Answer) -> str:
    """How two answers differ; "" where they are one. Behind a near tie that fell otherwise nothing is compared."""
    for row in range(len(theirs.tokens)):
        for step in range(theirs.tokens.shape[1]):
            a, b = ours.logits[row, step], theirs.logits[row, step]
            apart, scale = float((a - b).abs().max()), max(1.0, float(b.abs().max()))
            if not apart <= CLOSE * scale:
                return f"row {row}, token {step}: logits differ by {apart:.2g} of {scale:.2g}"
            if ours.tokens[row, step] != theirs.tokens[row, step]:
                break
    return ""
