"""Sparse prefill on tiny random models in float32, against transformers' own forward with the formula as attention."""

from __future__ import annotations

import functools
from typing import Any

import torch
from support import call, compile_eager, kept, padded, run
from tiny import prompt, tiny
from torch import Tensor
from transformers import DynamicCache

import specpass
from specpass.testing.attention import sdpa_replaced

C, W, L, V = 24, 8, 5, 14
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L, sparse_prefill=V)


def attend(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, ahead: int = L, **how: Any
) -> tuple[Tensor, None]:
    """One layer of a prompt and `ahead` tokens of its lookahead [1, H, S + L, D]."""
    count, kv_heads = query.shape[2], key.shape[1]
    group, own = query.shape[1] // kv_heads, count - ahead
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    row = torch.arange(count)[:, None]
    causal = row >= row.T
    logits = (query @ key.mT * how["scaling"]).masked_fill(~causal, float("-inf"))
    scores = logits.softmax(-1)[0, :, own - W :, : own - W].unflatten(0, (kv_heads, group)).amax((1, 2))
    chosen = torch.zeros(kv_heads, count, dtype=torch.bool)
    chosen.scatter_(1, scores.topk(V).indices, True)
    reads = causal & ((row - V < row.T) | (row >= own - W) | chosen.repeat_interleave(group, 0)[:, None])
    return (logits.masked_fill(~reads, float("-inf")).softmax(-1) @ value).transpose(1, 2), None


def read_ahead(draft: Any, ids: Tensor) -> Tensor:
    """[1, L] tokens of a draft that reads the prompt sparsely, and goes on from all of its KV pairs."""
    cache = DynamicCache()
    with torch.no_grad():
        with sdpa_replaced(functools.partial(attend, ahead=0)):
            logits = draft(input_ids=ids, past_key_values=cache).logits
        tokens = [logits[:, -1:].argmax(-1)]
        for _ in range(L - 1):
            tokens.append(draft(input_ids=tokens[-1], past_key_values=cache).logits.argmax(-1))
    return torch.cat(tokens, 1)


def test_logits_and_kept_sets_are_the_formulas() -> None:
    target, draft = tiny("qwen2", layers=2), tiny("qwen2", seed=1000, layers=1)
    ids = prompt(70, seed=70)
    lookahead = read_ahead(draft, ids)
    with sdpa_replaced(attend), torch.no_grad():
        expected = target(input_ids=torch.cat([ids, lookahead], 1), use_cache=False).logits[:, -L - 1]
    exact = target(input_ids=ids).logits[:, -1]
    model = compile_eager(target, METHOD, draft)
    found = call(model, ids, specpass.BudgetCache(model.config, METHOD, max_new_tokens=6))[:, 0]
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (found - exact).abs().max() > 1e-3


def test_a_padded_batch_equals_its_rows_alone() -> None:
    """Rows that are read sparsely, whole, and that fit the budget."""
    model = compile_eager(tiny("qwen2", layers=2), METHOD, tiny("qwen2", seed=1000, layers=1))
    rows = [prompt(length, seed=length) for length in (60, 41, 2 * V, C + 1, 12, W - 3)]
    ids, mask = padded(rows)
    together = run(model, ids, mask=mask)
    for row, own in enumerate(rows):
        alone = run(model, own)
        assert together.tokens[row] == alone.tokens[0]
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-4, rtol=1e-4)
        for ours, theirs in zip(kept(together.cache, row), kept(alone.cache), strict=True):
            assert torch.equal(ours, theirs)
