"""Devices that a test can have any number of: tensors that say they lie on lazy:0, lazy:1, ..., with values on the CPU.

An operator whose operands lie on several of them fails, as on GPUs; what is copied from one to another is counted. The
name is that of a device type which torch knows in every build and which nothing here uses otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import accelerate
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

FIRST, SECOND = "lazy:0", "lazy:1"
Copy = tuple[torch.device, torch.device, torch.dtype, tuple[int, ...]]  # from, to, what


class Twin(Tensor):
    """A CPU tensor, `held`, that says it lies elsewhere."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | None = None, **_: Any) -> Any:
        if device is None:  # accelerate makes a parameter of its class anew, of what it has moved
            return held if isinstance(held, Twin) else torch.nn.Parameter(held, requires_grad=False)
        layout: dict[str, Any] = {"strides": held.stride(), "storage_offset": held.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, held.shape, dtype=held.dtype, device=device, **layout)
        made.held = held
        return made

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, [])

    def tolist(self) -> Any:
        return self.held.tolist()

    def __repr__(self, **_: Any) -> str:
        return f"Twin({self.held}, {self.device})"


def run(func: Any, args: Any, kwargs: dict[str, Any], copies: list[Copy]) -> Any:
    """One operator on what twins hold; its results are twins on the same device, or where they were asked for.

    Raises: RuntimeError: operands lie on several devices. Only a number of the CPU goes with any.
    """
    given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    places = {tensor.device for tensor in given if tensor.dim() or tensor.device.type != "cpu"}
    copied = func.overloadpacket in (torch.ops.aten._to_copy, torch.ops.aten.copy_)
    if len(places) > 1 and not copied:
        raise RuntimeError(f"{func}: operands on {sorted(map(str, places))}")
    args_held, kwargs_held = tree_map(lambda part: part.held if isinstance(part, Twin) else part, (args, kwargs))
    place = given[0].device if copied else next(iter(places), torch.device("cpu"))
    if kwargs_held.get("device") is not None:
        source, place = place, torch.device(kwargs_held["device"])
        kwargs_held["device"] = place if place.type == "meta" else "cpu"
        if copied and place != source:
            copies.append((source, place, given[0].dtype, tuple(given[0].shape)))
    out = func(*args_held, **kwargs_held)
    if place.type in ("cpu", "meta"):
        return out
    known = {id(tensor.held): tensor for tensor in given if isinstance(tensor, Twin)}  # written in place
    return tree_map(lambda part: known.get(id(part), Twin(part, place)) if isinstance(part, Tensor) else part, out)


class _Operators(TorchDispatchMode):
    def __init__(self, copies: list[Copy]) -> None:
        super().__init__()
        self.copies = copies

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, self.copies)


class _FromLists(TorchFunctionMode):
    """torch.tensor([...], device=...) asks no operator for a tensor there."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        told = dict(kwargs or {})
        device = told.pop("device", None) if func in (torch.tensor, torch.as_tensor) else None
        return func(*args, **(kwargs or {})) if device is None else func(*args, **told).to(device)


@contextlib.contextmanager
def twin_devices() -> Iterator[list[Copy]]:
    """Inside, there are such devices; what is copied between them so far."""
    copies: list[Copy] = []
    known = torch.is_autocast_enabled
    enabled = mock.patch("torch.is_autocast_enabled", lambda kind="cpu": kind != "lazy" and known(kind))
    with enabled, _FromLists(), _Operators(copies):
        yield copies


def spread(model: Any, first: int = 1, places: Mapping[str, str] | None = None, folder: Path | None = None) -> Any:
    """A tiny decoder by accelerate's hooks: `first` layers, and what is in front of them, on lazy:0, others on lazy:1.

    Args: places: of some modules other ones; a layer's parts in its place. folder: for what is to lie on disk.
    """
    found = {"lm_head": FIRST if model.config.tie_word_embeddings else SECOND}
    for name, part in model.model.named_children():
        if name == "layers":
            found |= {f"model.layers.{index}": FIRST if index < first else SECOND for index in range(len(part))}
        else:
            found[f"model.{name}"] = SECOND if name == "norm" or "unembed" in name else FIRST
    for name, place in (places or {}).items():
        found.pop(name.rpartition(".")[0], None)
        found[name] = place
    keys = model._skip_keys_device_placement
    return accelerate.dispatch_model(model, found, main_device=FIRST, skip_keys=keys, offload_dir=folder)
