"""A model's graphs made before they are needed: the next process finds what they are compiled to in its caches."""

from __future__ import annotations

from typing import Any

import torch

from specpass.methods.base import Method
from specpass.observe import progress
from specpass.reports.report import base_of
from specpass.sizes import context_length

BEYOND, SHORT = 64, 16  # tokens of the long prompt beyond the budget, and of the short one
OF_A_RATIO = 2048  # tokens of the long prompt, where the budget follows its length


def compile_ahead(model: Any, max_new_tokens: int = 256) -> None:
    """Compile what single prompts without padding need: longer than the budget, or not; and the steps behind them.

    Random prompts are answered until a step has run. Sizes are symbols of the graphs, so that other lengths find them;
    a batch, padding, embeddings have graphs of their own.

    Args:
        model: from specpass.compile.
        max_new_tokens: of the answers to come; a constant of the steps' graphs is the room for them.
    """
    backend = base_of(model)._specpass.backend
    ahead = backend.method.look_ahead(max_new_tokens)
    count = ahead + 2 * backend.speculate + 3  # the lookahead's tokens may all come free, and two proposals too
    for length in lengths(backend.method, model.config):
        _answer(model, length, max_new_tokens, count)
        progress.advance()


def lengths(method: Method, config: Any) -> tuple[int, ...]:
    """Tokens of the prompts: a long one, which is pruned, and a short one, which is kept whole."""
    prompt = method.prompt
    budgets = [method.budget, 0 if prompt is None else prompt.budget]
    numbers = [budget for budget in budgets if isinstance(budget, int)]
    long = OF_A_RATIO if len(numbers) < len(budgets) else max(numbers) + BEYOND
    most = context_length(config)
    return (long if most is None else min(long, most), min(SHORT, long))


def _answer(model: Any, length: int, max_new_tokens: int, count: int) -> None:
    """Read a random prompt [1, S] and write `count` tokens behind it, with room for `max_new_tokens`."""
    generator = torch.Generator().manual_seed(0)
    words = min(config.get_text_config(decoder=True).vocab_size for config in _configs(model))
    ids = torch.randint(words, (1, length), generator=generator).to(model.device)

    def enough(written: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((1,), written.shape[1] >= length + count, device=written.device)

    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        min_new_tokens=min(count, max_new_tokens),
        stopping_criteria=[enough],
        do_sample=False,
        pad_token_id=0,
    )


def _configs(model: Any) -> list[Any]:
    draft = base_of(model)._specpass.backend.draft
    return [model.config, *([] if draft is None else [draft.config])]
