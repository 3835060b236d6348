"""What a draft writes: by its captured graphs, else by its own forward, one token at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from specpass.capture.rope import rope_as_it_was
from specpass.dialect.define import SPEC
from specpass.interpret.beside import positions_for
from specpass.passes.draft import DraftGraphs
from specpass.sizes import eos_ids, pad_id


@dataclasses.dataclass(frozen=True)
class Written:
    """ids: [B, L] lookahead tokens. scores: [B, S] of each packed prompt token, where the draft scores."""

    ids: Tensor
    scores: Tensor | None = None


def write_by_graphs(draft: DraftGraphs, ids: Tensor, lengths: Tensor, lookahead: int) -> Written:
    """Run the two graphs as insert_draft lays them out. Args: ids [B, S] packed, lengths [B]."""
    return joined(list(steps_by_graphs(draft, ids, lengths, lookahead)))


def joined(steps: list[Written]) -> Written:
    """All the tokens, and the scores behind the last of them."""
    return Written(torch.cat([step.ids for step in steps], 1), steps[-1].scores)


def steps_by_graphs(draft: DraftGraphs, ids: Tensor, lengths: Tensor, most: int) -> Iterator[Written]:
    """One token [B, 1] after the other, `most` of them, each with the scores so far. Args: as write_by_graphs."""
    params, count = list(draft.params.values()), 3 * draft.layers
    logits, *rest = draft.prefill(ids, lengths, most, *params)
    caches, scores = rest[:count], rest[count] if draft.prompt is not None else None
    ended = over = torch.zeros_like(lengths, dtype=torch.bool)
    token = ids
    for index in range(most):
        if index:
            position = (lengths + (index - 1))[:, None]
            extra = () if scores is None else (position.masked_fill(over[:, None], -1), lengths)
            logits = draft.step(token, position, *extra, *caches, *params)
            if scores is not None:
                logits, new = logits
                scores = SPEC.merge_step(scores, new, draft.reduce)
        over = ended
        how = (draft.shared_vocab, draft.temperature, draft.seed, index, list(draft.eos_ids), draft.pad_id)
        token, ended = SPEC.next_token(logits, ended, *how)
        yield Written(token, scores)


def write_by_forward(
    draft: nn.Module,
    ids: Tensor,
    mask: Tensor | None,
    lookahead: int,
    vocab: int,
    temperature: float,
    seed: int,
    beside: Mapping[str, Any],
) -> Written:
    """The same by the draft's own forward.

    Args: ids [B, S] and mask [B, S] in the caller's columns; beside: arguments that come with the prompt.
    """
    return joined(list(steps_by_forward(draft, ids, mask, lookahead, vocab, temperature, seed, beside)))


def steps_by_forward(
    draft: nn.Module,
    ids: Tensor,
    mask: Tensor | None,
    most: int,
    vocab: int,
    temperature: float,
    seed: int,
    beside: Mapping[str, Any],
) -> Iterator[Written]:
    """One token [B, 1] after the other, `most` of them. Args: as write_by_forward."""
    cache: Any = DynamicCache(config=draft.config)
    ends, pad = eos_ids(draft.generation_config), pad_id(draft.generation_config)
    shared = min(vocab, draft.config.get_text_config(decoder=True).vocab_size)
    ended = torch.zeros(ids.shape[0], dtype=torch.bool, device=ids.device)
    position = positions_for(draft, ids, mask, beside)
    for index in range(most):
        told = {} if index else {name: given for name, given in beside.items() if name != "position_ids"}
        if mask is not None:
            told["attention_mask"] = mask
        # Not the compiled call: a target may be its own draft.
        with rope_as_it_was(draft):
            out = draft._call_impl(input_ids=ids, position_ids=position, past_key_values=cache, use_cache=True, **told)
        ids, ended = SPEC.next_token(out.logits, ended, shared, temperature, seed, index, list(ends), pad)
        yield Written(ids)
        position = position[..., -1:] + 1
        mask = None if mask is None else torch.cat([mask, mask.new_ones(mask.shape[0], 1)], 1)
