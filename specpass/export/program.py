"""A graph on its way to ONNX: plain ATen, named inputs and outputs, real weights."""

from __future__ import annotations

import dataclasses

from torch import Tensor, fx

from specpass.rewrite import Kind


@dataclasses.dataclass
class Program:
    """One graph in plain ATen: placeholders are `inputs`, then `weights`; it returns `outputs`."""

    graph: fx.GraphModule
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    weights: dict[str, Tensor]  # by the name that the ONNX initializer gets

    @property
    def kind(self) -> Kind:
        """What the graph does, for the passes."""
        return "decode" if "lengths" in self.inputs else "prefill"


@dataclasses.dataclass
class Capture:
    """Prefill and decode, with what the runtime must know of them."""

    prefill: Program
    decode: Program
    kv: list[tuple[int, int, int]]  # K, D, Dv of each layer


def names(kind: str, layers: int) -> list[str]:
    """`present.0.key`, `present.0.value`, ... of all layers."""
    return [f"{kind}.{layer}.{part}" for layer in range(layers) for part in ("key", "value")]
