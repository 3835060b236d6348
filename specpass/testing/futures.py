"""Several futures in plain eager PyTorch: a draft's diverse beams, and what the target's scores of them keep.

Batch 1, no padding, nothing of specpass but its neighbours here. Symbols as in eager.py, and M futures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from specpass.testing.eager import SPECKV, Scoring, Selection, eos_ids_of, select, top_positions


@torch.no_grad()
def diverse_beams(
    draft: PreTrainedModel, ids: torch.Tensor, length: int, futures: int, diversity: float = 0.5
) -> list[torch.Tensor]:
    """M branches behind `ids` [1, S], each [1, L] or shorter where it has ended (its first EOS included).

    Diverse beam search with groups of one beam and a Hamming penalty (arXiv 1610.02424): at each step a branch takes
    the likeliest token by its log-probability less `diversity` for each branch in front of it that took the same one.
    """
    eos = eos_ids_of(draft)
    branches: list[list[int]] = [[] for _ in range(futures)]
    for _ in range(length):
        chosen: list[int] = []
        for own in branches:
            if own and own[-1] in eos:
                continue
            tokens = torch.cat([ids, torch.tensor([own], dtype=torch.int64)], 1)
            worth = draft(input_ids=tokens, logits_to_keep=1).logits[0, -1].float().log_softmax(-1)
            for token in chosen:
                worth[token] -= diversity
            token = int(worth.argmax())
            chosen.append(token)
            own.append(token)
    return [torch.tensor([own]) for own in branches]


def select_futures(
    model: PreTrainedModel,
    ids: torch.Tensor,
    budget: int,
    futures: Sequence[torch.Tensor],
    how: Scoring = SPECKV,
    route: str = "capture",
) -> Selection:
    """SpecKV with the best score that each position gets of M lookaheads: one forward of prompt and lookahead each.

    Args: route: see eager.select.
    """
    each = [select(model, ids, budget, ahead, how, route).scores for ahead in futures]
    scores = [torch.stack(layer).amax(0) for layer in zip(*each, strict=True)]
    return Selection([top_positions(layer, ids.shape[1], budget, how.window) for layer in scores], scores)
