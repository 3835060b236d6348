"""Keys and values that a model makes of what it caches, on the way to attention: of MLA's latents (arXiv 2405.04434).

The calls are written down while they run. That no column's result depends on another, or on where it stands, is then
found by running them once more, on the same columns in another order with one of them changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

WRITES = (Tensor.__setitem__,)  # return nothing, and change their first operand
TOLERANCE = 1e-4  # relative to the largest number; 16 bits: 2e-2


class Recipe:
    """The calls from a layer's cached `key` [B, K, T, D] and `value` on. They are held until attention has run."""

    def __init__(self, key: Tensor, value: Tensor) -> None:
        self.sources = (key, value)
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        self.calls.append((func, args, kwargs, out))

    def keeps_apart(self, axis: int, *results: Tensor) -> bool:
        """Whether what stands at a place of `axis` in the results depends on what is cached there, and on no place."""
        size = self.sources[0].shape[axis]
        if any(tensor.dim() != 4 or tensor.shape[axis] != size for tensor in (*self.sources, *results)):
            return False
        turned = [source.flip(axis) for source in self.sources]
        for source in turned:
            source.select(axis, -1).add_(1.0)
        try:
            again = self._run(turned, results)
        except Exception:  # whatever these calls are, they cannot be run once more
            return False
        others = size - 1
        return all(
            near(other.flip(axis).narrow(axis, 1, others), result.narrow(axis, 1, others))
            for other, result in zip(again, results, strict=True)
        )

    def _run(self, sources: list[Tensor], results: tuple[Tensor, ...]) -> list[Tensor]:
        new = {id(old): source for old, source in zip(self.sources, sources, strict=True)}
        for func, args, kwargs, out in self.calls:
            args, kwargs = tree_map(lambda part: new.get(id(part), part), (args, kwargs))
            for old, other in zip(tensors_of(out), tensors_of(func(*args, **kwargs)), strict=True):
                new[id(old)] = other
        return [new[id(result)] for result in results]


def tensors_of(out: Any) -> Iterator[Tensor]:
    """Tensors among what a call returned or was given: itself, or the items of a tuple or list."""
    if isinstance(out, Tensor):
        yield out
    elif isinstance(out, (tuple, list)):
        yield from (part for part in out if isinstance(part, Tensor))


def near(ours: Tensor, theirs: Tensor) -> bool:
    if not theirs.numel():
        return True
    tolerance = TOLERANCE if theirs.dtype in (torch.float32, torch.float64) else 2e-2
    return bool((ours.float() - theirs.float()).abs().max() <= tolerance * theirs.float().abs().max())
