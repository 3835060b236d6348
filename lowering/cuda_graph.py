"""Replay a step as one CUDA graph: no Python, no launch overhead, no allocation inside the step.

before: call = graph.forward                    hundreds of launches from Python
after:  call 1 of a shape runs them (and compiles what is compiled on first use); call 2 records; then one replay a step

What a step reads is of four kinds: "moving" inputs (token ids, positions) are copied into the recording's buffers,
"fixed" ones (weights) are read where they lie, "state" is what it writes in place (a cache), "unread" is not read.

A recording knows addresses. A target's cache is another one in each generation, so a recording keeps the storage that
it was made with, and a new cache of the same shapes moves in (one copy) once nothing else reads that storage. A draft's
cache lives for one prompt and is as long as the prompt: its recordings keep nothing alive, and serve what lies at the
same addresses. Recording runs nothing, so no token is written twice.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, TypeAlias

import torch
from torch import Tensor, fx, nn
from torch.utils._pytree import tree_map

from specpass.graph.operands import GetItem
from specpass.graph.roles import role_of
from specpass.kernels.readers import readers
from specpass.kernels.recording import record

KEPT = 4  # recordings of one graph: each holds its buffers
Kind: TypeAlias = Literal["moving", "fixed", "state", "unread"]


class Recorder(Protocol):
    """Records `run(*args)`: its outputs' buffers, and what fills them again. Tests stand in for CUDA."""

    def __call__(self, run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Callable[[], None]]: ...


def record_cuda(run: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, Callable[[], None]]:
    """Record on the device of the step's tensors; other threads may go on using it."""
    device = _device(args)
    assert device is not None, "a step on CUDA"
    return record(lambda: run(*args), device)


@dataclasses.dataclass(eq=False)
class _Recording:
    key: tuple[Any, ...]
    inputs: dict[int, Tensor]
    addresses: tuple[int, ...]
    state: dict[int, Tensor]  # by the argument's index; empty where the caller's tensors are not kept
    outputs: Any
    replay: Callable[[], None]

    @property
    def free(self) -> bool:
        """Whether nobody but the recording reads the storage that it keeps."""
        return bool(self.state) and all(readers(tensor) == 1 for tensor in self.state.values())


class GraphedStep:
    """A step that records itself on the second call with the same shapes.

    Args:
        run: the lowered graph. kinds: of its inputs, in their order.
        keeps: whether recordings keep the state's storage for a later cache (see above).
        refused: told in one line why a step cannot be recorded; from then on it runs as it is.
        record: see Recorder.
    """

    def __init__(
        self,
        run: Callable[..., Any],
        kinds: Sequence[Kind],
        keeps: bool = True,
        refused: Callable[[str], None] = lambda why: None,
        record: Recorder = record_cuda,
    ) -> None:
        self.run, self.kinds, self.keeps, self.refused, self.record = run, tuple(kinds), keeps, refused, record
        self.state = tuple(index for index, kind in enumerate(kinds) if kind == "state")
        self.recordings: list[_Recording] = []  # the last used one last
        self.ran: dict[tuple[Any, ...], None] = {}  # shapes that have run once, the last few
        self.lock = threading.Lock()  # a recording has one set of buffers
        self.off = False

    def __call__(self, *args: Any) -> Any:
        if self.off:
            return self.run(*args)
        with self.lock:
            key = self._key(args)
            recording = self._find(key, args)
            if recording is None:
                if key not in self.ran:
                    self.ran = dict.fromkeys([*self.ran, key][-2 * KEPT :])
                    return self.run(*args)
                recording = self._record(key, args)
                if recording is None:
                    return self.run(*args)
            for index, buffer in recording.inputs.items():
                buffer.copy_(args[index])
            recording.replay()
            # The next replay overwrites the buffers, and a caller may keep what it got.
            return tree_map(lambda out: out.clone() if isinstance(out, Tensor) else out, recording.outputs)

    def _find(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> _Recording | None:
        """The recording for these arguments, whose state has moved into the one that it knows."""
        addresses = tuple(args[index].data_ptr() for index in self.state)
        alike = [recording for recording in self.recordings if recording.key == key]
        found = next((recording for recording in alike if recording.addresses == addresses), None)
        if found is None:
            found = next((recording for recording in alike if recording.free), None)
            if found is None:
                return None
            for index, kept in found.state.items():
                kept.copy_(args[index])
                args[index].set_(kept)
        self.recordings.remove(found)
        self.recordings.append(found)
        return found

    def _record(self, key: tuple[Any, ...], args: tuple[Any, ...]) -> _Recording | None:
        inputs = {index: args[index].clone() for index, kind in enumerate(self.kinds) if kind == "moving"}
        state = {index: args[index].detach() for index in self.state} if self.keeps else {}
        own: dict[int, Tensor] = {**inputs, **state}
        try:
            outputs, replay = self.record(self.run, tuple(own.get(index, arg) for index, arg in enumerate(args)))
        except RuntimeError as error:  # an operator that waits for the device, or allocates outside of torch
            self.off = True
            self.recordings.clear()
            self.refused(str(error).strip().splitlines()[0])
            return None
        addresses = tuple(args[index].data_ptr() for index in self.state)
        made = _Recording(key, inputs, addresses, state, outputs, replay)
        self.recordings = [*self.recordings, made][-KEPT:]
        return made

    def _key(self, args: tuple[Any, ...]) -> tuple[Any, ...]:
        """All that a recording depends on but the state's addresses; two streams' replays must not meet in one."""
        parts: list[Any] = [torch.is_inference_mode_enabled(), _stream(args)]
        for kind, arg in zip(self.kinds, args, strict=True):
            if kind == "fixed":
                parts.append(arg.data_ptr() if isinstance(arg, Tensor) else arg)
            elif kind != "unread":
                parts.append((arg.shape, arg.stride(), arg.dtype))
        return tuple(parts)


class GraphedModule(nn.Module):
    """A subgraph that records itself, as a module that a graph can call."""

    def __init__(self, step: GraphedStep) -> None:
        super().__init__()
        self.step = step

    def forward(self, *args: Any) -> Any:
        return self.step(*args)


def _device(args: tuple[Any, ...]) -> torch.device | None:
    return next((arg.device for arg in args if isinstance(arg, Tensor) and arg.is_cuda), None)


def _stream(args: tuple[Any, ...]) -> int:
    device = _device(args)
    return 0 if device is None else torch.cuda.current_stream(device).cuda_stream


def input_kinds(gm: fx.GraphModule) -> tuple[Kind, ...]:
    """Of a decode step's inputs, by where Dynamo read them."""
    return tuple(_kind(node) for node in gm.graph.find_nodes(op="placeholder"))


def _kind(node: fx.Node) -> Kind:
    source = node.meta.get("specpass_source") or ""
    if not isinstance(node.meta.get("val"), Tensor):
        return "fixed"
    if role_of(source) is not None:
        return "moving"
    if source.endswith(".handle"):  # leads to the cache, on the CPU
        return "unread"
    return "state" if "['past_key_values']" in source else "fixed"


def operand_kinds(call: fx.Node) -> tuple[Kind, ...]:
    """Of a call of a draft's step: its caches come out of its prefill, its weights are inputs of the graph."""
    return tuple(_operand_kind(operand) for operand in call.args)


def _operand_kind(operand: Any) -> Kind:
    if not isinstance(operand, fx.Node) or operand.op == "placeholder":
        return "fixed"
    item = GetItem.match(operand)
    return "state" if item is not None and item.source.op == "call_module" else "moving"


def on_cuda(gm: fx.GraphModule) -> bool:
    """Whether the graph's inputs live on a CUDA device (the cache's handle does not count: it is never read)."""
    return any(
        isinstance(val := node.meta.get("val"), Tensor) and val.device.type == "cuda"
        for node in gm.graph.find_nodes(op="placeholder")
    )
