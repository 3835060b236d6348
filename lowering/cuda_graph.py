"""Replay a decode step as one CUDA graph: no Python, no launch overhead, no allocation inside the step.

before: call = graph.forward                    hundreds of launches from Python
after:  call 1 runs them (and compiles what is compiled on first use); call 2 records; from then on one replay a step

The cache is written in place and keeps its address for a whole generation, so its tensors and the weights are recorded
as they are; the step's own inputs (token ids, positions) are copied into the recording's buffers. A new cache, or one
that grew, has other addresses and is recorded anew. Recording does not run anything, so no token is written twice.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from specpass.graph.roles import role_of

KEPT = 4  # recordings of one graph: a recording pins its buffers' memory


class Recorder(Protocol):
    """Records `run(*args)`: its outputs' buffers, and what fills them again. Tests stand in for CUDA."""

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Callable[[], None]]: ...


def record_cuda(run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Callable[[], None]]:
    """Record on the current CUDA device."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = run(*args)
    return outputs, graph.replay


@dataclasses.dataclass
class _Recording:
    inputs: dict[int, Tensor]
    outputs: Any
    replay: Callable[[], None]


class GraphedStep:
    """A decode step that records itself on its second call with the same addresses.

    Args: run: the lowered graph; its tensors come in Dynamo's order. moving: indices of inputs that differ in each
    step. record: see Recorder.
    """

    def __init__(self, run: Callable[..., Any], moving: tuple[int, ...], record: Recorder = record_cuda) -> None:
        self.run, self.moving, self.record = run, moving, record
        self.recordings: collections.OrderedDict[tuple[Any, ...], _Recording | None] = collections.OrderedDict()

    def __call__(self, *args: Any) -> tuple[Any, ...]:
        key = self._key(args)
        if key not in self.recordings:
            while len(self.recordings) >= KEPT:
                self.recordings.popitem(last=False)
            self.recordings[key] = None
            return tuple(self.run(*args))
        recording = self.recordings[key]
        if recording is None:
            inputs = {index: args[index].clone() for index in self.moving}
            fixed = tuple(inputs.get(index, arg) for index, arg in enumerate(args))
            recording = _Recording(inputs, *self.record(self.run, fixed))
            self.recordings[key] = recording
        for index, buffer in recording.inputs.items():
            buffer.copy_(args[index])
        recording.replay()
        # The next replay overwrites the buffers, and a caller may keep what it got.
        return tuple(out.clone() if isinstance(out, Tensor) else out for out in recording.outputs)

    def _key(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(
            tuple(arg.shape) if index in self.moving else arg.data_ptr() if isinstance(arg, Tensor) else arg
            for index, arg in enumerate(args)
        )


def moving_inputs(gm: fx.GraphModule) -> tuple[int, ...]:
    """Inputs that the caller makes anew for each step: token ids, positions, masks."""
    return tuple(
        index
        for index, node in enumerate(gm.graph.find_nodes(op="placeholder"))
        if isinstance(node.meta.get("val"), Tensor) and role_of(node.meta.get("specpass_source", "")) is not None
    )


def on_cuda(gm: fx.GraphModule) -> bool:
    """Whether the graph's inputs live on a CUDA device (the cache's handle does not count: it is never read)."""
    return any(
        isinstance(val := node.meta.get("val"), Tensor) and val.device.type == "cuda"
        for node in gm.graph.find_nodes(op="placeholder")
    )
