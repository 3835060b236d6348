"""float32_linear: a prompt's linear layers are multiplied in float32 where a CPU has no instructions for their dtype.

before: q = linear(x, wq, bq); k = linear(x, wk, bk); v = linear(x, wv, bv)          bfloat16, on a CPU with AVX2 alone
after:  q, k, v = linear_rows(x, [wq, wk, wv], [bq, bk, bv])

before: _grouped_mm(x, w, ends)             experts: x sorted by them
after:  grouped_linear(x, w, ends)

Weights stay as they are, in two bytes: kernels/cpu/wide.py makes float32 of a block at a time.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import ClassVar

from torch import fx

from specpass.dialect.define import SPEC
from specpass.dialect.linear import GroupedLinear, LinearRows
from specpass.graph.aten import GroupedMm, Linear
from specpass.graph.edit import Editor
from specpass.graph.walk import value
from specpass.kernels.cpu.wide import is_slow
from specpass.kernels.shapes import dtype_of
from specpass.lowering.few_rows import is_of_one_dtype, one_call, together
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import PROMPTS


@dataclasses.dataclass(frozen=True)
class Float32Linear(Pass):
    name: ClassVar[str] = "float32_linear"
    stage: ClassVar[str] = "LOWERED"
    kinds: ClassVar[tuple[Kind, ...]] = PROMPTS

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        for group in together(filter(is_slow_linear, Linear.find(gm.graph))):
            one_call(editor, group)
        for experts in filter(is_slow_experts, GroupedMm.find(gm.graph)):
            node = experts.node
            own = editor.call(SPEC.grouped_linear, experts.input, experts.mat2, experts.offs, before=node, like=node)
            editor.replace(node, own)


def is_slow_experts(product: GroupedMm) -> bool:
    """Of rows that are sorted by expert; autocast, see few_rows."""
    states, weight, out = value(product.input), value(product.mat2), value(product.node)
    rows = (states.dim(), weight.dim()) == (2, 3) and product.offs is not None and product.bias is None
    return rows and states.dtype == weight.dtype == out.dtype and is_slow(weight)


def is_slow_linear(linear: Linear) -> bool:
    weight, bias = value(linear.weight), value(linear.bias)
    alike = bias is None or bias.dtype == weight.dtype
    return is_of_one_dtype(linear) and alike and weight.dim() == 2 and is_slow(weight)


def float32_notes(gm: fx.GraphModule) -> list[str]:
    """Which of a prompt's linear layers are multiplied in float32, for the report."""
    weights = [weight for call in LinearRows.find(gm.graph) for weight in call.weights]
    weights += [call.weight for call in GroupedLinear.find(gm.graph)]
    dtypes = Counter(dtype_of(value(weight)) for weight in weights)
    return [
        f"{count} linear layers in float32: this CPU has no instructions for {name}" for name, count in dtypes.items()
    ]
