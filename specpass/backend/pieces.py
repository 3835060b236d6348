"""Prompts that generate() hands over in pieces, or with more behind them, are read as the prompts that they are.

prefill_chunk_size: what a chunk keeps cannot be chosen before the prompt's end, so chunks wait for the last of them.
Generated tokens that are bounded (generated=): more than there are slots for go in parts, each of which makes room.
Assisted decoding: the first call brings candidates behind the prompt. They are appended to the pruned prompt, so that
those which are not accepted can be taken out again. Candidates that are the lookahead's go one by one, so that what is
known of them is not computed (verified lookahead), and the same tokens are chosen as without an assistant.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from specpass.cache.budget import BudgetCache
from specpass.cache.replay import REPLAYS
from specpass.errors import UnsupportedCallError
from specpass.interpret.beside import features

TOKENS = ("input_ids", "inputs_embeds")  # of which a call has one
# What a call with candidates alone takes of the call's arguments; images, say, belong to the prompt.
STEP = ("past_key_values", "use_cache", "return_dict", "output_hidden_states", "output_attentions")


def piece_of_prompt(cache: BudgetCache, kwargs: dict[str, Any], call: Callable[..., Any]) -> Any | None:
    """What the model returns where `kwargs` are not just a prompt's; None where they are, or nobody announced one.

    Args: call: the compiled model.

    Raises: UnsupportedCallError: features of images come in pieces.
    """
    name = next((name for name in TOKENS if kwargs.get(name) is not None), None)
    columns = cache.awaited
    if name is None or columns is None or cache.filled:
        return None
    tokens = torch.cat([*cache.held, kwargs[name]], 1)
    seen = features(kwargs)
    if seen and kwargs[name].shape[1] < columns:
        raise UnsupportedCallError(
            f"prefill_chunk_size with {seen[0]}: it bounds nothing here (what a prompt's tokens are worth is known at "
            "its end), and the features would come in pieces. Leave it out."
        )
    if tokens.shape[1] < columns:
        cache.held = [tokens]
        return CausalLMOutputWithPast(past_key_values=cache)
    if cache.held:
        warnings.warn(
            "specpass: prefill_chunk_size bounds nothing here: what a prompt's tokens are worth is known at its end, "
            "so the prompt is read whole. Leave it out, or lower the batch if memory is short.",
            stacklevel=3,
        )
    whole = {**kwargs, name: tokens}
    if cache.held:
        whole.pop("position_ids", None)  # the last chunk's; by the mask they are the prompt's
    cache.held, cache.awaited = [], None
    return call(**whole) if tokens.shape[1] == columns else with_candidates(whole, name, columns, call)


def piece_of_lookahead(cache: BudgetCache, kwargs: dict[str, Any], call: Callable[..., Any]) -> Any | None:
    """What the model returns where the first of several tokens follows the lookahead; None where it does not."""
    replay, ids = REPLAYS.get(cache), kwargs.get("input_ids")
    if replay is None or not isinstance(ids, torch.Tensor) or ids.shape[1] == 1:
        return None
    if not replay.fits(cache, ids) or not all(replay.matching(ids)):
        return None
    return with_candidates(kwargs, "input_ids", 1, call)


def piece_of_append(cache: BudgetCache, kwargs: dict[str, Any], call: Callable[..., Any]) -> Any | None:
    """What the model returns where more tokens come at once than generated ones have slots; None where they fit."""
    name = next((name for name in TOKENS if kwargs.get(name) is not None), None)
    if name is None or cache.bound is None or not cache.filled or cache.exact or features(kwargs):
        return None
    count = kwargs[name].shape[1]
    if count <= max(cache.bound.most, cache.bound.slots - cache.appended + cache.evictions):
        return None
    return with_candidates(kwargs, name, cache.bound.most, call)


def with_candidates(kwargs: dict[str, Any], name: str, columns: int, call: Callable[..., Any]) -> Any:
    """The call of the first `columns` tokens, then that of the others behind them, as one result."""
    tokens, keep = kwargs[name], kwargs.get("logits_to_keep", 0)
    count = tokens.shape[1] - columns
    prompt = {**kwargs, name: tokens[:, :columns]}
    step = {key: kwargs[key] for key in STEP if key in kwargs} | {name: tokens[:, columns:]}
    if keep:
        prompt["logits_to_keep"], step["logits_to_keep"] = max(1, keep - count), min(keep, count)
    if kwargs.get("attention_mask") is not None:
        prompt["attention_mask"], step["attention_mask"] = (
            kwargs["attention_mask"][:, :-count],
            kwargs["attention_mask"],
        )
    if kwargs.get("position_ids") is not None:
        positions = kwargs["position_ids"]
        prompt["position_ids"], step["position_ids"] = positions[..., :columns], positions[..., columns:]
    first, second = call(**prompt), call(**step)
    second.logits = torch.cat([first.logits, second.logits], 1)[:, -keep:]
    if second.get("hidden_states") is not None:
        pairs = zip(first.hidden_states, second.hidden_states, strict=True)
        second.hidden_states = tuple(torch.cat(pair, 1) for pair in pairs)
    return second
