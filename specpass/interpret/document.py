"""A document read by a target's own forward, which keeps all of its keys and values for questions to come."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from specpass.cache.budget import BudgetCache
from specpass.cache.prefix import Pair
from specpass.interpret.run import listening
from specpass.interpret.watch import Listener
from specpass.observe.layers import reading_by_layers


class ReadDocument(Listener):
    """Keys and values of each layer, on `device` as soon as the layer has made them; None: where it made them."""

    def __init__(self, device: Any) -> None:
        self.device, self.watch = device, None
        self.layers: dict[int, Pair] = {}

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.layers[layer] = (placed(key, self.device), placed(value, self.device))
        return key, value


def placed(states: Tensor, device: Any) -> Tensor:
    """A copy on `device`, None: where they lie, in a storage of its own: they may be a part of something larger."""
    return states.detach().to(device or states.device, memory_format=torch.contiguous_format, copy=True)


def read_document(target: nn.Module, cache: BudgetCache, ids: Tensor, device: Any) -> dict[int, Pair]:
    """Keys and values of ids [1, P] by layer; `cache` stays empty."""
    listener, names = ReadDocument(device), inspect.signature(target.forward).parameters
    told: dict[str, Any] = {"input_ids": ids, "past_key_values": cache, "use_cache": True}
    if "position_ids" in names:
        told["position_ids"] = torch.arange(ids.shape[1], device=ids.device)[None]
    if "logits_to_keep" in names:
        told["logits_to_keep"] = 1
    cache.columns = 0
    try:
        with reading_by_layers(target, "reading the document"), listening(cache, listener):
            target._call_impl(**told)
    finally:
        cache.columns = None
    return listener.layers
