"""What a KV cache occupies, and what a decode step reads of the weights."""

from __future__ import annotations

from typing import Any

import torch


def cache_bytes(cache: Any) -> int:
    """Bytes of the distinct storages reachable from a cache and its layers."""
    storages: dict[int, int] = {}
    stack: list[Any] = [cache, *cache.layers]
    while stack:
        item = stack.pop()
        if isinstance(item, torch.Tensor):
            storages[item.untyped_storage().data_ptr()] = item.untyped_storage().nbytes()
        elif isinstance(item, list | tuple):
            stack += [part for part in item if isinstance(part, torch.Tensor | list | tuple | dict)]
        elif isinstance(item, dict):
            stack += [part for part in item.values() if isinstance(part, torch.Tensor | list | tuple | dict)]
        elif hasattr(item, "__dict__"):
            stack.append(vars(item))
    return sum(storages.values())


def step_weight_bytes(model: Any) -> int:
    """Bytes of a Hugging Face decoder's weights that a decode step reads: all but an untied input embedding."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    weights = {p.data_ptr(): p.numel() * p.element_size() for p in model.parameters()}
    if head.weight.data_ptr() != embedding.weight.data_ptr():
        weights.pop(embedding.weight.data_ptr())
    return sum(weights.values())
