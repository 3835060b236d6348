"""What a call must be for a BudgetCache to take it: the same checks for graphs and for a model that runs uncompiled."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from specpass.cache.budget import BudgetCache
from specpass.errors import DraftContextError, GradientsError, LookaheadError, MaskError, TokenizerMismatchError


def tokens_of(call: Mapping[str, Any]) -> Any:
    """What a call reads: ids [B, q], or embeddings [B, q, E] in their place."""
    ids = call.get("input_ids")
    return call.get("inputs_embeds") if ids is None else ids


def positions_of(mask: Tensor) -> Tensor:
    """[B, S] int64 positions of the tokens that a mask [B, S] shows, counted without padding; 0 for leading padding."""
    return (mask.long().cumsum(1) - 1).clamp(min=0)


def check_gradients(values: Iterable[Any]) -> None:
    """Raises: GradientsError: autograd is on and some tensor of the call wants gradients."""
    if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values):
        raise GradientsError(
            "gradients are wanted (autograd is on and the weights require them), and pruning has no backward: call "
            "the model under torch.no_grad() or torch.inference_mode()."
        )


def check_prompt(
    cache: BudgetCache, shape: tuple[int, int], mask: Tensor | None, lookahead: int, context: int | None
) -> None:
    """A prompt of `shape` (B, S) under a 2-D mask, behind which a draft that reads `context` positions writes L tokens.

    Raises: MaskError, LookaheadError, DraftContextError.
    """
    batch, size = shape
    if mask is not None and mask.shape != (batch, size):
        raise MaskError(f"attention_mask is {tuple(mask.shape)} and input_ids ({batch}, {size}): they must agree.")
    if mask is not None and not bool(mask[:, -1].all()):
        raise MaskError(
            "attention_mask ends with 0 in some row, so that row has no last token: pad on the left "
            "(tokenizer.padding_side = 'left')."
        )
    if lookahead == 0:
        return
    if cache.given_ids is not None and cache.given_ids.shape[0] != batch:
        raise LookaheadError(
            f"lookahead_ids has {cache.given_ids.shape[0]} rows and the batch has {batch}; give one row a prompt."
        )
    if context is not None and size + lookahead > context:
        raise DraftContextError(
            f"the prompt has {size} tokens and the draft writes {lookahead} more, but the draft reads at most "
            f"{context}: shorten the prompt, lower lookahead, or use a draft with a longer context."
        )


def check_ids(ids: Tensor, vocab: int | None) -> None:
    """A prompt of ids [B, S] for a draft that knows `vocab` tokens; None: as many as the target.

    Raises: TokenizerMismatchError.
    """
    highest = -1 if vocab is None else int(ids.max())  # read once, before anything is queued
    if vocab is not None and highest >= vocab:
        raise TokenizerMismatchError(
            f"the prompt holds token id {highest}, and the draft knows {vocab} tokens, fewer than the target: use a "
            "draft of the same family and tokenizer."
        )
