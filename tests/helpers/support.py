"""What several test files share: one way to generate, to pad, and to read what a cache kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import specpass
from specpass.backend import direct
from specpass.testing import eager

MARGIN = -1e-6  # a kept score may lie this far below a dropped one: rounding upstream, not another choice


@dataclasses.dataclass(frozen=True)
class Run:
    """New tokens [B, n], the logits [B, n, V] that chose them, and the cache."""

    tokens: list[list[int]]
    logits: Tensor
    cache: Any


def run(model: PreTrainedModel, ids: Tensor, new: int = 6, mask: Tensor | None = None, **kwargs: Any) -> Run:
    """Greedy generate() of a compiled or an uncompiled model."""
    out = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids) if mask is None else mask,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
        **kwargs,
    )
    return Run(out.sequences[:, ids.shape[1] :].tolist(), torch.stack(out.logits, 1), out.past_key_values)


@torch.no_grad()
def call(model: PreTrainedModel, ids: Tensor, cache: Any, **kwargs: Any) -> Tensor:
    """One direct call; returns the logits [B, n, V]."""
    return model(input_ids=ids, past_key_values=cache, **{"logits_to_keep": 1, **kwargs}).logits


def compile_eager(target: PreTrainedModel, method: Any, draft: PreTrainedModel | None = None, **kwargs: Any) -> Any:
    return specpass.compile(target, draft=draft, method=method, lowering="eager", **kwargs)


def second_way(target: Any, method: Any, draft: Any = None, **options: Any) -> Any:
    """Compiled, and run by its own forward: that needs no tracing, and keeps what graphs keep (tests/interpret)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(direct, "why_uncompiled", lambda target: "a test says so")
        return compile_eager(target, method, draft, **options)


def padded(prompts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Prompts [1, S_i] as one left-padded batch: ids [B, S] and their mask.

    The padding is an ordinary token: the pad id's embedding is zero, and would not be missed where it leaks.
    """
    size = max(ids.shape[1] for ids in prompts)
    ids = torch.full((len(prompts), size), 9)
    mask = torch.zeros_like(ids)
    for row, own in enumerate(prompts):
        ids[row, size - own.shape[1] :] = own[0]
        mask[row, size - own.shape[1] :] = 1
    return ids, mask


def kept(cache: Any, row: int = 0) -> list[Tensor]:
    """Positions [K, slots in use] of one row in every layer; every head of a row uses the same number."""
    found = []
    for layer in cache.layers:
        own = layer.positions[row]
        used = (own >= 0).sum(-1)
        assert (used == used[0]).all()
        assert (own[:, int(used[0]) :] == -1).all(), "unused slots come last"
        found.append(own[:, : int(used[0])])
    return found


def check_rules(positions: Sequence[Tensor], length: int, budget: int, window: int) -> None:
    """Unique, ascending, inside the prompt, exactly min(C, S) of them, the window among them."""
    for layer in positions:
        assert layer.shape[1] == min(budget, length)
        assert (layer.diff(dim=-1) > 0).all()
        assert int(layer.min()) >= 0
        assert int(layer.max()) < length
        tail = torch.arange(max(0, length - window), length)
        assert torch.equal(layer[:, layer.shape[1] - len(tail) :], tail.expand(len(layer), -1))


def check_selection(positions: Sequence[Tensor], reference: eager.Selection, window: int) -> None:
    """Kept sets against the eager ones, at equal scores: no dropped position scores more than a kept one."""
    assert len(positions) == len(reference.positions)
    if not reference.scores:
        for ours, theirs in zip(positions, reference.positions, strict=True):
            assert torch.equal(ours, theirs)
    for ours, scores in zip(positions, reference.scores, strict=bool(reference.scores)):
        assert eager.score_margin(scores, ours, window) >= MARGIN


def check_answer(
    ours: Run,
    target: PreTrainedModel,
    ids: Tensor,
    positions: Sequence[Tensor] | None,
    row: int = 0,
    tolerance: float = 1e-4,
) -> None:
    """Tokens and logits of one row against eager decoding over the same kept positions (None: all of them)."""
    new, cache = len(ours.tokens[row]), ours.cache
    ahead = cache.lookahead_ids if cache.method.verify else None
    followed = () if ahead is None or positions is None else ahead[row].tolist()
    theirs = eager.generate(target, ids, positions, new, eos_ids=(), ahead=followed)
    assert ours.tokens[row] == theirs.tokens
    torch.testing.assert_close(ours.logits[row], theirs.logits, atol=tolerance, rtol=tolerance)


def state_of(model: torch.nn.Module) -> tuple[Any, ...]:
    """Classes and instance attributes of every submodule (hooks are among them), and the attention registry."""
    modules = {
        name: (
            type(module),
            {key: id(value) for key, value in module.__dict__.items()},
            {key: list(value) for key, value in module.__dict__.items() if key.endswith("_hooks")},
        )
        for name, module in model.named_modules()
    }
    return modules, dict(ALL_ATTENTION_FUNCTIONS._local_mapping)


def check_same(whole: Any, ours: Any, row: int = 0) -> None:
    """Row 0 of a prompt that was read whole, and a row that was read behind a prefix or a conversation."""
    assert ours.tokens[row] == whole.tokens[0]
    torch.testing.assert_close(ours.logits[row], whole.logits[0], atol=1e-3, rtol=1e-3)
    for theirs, layer in zip(whole.cache.layers, ours.cache.layers, strict=True):
        own, expected = layer.positions[row], theirs.positions[0]
        assert torch.equal(own[:, : expected.shape[1]], expected)
        assert (own[:, expected.shape[1] :] == -1).all()  # of a padded batch, rows have room for what fits the budget
    if whole.cache.lookahead_ids is not None:
        assert torch.equal(ours.cache.lookahead_ids[row], whole.cache.lookahead_ids[0])
