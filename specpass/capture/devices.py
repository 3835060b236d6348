"""Where a model computes: accelerate's hooks say it (`device_map`), of weights without a hook the place they lie in."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from specpass.observe.layers import decoder_layers


def devices_of(model: nn.Module) -> list[torch.device]:
    """Devices that a model computes on, in the order of its modules, each once.

    Weights that wait on the CPU or on disk compute where their hook sends them. Those on the meta device, without a
    hook, compute nowhere.
    """
    found: dict[torch.device, None] = {}
    _gather(model, None, found)
    return list(found)


def device_of(model: nn.Module) -> torch.device:
    """Where a model computes, or the first module of one that is spread."""
    for module in model.modules():
        told = _told(module)
        if told:
            return told[0]
    return next(model.parameters()).device


def spread_over(model: nn.Module) -> str:
    """The devices of a model that is spread over several, in words; "" of one that is not."""
    devices = devices_of(model)
    return " and ".join(map(name_of, devices)) if len(devices) > 1 else ""


def name_of(device: torch.device) -> str:
    """cuda and cuda:0 are one."""
    return str(_plain(device))


def _gather(module: nn.Module, above: list[torch.device] | None, found: dict[torch.device, None]) -> None:
    """Args: above: what the hook of a module around this one says; it moves what that one is given."""
    told = _told(module)
    if told or above is None:
        own = told or [weight.device for weight in module.parameters(recurse=False)]
        found.update((_plain(device), None) for device in own if device.type != "meta")
    for child in module.children():
        _gather(child, told or above, found)


def _told(module: nn.Module) -> list[torch.device]:
    hook: Any = getattr(module, "_hf_hook", None)
    places = [getattr(each, "execution_device", None) for each in (hook, *getattr(hook, "hooks", ()))]
    return [torch.device(place) for place in places if place is not None]


def _plain(device: torch.device) -> torch.device:
    """With its number, of a CPU without."""
    return torch.device("cpu") if device.type == "cpu" else torch.device(device.type, device.index or 0)


def parts_by_device(target: Any, draft: Any) -> dict[str, list[str]]:
    """By the name of each device what computes there; {} where neither model is spread over several."""
    spread = [model for model in (target, draft) if model is not None and spread_over(model)]
    if not spread:
        return {}
    found: dict[str, list[str]] = {}
    for model, whose in ((target, ""), (None if draft is target else draft, "the draft's ")):
        if model is None:
            continue
        for device, part in _parts(model):
            found.setdefault(device, []).append(f"{whose}{part}")
    return found


def _parts(model: Any) -> Iterator[tuple[str, str]]:
    """Device and part, in the order of a forward."""
    layers = decoder_layers(model)
    if not layers:
        yield from ((name_of(device), "weights") for device in devices_of(model))
        return
    yield from ((name_of(device), "embeddings") for device in devices_of(model.get_input_embeddings()))
    runs: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        for device in devices_of(layer):
            runs.setdefault(name_of(device), []).append(index)
    for device, numbers in runs.items():
        yield device, f"layers {', '.join(_ranges(numbers))}"
    head = model.get_output_embeddings()
    if head is not None:
        yield from ((name_of(device), "head") for device in devices_of(head))


def _ranges(numbers: Sequence[int]) -> Iterator[str]:
    """Ascending numbers 0, 1, 2, 5 -> "0 .. 2", "5"."""
    for _, run in itertools.groupby(enumerate(numbers), key=lambda item: item[1] - item[0]):
        first, *rest = (number for _, number in run)
        yield f"{first} .. {rest[-1]}" if rest else str(first)
