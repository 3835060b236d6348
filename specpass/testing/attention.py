"""Attention probabilities of a transformers decoder, layer by layer, without knowing the model.

Two routes: `capture` replaces the function that transformers calls for attn_implementation="sdpa" for the
time of one forward; `probabilities_by_output` asks transformers' eager attention for its weights. Symbols as
in eager.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS


@contextmanager
def sdpa_replaced(function: Callable[..., Any]) -> Iterator[None]:
    """Let models with attn_implementation="sdpa" call `function`, and put everything back afterwards."""
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = local.get("sdpa")
    ALL_ATTENTION_FUNCTIONS["sdpa"] = function
    try:
        yield
    finally:
        if before is None:
            del ALL_ATTENTION_FUNCTIONS["sdpa"]
        else:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = before


def _row_probabilities(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float | None, rows: int
) -> torch.Tensor:
    """Float32 softmax of the last `rows` queries [1, H, T, D] over keys [1, K, T, D] -> [K, G * rows, T]."""
    (_, heads, _, size), (_, kv_heads, length, _) = query.shape, key.shape
    last = query[0, :, -rows:].float().reshape(kv_heads, (heads // kv_heads) * rows, size)
    scores = last @ key[0].float().transpose(-1, -2) * (size**-0.5 if scale is None else scale)
    scores = scores.view(kv_heads, heads // kv_heads, rows, length)
    if mask is None:
        at = torch.arange(length - rows, length, device=key.device)
        scores = scores.masked_fill(torch.arange(length, device=key.device) > at[:, None], float("-inf"))
    elif mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask[0, :, -rows:, :length], float("-inf"))
    else:
        scores = scores + mask[0, :, -rows:, :length].float()
    return scores.softmax(-1).view(kv_heads, -1, length)


def moves(probabilities: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """[K, M, T]: how far each of M rows' output moves where one column goes and the others share its attention.

    By the definition (ReST-KV, arXiv 2605.08840): [K, M, T, D] is made. Args: probabilities [K, M, T]; value [K, T, D].
    """
    p, v = probabilities.double(), value.double()
    out = p @ v
    without = (out[:, :, None] - p[..., None] * v[:, None]) / (1 - p)[..., None]
    return (out[:, :, None] - without).norm(dim=-1).float()


@contextmanager
def capture(model: PreTrainedModel, rows: int, outputs: bool = False) -> Iterator[list[torch.Tensor]]:
    """Collect the float32 probabilities [K, G * rows, T] of the last `rows` queries, one tensor a layer.

    Args: outputs: what each column's going would do to the rows' outputs, in their place (see moves).

    Takes post-rotary queries and keys where the model hands them to SDPA: memory is [rows, T] per layer, so
    it serves long prompts, and the softmax is float32 whatever the model's dtype.
    """
    assert model.config._attn_implementation == "sdpa", "the capture route needs attn_implementation='sdpa'"
    plain, found = ALL_ATTENTION_FUNCTIONS["sdpa"], []

    def attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
        own = _row_probabilities(query, key, attention_mask, kwargs.get("scaling"), rows)
        found.append(moves(own, value[0]) if outputs else own)
        return plain(module, query, key, value, attention_mask, **kwargs)

    with sdpa_replaced(attend):
        yield found
    assert len(found) == model.config.num_hidden_layers, f"{len(found)} attention calls seen"


@torch.no_grad()
def probabilities_by_capture(
    model: PreTrainedModel, ids: torch.Tensor, rows: int, outputs: bool = False
) -> list[torch.Tensor]:
    """What `capture` finds, per layer, of the last `rows` tokens of `ids` [1, T]."""
    with capture(model, rows, outputs) as found:
        model(input_ids=ids, use_cache=False, logits_to_keep=1)
    return found


@torch.no_grad()
def probabilities_by_output(model: PreTrainedModel, ids: torch.Tensor, rows: int) -> list[torch.Tensor]:
    """As `probabilities_by_capture`, from `output_attentions` of transformers' eager attention.

    The architecture-free oracle (soft caps, odd scales and sliding windows included); it makes [H, T, T] per
    layer and computes in the model's dtype, so it is for tiny float32 models.
    """
    cache, before = DynamicCache(), model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        out = model(input_ids=ids, past_key_values=cache, output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    kv_heads, length = cache.layers[0].keys.shape[1], ids.shape[1]
    return [layer[0, :, -rows:].float().reshape(kv_heads, -1, length) for layer in out.attentions]
