"""Bind a declared operator to what it computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

from specpass.dialect.define import Operator, library
from specpass.kernels.dispatch import kernel_or


@dataclasses.dataclass(frozen=True)
class Implementation:
    """`run` in aten on any device; `onnx` in plain, functional aten for export; `flops` from arguments' shapes."""

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
    """Let calls of `operator` run `run`, with the schema's arguments, on any device, or a kernel of the operator.

    One implementation for all devices, which asks the kernels' table itself: one registered for the CPU alone breaks
    under Inductor.

    Args:
        onnx: the same in plain aten that writes nothing in place; None: `run` is that already.
        flops: FLOPs from the arguments' shapes, counted as torch counts scaled_dot_product_attention: two per
            multiply-add, the causal half in full. None: none worth counting.
    """
    library.impl(operator.name, kernel_or(operator.name, run), "CompositeExplicitAutograd")
    IMPLEMENTATIONS[operator.name] = Implementation(run, onnx or run, flops)
