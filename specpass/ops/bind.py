"""Bind a declared operator to what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from specpass.dialect.define import Operator, library


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`run` on tensors of any device; `onnx` in plain, functional aten for export; `flops` from arguments' shapes."""

    run: Callable[..., Any]
    onnx: Callable[..., Any]
    flops: Callable[..., int] | None


IMPLEMENTATIONS: dict[str, Implementation] = {}  # by the operator's name


def bind(
    operator: type[Operator],
    run: Callable[..., Any],
    *,
    onnx: Callable[..., Any] | None = None,
    flops: Callable[..., int] | None = None,
) -> None:
    """Let calls of `operator` run `run`, with the schema's arguments, on any device.

    One implementation for all devices, which asks the kernels' table itself where there is a kernel: one registered for
    the CPU alone breaks under Inductor.

    Args:
        onnx: the same in plain aten that writes nothing in place; None: `run` is that already.
        flops: FLOPs from the arguments' shapes, counted as torch counts scaled_dot_product_attention: two per
            multiply-add, the causal half in full. None: none worth counting.
    """
    library.impl(operator.name, run, "CompositeExplicitAutograd")
    IMPLEMENTATIONS[operator.name] = Implementation(run, onnx or run, flops)
