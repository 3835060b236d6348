"""Several answers of one prompt: generate() hands over each prompt n times, and it is read, scored and pruned once.

What comes back are n sequences that share its slots (cache/answers.py): num_return_sequences and num_beams.
"""

from __future__ import annotations

import collections
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specpass.cache.answers import why_copied
from specpass.cache.budget import BudgetCache
from specpass.reports.record import AnswersRecord
from specpass.reports.report import Report

# What a prompt's call may hold besides: of other tensors nobody knows which axis counts the rows.
ROWS = ("input_ids", "inputs_embeds", "attention_mask", "position_ids", "token_type_ids", "lookahead_ids")


def read_once(cache: BudgetCache, kwargs: dict[str, Any], call: Callable[..., Any], report: Report) -> Any | None:
    """What the model returns for prompts that come `cache.asked` times each; None where they are read as they come.

    Args: call: the compiled model. report: told what became of them.
    """
    count, cache.asked = cache.asked, 1
    if cache.filled or count == 1:
        return None
    prompts = one_of_each(cache, kwargs, count)
    if isinstance(prompts, str):
        report.note(f"answers of one prompt: it is read and held for each of them, as {prompts}")
        return None
    out = call(**prompts)
    cache.batch_repeat_interleave(count)
    report.answers = record_of(cache, count)
    for name, value in out.items():
        if name == "logits":
            out[name] = value.repeat_interleave(count, 0)
        elif name == "hidden_states" and value is not None:
            out[name] = tuple(states.repeat_interleave(count, 0) for states in value)
    return out


def record_of(cache: BudgetCache, count: int) -> AnswersRecord:
    """What layers hold of prompts with `count` sequences each."""
    shared = [layer for layer in cache.budgeted if layer.prompt is not None]
    copied = collections.Counter(why_copied(layer) for layer in cache.budgeted if layer.prompt is None)
    held = sum(states.nbytes for layer in shared for states in (layer.prompt or ())[:2])
    return AnswersRecord(count, len(shared), dict(copied), held)


def one_of_each(cache: BudgetCache, kwargs: dict[str, Any], count: int) -> dict[str, Any] | str:
    """The call of every `count`-th row, or why it stands not for all: rows are unlike, or something else comes too."""
    tokens = [kwargs[name] for name in ROWS[:2] if kwargs.get(name) is not None]
    rows = len(tokens[0]) if tokens else 0
    if not rows or rows % count:
        return f"{rows} rows come where each of them was to come {count} times"
    if kwargs.get("return_dict") is False:
        return "return_dict=False is asked for"
    if cache.given_ids is not None and len(cache.given_ids) == rows and kwargs.get("lookahead_ids") is None:
        return "each of them has a lookahead of its own"
    found = dict(kwargs)
    for name, value in kwargs.items():
        if not isinstance(value, Tensor) or value.dim() == 0:
            continue
        if name not in ROWS:
            return f"{name} comes with it"
        axis = int(name == "position_ids" and value.dim() == 3)  # of several axes (mrope)
        if value.shape[axis] != rows:  # positions that all rows have
            continue
        groups = value.unflatten(axis, (-1, count))
        first = groups.narrow(axis + 1, 0, 1)
        if not torch.equal(groups, first.expand_as(groups)):
            return f"their {name} differ"
        found[name] = first.squeeze(axis + 1).contiguous()
    return found
