"""Follow a layer's keys and values from the cache to the attention that reads them, and hand that call over."""

from __future__ import annotations

import dataclasses
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from specpass.interpret.made import WRITES, Recipe, tensors_of

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

    def of_heads(self, heads: int) -> Attention:
        """With queries [B, heads, R, D]: the last R rows of a call, whose number is not known in advance."""
        batch, own, rows, _ = self.query.shape
        return self if own == heads or (own * rows) % heads or batch == 0 else self.unfolded(own * rows // heads)


class Listener:
    """Who is told of a model's keys, values and attention while it runs uncompiled."""

    watch: Watch | None  # None where no attention is of interest

    def update(self, key: Tensor, value: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        """A layer's new keys [B, K, q, D] and values; what the model's attention is to read."""
        raise NotImplementedError

    def attend(self, layer: int, call: Attention, made: bool) -> Tensor:
        """The attention call that reads a layer's keys and values, or what was `made` of them; its result."""
        raise NotImplementedError

    def finish(self) -> None:
        """The model's forward is over."""


class Watch(TorchFunctionMode):
    """Follows tensors by identity, through views, and what is made of them; a call that reads none runs as it is.

    It holds none of them: what the model drops is free, and what it hands to another layer (shared K/V) is followed.
    Only what is made of the last layer's is held, where it `records`, until attention has read it.
    """

    def __init__(self, listener: Listener, records: bool = False) -> None:
        super().__init__()
        self.listener, self.records = listener, records
        self.followed: dict[int, tuple[weakref.ref[Tensor], int, str]] = {}
        self.recipe: Recipe | None = None
        self.copied: dict[int, tuple[weakref.ref[Tensor], weakref.ref[Tensor]]] = {}  # and of what

    def source(self, tensor: Tensor | None) -> Tensor | None:
        """What a tensor is a copy of, on another device (accelerate copies a mask for each layer), else itself."""
        found = self.copied.get(id(tensor))
        before = None if found is None or found[0]() is not tensor else found[1]()
        return tensor if before is None else before

    def follow(self, layer: int, key: Tensor, value: Tensor) -> None:
        self.recipe = Recipe(key, value) if self.records else None
        self._note(key, layer, "key")
        self._note(value, layer, "value")

    def _note(self, tensor: Tensor, layer: int, what: str) -> None:
        self.followed[id(tensor)] = (weakref.ref(tensor), layer, what)

    def _known(self, tensor: Any) -> tuple[int, str] | None:
        """Layer, and "key", "value" or "made", of a tensor that is followed; who is gone may have left its id."""
        found = self.followed.get(id(tensor))
        return None if found is None or found[0]() is not tensor else found[1:]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is SDPA:
            call = Attention.of(args, kwargs)
            key, value = self._known(call.key), self._known(call.value)
            known = key or value
            if known is None:
                return func(*args, **kwargs)
            out = self.listener.attend(known[0], call, (key, value) != ((known[0], "key"), (known[0], "value")))
            self.recipe = None
            return out
        out = func(*args, **kwargs)
        if func is Tensor.to and out.device != args[0].device and out.dtype == args[0].dtype:
            self.copied[id(out)] = (weakref.ref(out), weakref.ref(args[0]))
        if self.followed:
            self._follow_on(func, args, kwargs, out)
        return out

    def _follow_on(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        """What a call returned is followed where something that it was given is."""
        given = [known for arg in (*args, *kwargs.values()) for part in tensors_of(arg) if (known := self._known(part))]
        results = list(tensors_of(out if func not in WRITES else args[:1]))
        if not given or not results:
            return
        if self.recipe is not None:
            self.recipe.note(func, args, kwargs, out)
        layer = max(given)[0]
        viewed = self._known(args[0]) if func in VIEWS and args else None
        for result in results:
            self._note(result, *(viewed or (layer, "made")))

    def reads(self, tensor: Tensor, layer: int) -> bool:
        """Whether a tensor is made of a layer's keys or values."""
        known = self._known(tensor)
        return known is not None and known[0] == layer
