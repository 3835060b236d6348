"""Trace a decoder's own forward on fake tensors: parameters become inputs, sizes become symbols.

make_fx runs the model's code (no bytecode analysis, a few seconds for 24 layers) into pre-dispatch ATen, the IR that
the passes see. The draft is captured this way for torch.compile, draft and target for ONNX.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
import torch.fx.traceback as fx_traceback
from torch import Tensor, fx, nn
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext
from transformers import Cache

from specpass.capture.devices import spread_over
from specpass.capture.rope import rope_as_it_was
from specpass.graph.edit import quiet
from specpass.graph.fakes import symbolic_mode

# Sizes while tracing: all different, so that no two dimensions are taken for one.
BATCH, COUNT, PROMPT, ROOM, SLOTS = 3, 7, 1021, 31, 1087


def untraceable(model: nn.Module) -> str:
    """Why a model's weights cannot become inputs of a graph; "" where they can.

    Quantised tensors of a class of their own would be traced through to what no input stands for, and offloaded ones
    are not there. A graph computes on one device.
    """
    spread = spread_over(model)
    if spread:
        return f"it is spread over {spread}"
    for name, weight in (*model.named_parameters(), *model.named_buffers()):
        for tensor in (weight, weight.data):
            if type(tensor) not in (nn.Parameter, nn.Buffer, Tensor):
                return f"{name} is a {type(tensor).__name__}, which cannot be traced"
        if weight.device.type == "meta":
            return f"{name} is offloaded"
    return ""


@contextlib.contextmanager
def experts_of_graphs(model: nn.Module) -> Iterator[None]:
    """Experts ask whether they are compiled: what multiplies them otherwise has no form in a graph but in bfloat16.

    Other models are not told: some have code of their own for it.
    """
    can = getattr(type(model), "_can_set_experts_implementation", None)
    before = torch.compiler._is_compiling_flag  # what torch.export sets, too
    torch.compiler._is_compiling_flag = before or (can is not None and can())
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = before


def asks_for_length(model: nn.Module) -> bool:
    """Whether attention alone asks the cache for its length, as a number (MPT, to cut its bias).

    A graph has that length as a tensor alone; slots, which masks count, are a number. Where positions are made of the
    length, it is asked for outside of the layers too (Llama 4).
    """
    asking = {hasattr(module, "layer_idx") for module in model.modules() if _asks(type(module))}
    return asking == {True}


def _asks(kind: type[nn.Module]) -> bool:
    code = getattr(inspect.unwrap(kind.forward), "__code__", None)
    return code is not None and "get_seq_length" in code.co_names


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, in the order in which graphs take them."""
    return {name: weight.detach() for name, weight in (*model.named_parameters(), *model.named_buffers())}


class ModelTrace:
    """`model` (a Hugging Face decoder in eval mode) with fake parameters, and prompt inputs of symbolic size.

    Attributes:
        params: the model's real parameters and buffers by name, in the order in which graphs take them.
        ids: fake [B, S] int64; lengths: fake [B] int64; room: a symbolic count.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.params = weights_of(model)
        self.dtype = next(model.parameters()).dtype
        self.device = next(iter(self.params.values())).device
        self.mode = symbolic_mode()
        self.fakes = [self.mode.from_tensor(param, static_shapes=True) for param in self.params.values()]
        self.ids = self.dynamic((BATCH, PROMPT), torch.int64, (0, 1))
        self.lengths = self.dynamic((BATCH,), torch.int64, (0,))
        self.room = self.dynamic((ROOM,), torch.int64, (0,)).shape[0]
        self.sizes = [dim.node.expr for dim in (*self.ids.shape, self.room)]

    def dynamic(self, shape: tuple[int, ...], dtype: torch.dtype, axes: tuple[int, ...]) -> Tensor:
        """A fake tensor; `axes` are symbols, and equal sizes are one symbol."""
        context = StatelessSymbolicContext(
            dynamic_sizes=[DimDynamic.DUCK if axis in axes else DimDynamic.STATIC for axis in range(len(shape))]
        )
        real = torch.zeros(shape, dtype=dtype, device=self.device)
        name = f"trace_{len(shape)}_{shape[0]}_{shape[-1]}_{dtype}".replace(".", "_")
        return self.mode.from_tensor(real, symbolic_context=context, source=ConstantSource(name))

    def trace(self, run: Any, *inputs: Any) -> fx.GraphModule:
        """Pre-dispatch ATen of `run(*inputs, *params)`; nodes know the module that made them."""
        with (
            quiet(self.mode),
            fx_traceback.preserve_node_meta(),
            module_paths(self.model),
            rope_as_it_was(self.model),
            experts_of_graphs(self.model),
        ):
            return make_fx(run, pre_dispatch=True)(*inputs, *self.fakes)

    def forward(self, params: tuple[Tensor, ...], ids: Tensor, cache: Cache, **kwargs: Any) -> Tensor:
        """Logits [B, 1, V] of the model's own forward with `params` in the place of its own."""
        named = {f"model.{name}": param for name, param in zip(self.params, params, strict=True)}
        out = torch.func.functional_call(
            _Uncompiled(self.model),
            named,
            (),
            {"input_ids": ids, "past_key_values": cache, "use_cache": True, "logits_to_keep": 1, **kwargs},
        )
        return out.logits


class _Uncompiled(nn.Module):
    """The model without its compiled call: a target may be its own draft."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **kwargs: Any) -> Any:
        return self.model._call_impl(**kwargs)


@contextlib.contextmanager
def module_paths(model: nn.Module) -> Iterator[None]:
    """While tracing, give each node the path of the module whose forward made it (as Dynamo does)."""
    paths = {module: name for name, module in model.named_modules()}
    stack: list[Any] = []

    def enter(module: nn.Module, args: Any) -> None:
        stack.append(fx_traceback.current_meta.get("nn_module_stack"))
        if module in paths:
            path = f"L['self'].{paths[module]}"
            fx_traceback.current_meta["nn_module_stack"] = {path: (path, type(module))}

    def leave(module: nn.Module, args: Any, output: Any) -> None:
        fx_traceback.current_meta["nn_module_stack"] = stack.pop()

    first = nn.modules.module.register_module_forward_pre_hook(enter)
    second = nn.modules.module.register_module_forward_hook(leave, always_call=True)
    try:
        yield
    finally:
        first.remove()
        second.remove()
