"""ALiBi: the bias of a kept key follows its position, whatever slot the key stands in."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support import call, compile_eager, kept, padded, run
from tiny import ALIBI, prompt, tiny
from torch import Tensor
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache

import specpass

C, W, L, S = 24, 8, 4, 60
SNAP = specpass.SnapKV(budget=C, window=W)
METHODS = dict.fromkeys(ALIBI, SNAP) | {"mpt": specpass.SpecKV(budget=C, window=W, lookahead=L)}
SMALL = {"budget": 24, "kernel": 5, "neighbours": 3, "window": W}


class Dropping(TorchFunctionMode):
    """The plain model's own attention without what was dropped: its bias is the model's, its positions the prompt's.

    Args: positions [K, C] of each layer among the first `size` columns.
    """

    def __init__(self, positions: list[Tensor], size: int) -> None:
        super().__init__()
        self.positions, self.size, self.calls = positions, size, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is F.softmax:
            args = (self.hide(args[0]), *args[1:])
        elif func is F.scaled_dot_product_attention:
            kwargs["attn_mask"] = self.hide(kwargs["attn_mask"])
        return func(*args, **kwargs)

    def hide(self, logits: Tensor) -> Tensor:
        """Args: logits, or a mask that is added to them: [1, H, q, T]."""
        heads, count, columns = logits.shape[1:]
        own = self.positions[self.calls % len(self.positions)]
        self.calls += 1
        dropped = torch.zeros(len(own), columns, dtype=torch.bool)
        dropped[:, : self.size] = True
        dropped = dropped.scatter_(1, own, False).repeat_interleave(heads // len(own), 0)[None, :, None]
        itself = torch.arange(columns) == torch.arange(columns - count, columns)[:, None]  # a row of nothing is NaN
        return logits.masked_fill(dropped & ~itself, float("-inf"))


@torch.no_grad()
def dropped(
    twin: Any, ids: Tensor, tokens: list[int], positions: list[Tensor], size: int = S, first: bool = False
) -> Tensor:
    """Logits [1, n, V] of the plain model that chose `tokens`, if it reads what is kept of the prompt alone.

    Args: ids: the prompt of `size` tokens, and more; first: while it is read, too.
    """
    cache: Any = DynamicCache(config=twin.config)
    drop, head, tail = Dropping(positions, size), ids[:, :size], ids[:, size:]
    steps = [*([tail] if tail.shape[1] else []), *(torch.tensor([[token]]) for token in tokens[:-1])]
    with drop if first else torch.no_grad():
        logits = [twin(head, past_key_values=cache, use_cache=True).logits[:, -1]]
    for step in steps:
        with drop:
            logits.append(twin(step, past_key_values=cache, use_cache=True).logits[:, -1])
    return torch.stack(logits[-len(tokens) :], 1)


@dataclasses.dataclass
class Subject:
    model: Any
    twin: Any
    method: Any


@functools.cache
def subject(family: str) -> Subject:
    """One compiled model for all tests of a family, its own draft where the method has one."""
    torch._dynamo.reset()
    layers, method = 2 if family == "mpt" else 1, METHODS[family]
    target = tiny(family, layers=layers)
    return Subject(
        compile_eager(target, method, target if method.drafts else None), tiny(family, layers=layers), method
    )


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ALIBI)
def test_exact_where_everything_fits(family: str) -> None:
    """Drafted, scored and gathered all the same; and one token."""
    model, twin = subject(family).model, subject(family).twin
    cache = specpass.BudgetCache(model.config, subject(family).method, max_new_tokens=6, early_exit=False)
    ours, full = run(model, prompt(C, seed=3), past_key_values=cache), run(twin, prompt(C, seed=3))
    assert ours.tokens == full.tokens
    close(ours.logits, full.logits)
    assert run(model, prompt(1, seed=5)).tokens == run(twin, prompt(1, seed=5)).tokens


@pytest.mark.parametrize("family", ALIBI)
def test_a_pruned_prompt_a_second_turn_and_a_crop(family: str) -> None:
    """Against the plain model that reads the same keys."""
    model, twin, ids = subject(family).model, subject(family).twin, prompt(S, seed=4)
    ours = run(model, ids, L)
    if ours.cache.lookahead_ids is not None:
        assert ours.cache.lookahead_ids.tolist() == run(twin, ids, L).tokens
    positions = kept(ours.cache)
    close(ours.logits, dropped(twin, ids, ours.tokens[0], positions))
    turn = torch.cat([ids, torch.tensor(ours.tokens), prompt(5, seed=6)], 1)
    more = run(model, turn, L, past_key_values=ours.cache)
    close(more.logits, dropped(twin, turn, more.tokens[0], positions))
    more.cache.crop(2)
    theirs = dropped(twin, turn, [*more.tokens[0][:1], 5, 0], positions)
    close(call(model, torch.tensor([[5]]), more.cache), theirs[:, -1:])
    assert not specpass.report(model).refusals
    assert not specpass.report(model).interpreted


@pytest.mark.parametrize("family", ["mpt", "falcon-alibi"])
def test_padded_rows_are_as_if_alone(family: str) -> None:
    """In the first turn and in a second one that is padded in the middle."""
    model = subject(family).model
    rows, turns = [prompt(S, seed=8), prompt(31, seed=9)], [prompt(7, seed=1), prompt(4, seed=2)]
    (batch, mask), (turn, own) = padded(rows), padded(turns)
    both = run(model, batch, 3, mask=mask)
    tokens, first = torch.tensor(both.tokens), [kept(both.cache, row) for row in range(2)]
    ones = torch.ones(2, 3, dtype=torch.int64)
    longer = run(
        model, torch.cat([batch, tokens, turn], 1), 3, mask=torch.cat([mask, ones, own], 1), past_key_values=both.cache
    )
    for row, ids in enumerate(rows):
        alone = run(model, ids, 3)
        assert all(torch.equal(a, b) for a, b in zip(first[row], kept(alone.cache), strict=True))
        whole = torch.cat([ids, torch.tensor(alone.tokens), turns[row]], 1)
        assert run(model, whole, 3, past_key_values=alone.cache).tokens[0] == longer.tokens[row]


@torch.no_grad()
def test_scores_hold_the_bias() -> None:
    """Kept sets are those of the model's own attention probabilities."""
    ids, twin = prompt(S, seed=7), tiny("bloom", layers=1)
    ours = kept(run(compile_eager(tiny("bloom", layers=1), SNAP), ids, 1).cache)[0]
    rows = twin(ids, output_attentions=True).attentions[0][0, :, S - W :]  # [H, W, S]
    pooled = F.avg_pool1d(rows[..., : S - W].mean(1), SNAP.kernel, 1, SNAP.kernel // 2)
    for head, positions in enumerate(ours):
        own = torch.zeros(S - W, dtype=torch.bool).scatter_(0, positions[: C - W], True)
        assert pooled[head][own].min() >= pooled[head][~own].max() - 1e-6


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("falcon-alibi", specpass.SpecKVPC(budget=16, prompt_budget=32, window=W, prompt_window=W, lookahead=L)),
        ("bloom", specpass.SpecPC(**SMALL, positions="original")),
    ],
    ids=["renumbered", "original"],
)
def test_positions_are_those_that_the_target_was_told(family: str, method: Any) -> None:
    torch._dynamo.reset()
    target, twin, ids = tiny(family, layers=1), tiny(family, layers=1), prompt(S, seed=3)
    ours = run(compile_eager(target, method, target), ids)
    read, positions = ours.cache.prompt_positions[0], kept(ours.cache)
    assert not specpass.report(target).refusals
    if family == "bloom":
        theirs = dropped(twin, ids, ours.tokens[0], positions, first=True)
    else:
        told = [torch.searchsorted(read, own) for own in positions]
        theirs = dropped(twin, ids[:, read], ours.tokens[0], told, size=len(read))
    close(ours.logits, theirs)


def test_the_plain_door_says_what_to_use() -> None:
    torch._dynamo.reset()
    model, backend = tiny("bloom", layers=1), specpass.Backend(method=SNAP, lowering="eager")
    model.compile(backend=backend, dynamic=True)
    cache = specpass.BudgetCache(model.config, SNAP, max_new_tokens=4)
    ours = run(model, prompt(S), 3, past_key_values=cache)
    assert ours.tokens == run(tiny("bloom", layers=1), prompt(S), 3).tokens
    assert any("use specpass.compile(model, ...)" in reason for reason in backend.report.refusals)
