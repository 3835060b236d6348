"""A launch of a jit function: as data, which the compiler, the emitter and the tuner read too, and carried out.

Triton is imported on first use.
"""

from __future__ import annotations

import contextlib
import dataclasses
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch of a kernel.

    Args:
        function: the jit function's name. arguments: its run-time arguments and their Triton types, in order.
        constants: its constexpr arguments. dot: whether it should use tensor cores (with 16-bit operands).
        unaligned: integer arguments that need not be multiples of 16.
    """

    function: str
    arguments: dict[str, str]
    constants: dict[str, Any]
    warps: int
    stages: int
    dot: bool = False
    unaligned: tuple[str, ...] = ()


def start(code: ModuleType, step: Launch, grid: tuple[int, ...], *args: Any) -> None:
    """Launch one function of `code`; `args` are its run-time arguments in order."""
    from triton import knobs

    constants: dict[str, Any] = dict(step.constants)
    first = args[0]
    if "UPCAST" in constants and knobs.runtime.interpret:
        constants["UPCAST"] = first.dtype == torch.bfloat16  # the interpreter's bfloat16 arithmetic is wrong
    function = getattr(code, step.function)
    with torch.cuda.device(first.device) if first.is_cuda else contextlib.nullcontext():
        function[grid](*args, **constants, num_warps=step.warps, num_stages=step.stages)


def rows_contiguous(states: Tensor) -> Tensor:
    """[B, K, T, D] whose last axis is dense, whatever the other strides are; copied only where it is not."""
    return states if states.stride(3) == 1 or states.shape[3] == 1 else states.contiguous()
