"""dense_rows: a linear layer reads rows that lie one behind the other.

before: h[:, -1:] of h [B, T, E] -> lm_head
after:  h[:, -1:] -> clone -> lm_head

PyTorch makes one matrix of a linear layer's rows where their strides let it. Where they do not, it takes a batched
product, on a CPU with a copy of the whole weight: of the Qwen2.5 1.5B model's head 445 MiB and 1.3 s, for one row.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import torch
from torch import Tensor, fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from specpass.graph.aten import Linear, Matmul
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, value
from specpass.rewrite import Facts, Kind, Pass, Request
from specpass.rewrite.base import PROMPTS, STEPS


@dataclasses.dataclass(frozen=True)
class DenseRows(Pass):
    name: ClassVar[str] = "dense_rows"
    stage: ClassVar[str] = "LOWERED"
    kinds: ClassVar[tuple[Kind, ...]] = (*PROMPTS, *STEPS)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        editor = Editor(gm)
        dense = {"memory_format": torch.contiguous_format}
        products = [(view.node, view.input, view.weight) for view in Linear.find(gm.graph)]
        products += [(view.node, view.input, view.other) for view in Matmul.find(gm.graph)]
        for node, rows, weight in products:
            if value(weight).dim() != 2 or is_one_matrix(value(rows)):
                continue
            with gm.graph.inserting_before(node):
                copy = gm.graph.call_function(ATEN.clone.default, (rows,), dense)
            node.replace_input_with(rows, editor.refresh(copy, like=node))


def is_one_matrix(rows: Tensor) -> bool:
    """Whether rows [..., E] can be seen as [N, E] without a copy, whatever the sizes (at::matmul's own question)."""
    outer = range(rows.dim() - 2)
    return all(statically_known_true(rows.stride(i) == rows.stride(i + 1) * rows.shape[i + 1]) for i in outer)
