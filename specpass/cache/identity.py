"""Which model it is, by its config and its weights: what one of them has read is of no use to another."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import Any

import torch
from torch import Tensor, nn

# What a config says beside the model: where it came from, how it is run, and how its answers end.
BESIDE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "return_dict")
SAMPLES = 16  # numbers of each weight


@dataclasses.dataclass(frozen=True)
class Identity:
    """One model, as text.

    Args:
        name: where it was loaded from, for messages.
        config: SHA-256 of its text config. weights: SHA-256 of names, shapes and 16 numbers of each weight.
        dtype: of its weights.
    """

    name: str
    config: str
    weights: str
    dtype: str

    @classmethod
    def of(cls, model: nn.Module) -> Identity:
        """Of a Hugging Face model, adapters included."""
        config: Any = model.config
        text = config.get_text_config(decoder=True)
        told = {name: value for name, value in text.to_dict().items() if name not in BESIDE}
        digest = hashlib.sha256(json.dumps(told, sort_keys=True, default=str).encode()).hexdigest()
        name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
        dtype = str(getattr(model, "dtype", None)).removeprefix("torch.")
        return cls(name, digest, _weights_digest(model), dtype)


def _weights_digest(model: nn.Module) -> str:
    digest, samples = hashlib.sha256(), []
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)}\n".encode())
        if weight.device.type != "meta":  # offloaded: known by its name and shape
            samples.append(_some(weight.detach()))
    for name, module in model.named_modules():  # adapters that are switched, switched off or merged
        state = [getattr(module, key, None) for key in ("active_adapters", "disable_adapters", "merged_adapters")]
        if isinstance(state[1], bool):
            digest.update(f"{name} {state}\n".encode())
    if samples:
        digest.update(_on_host(samples).numpy().tobytes())
    return digest.hexdigest()


def _on_host(samples: list[Tensor]) -> Tensor:
    """All of them in order, by one copy where they lie on one device."""
    if len({sample.device for sample in samples}) > 1:
        samples = [sample.cpu() for sample in samples]
    return torch.cat(samples).cpu()


def _some(weight: Tensor) -> Tensor:
    """[n] float32 numbers of a weight, evenly spread; none of those whose class has no plain numbers."""
    try:
        flat = weight.reshape(-1)
        return flat[:: max(1, flat.numel() // SAMPLES)][:SAMPLES].float()
    except (NotImplementedError, RuntimeError, TypeError):  # quantised weights of a class of their own
        return torch.empty(0, device=weight.device)
