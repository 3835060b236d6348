"""Follow a layer's keys and values from the cache to the attention that reads them, and hand that call over."""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

# What repeat_kv and models' reshapes are made of: element order stays, heads may be repeated in place.
VIEWS = frozenset(
    {
        Tensor.__getitem__,
        Tensor.expand,
        Tensor.reshape,
        Tensor.view,
        Tensor.contiguous,
        Tensor.unsqueeze,
        Tensor.flatten,
        Tensor.clone,
        Tensor.repeat_interleave,
        torch.repeat_interleave,
        torch.reshape,
        torch.unsqueeze,
        torch.flatten,
    }
)
SDPA = F.scaled_dot_product_attention
_OPERANDS = inspect.signature(
    lambda query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False: None
)


@dataclasses.dataclass(frozen=True)
class Attention:
    """One call of scaled_dot_product_attention: query [B, H, q, D], key [B, H or K, T, D], value [B, H or K, T, Dv]."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    is_causal: bool
    scale: float
    run: Callable[[], Tensor]  # the model's own

    @classmethod
    def of(cls, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Attention:
        given = _OPERANDS.bind(*args, **kwargs)
        given.apply_defaults()
        query, key, value, mask, _, is_causal, scale, _ = given.arguments.values()
        scale = 1.0 / math.sqrt(query.shape[-1]) if scale is None else float(scale)
        return cls(query, key, value, mask, bool(is_causal), scale, lambda: SDPA(*args, **kwargs))

    def unfolded(self, count: int) -> Attention:
        """With queries [B, H, count, D]: for one token transformers folds a KV head's group into the query length."""
        if self.query.shape[2] == count:
            return self
        query = self.query.reshape(self.query.shape[0], -1, count, self.query.shape[3])
        return dataclasses.replace(self, query=query)


class Listener:
    """Who is told of a model's keys, values and attention while it runs uncompiled."""

    watch: Watch | None  # None where no attention is of interest

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's new keys [B, K, q, D] and values; what the model's attention is to read."""
        raise NotImplementedError

    def attend(self, layer: int, call: Attention) -> Tensor:
        """The attention call that reads a layer's keys and values; its result."""
        raise NotImplementedError

    def finish(self) -> None:
        """The model's forward is over."""


class Watch(TorchFunctionMode):
    """Follows tensors by identity, through views alone; a call that reads anything else runs as it is."""

    def __init__(self, listener: Listener) -> None:
        super().__init__()
        self.listener = listener
        self.followed: dict[int, tuple[Tensor, int, str]] = {}  # held, so that no other tensor takes the id

    def follow(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.followed[id(key)] = (key, layer, "key")
        self.followed[id(value)] = (value, layer, "value")

    def release(self, layer: int) -> None:
        """Forget a layer's tensors."""
        self.followed = {name: held for name, held in self.followed.items() if held[1] != layer}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            call = Attention.of(args, kwargs)
            key, value = (self.followed.get(id(tensor)) for tensor in (call.key, call.value))
            if key is not None and value is not None and (key[1:], value[1:]) == ((key[1], "key"), (key[1], "value")):
                return self.listener.attend(key[1], call)
            return func(*args, **kwargs)
        out = func(*args, **kwargs)
        if self.followed and func in VIEWS and args:
            held = self.followed.get(id(args[0]))
            if held is not None and isinstance(out, Tensor):
                self.followed[id(out)] = (out, *held[1:])
        return out
