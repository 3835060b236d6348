"""Weights of an ONNX model as external data: one file for the target, shared by both graphs, one for the draft.

A linear layer's weight is stored as MatMul wants it, [in, out], so that nothing is transposed (and copied) when a
session loads; a tied embedding, which is also looked up by rows, is stored once and multiplied by Gemm(transB=1).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
from torch import Tensor

ALIGN = 64  # bytes; a cache line


class WeightFile:
    """One external-data file, written front to back; equal names are stored once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.places: dict[tuple[str, bool], ir.ExternalTensor] = {}

    def add(self, name: str, tensor: Tensor, turned: bool) -> ir.ExternalTensor:
        """The place of `tensor` in the file; `turned` stores its transpose."""
        if (name, turned) in self.places:
            return self.places[name, turned]
        return self.add_array(name, (tensor.t() if turned else tensor).detach().cpu().contiguous().numpy(), turned)

    def add_array(self, name: str, array: np.ndarray, turned: bool = False) -> ir.ExternalTensor:
        """The place of `array`, which has no padding between its rows."""
        if (name, turned) not in self.places:
            with self.path.open("ab") as file:
                file.write(b"\0" * (-file.tell() % ALIGN))
                offset = file.tell()
                np.ascontiguousarray(array).tofile(file)
            self.places[name, turned] = ir.ExternalTensor(
                self.path.name,
                offset,
                array.nbytes,
                ir.DataType.from_numpy(array.dtype),
                shape=ir.Shape(array.shape),
                name=name,
                base_dir=self.path.parent,
            )
        return self.places[name, turned]


def bind_weights(model: ir.Model, weights: dict[str, Tensor], files: dict[str, WeightFile]) -> None:
    """Turn the inputs named in `weights` into initializers, in the file of their name's first part or inline."""
    for value in [value for value in model.graph.inputs if value.name in weights]:
        model.graph.inputs.remove(value)
        tensor = weights[value.name]
        if not value.uses():
            continue
        turned = tensor.dim() == 2 and all(is_turn(node) for node, _ in value.uses())
        if turned:
            for node, _ in list(value.uses()):
                ir.convenience.replace_all_uses_with(node.outputs[0], value)
                node.graph.remove(node, safe=True)
        elif tensor.dim() == 2:
            for node, _ in list(value.uses()):
                if is_turn(node):
                    multiply_rows(node, value)
        part = value.name.partition(".")[0]
        if part in files:
            place: ir.TensorProtocol = files[part].add(value.name, tensor, turned)
        else:  # a few numbers of the method's own: shape inference may read them
            place = ir.tensor(tensor.numpy(), name=value.name)
        value.shape, value.type, value.const_value = place.shape, ir.TensorType(place.dtype), place
        model.graph.register_initializer(value)


def is_turn(node: ir.Node) -> bool:
    """Whether the node transposes a matrix."""
    perm = node.attributes.get("perm")
    return node.op_type == "Transpose" and (perm is None or list(perm.as_ints()) == [1, 0])


def multiply_rows(turn: ir.Node, weight: ir.Value) -> None:
    """MatMul(x [..., E], Transpose(w [V, E])) -> Reshape(Gemm(Reshape(x, [-1, E]), w, transB=1), [-1, ..., V])."""
    for product, _ in list(turn.outputs[0].uses()):
        shape = product.outputs[0].shape
        if product.op_type != "MatMul" or shape is None or sum(not isinstance(dim, int) for dim in shape) > 1:
            return
        width = weight.shape[1]
        rows = ir.node("Reshape", [product.inputs[0], constant(product, [-1, width])])
        dot = ir.node("Gemm", [rows.outputs[0], weight], {"transB": 1})
        sizes = [dim if isinstance(dim, int) else -1 for dim in shape]
        back = ir.node("Reshape", [dot.outputs[0], constant(product, sizes)])
        for new, kind in ((rows, "rows"), (dot, "Gemm"), (back, "back")):
            new.name = f"{product.name}_{kind}"
        back.outputs[0].name, back.outputs[0].type, back.outputs[0].shape = (
            product.outputs[0].name,
            product.outputs[0].type,
            shape,
        )
        ir.convenience.replace_nodes_and_values(
            product.graph, product, [product], [rows, dot, back], [product.outputs[0]], [back.outputs[0]]
        )
    if not turn.outputs[0].uses():
        turn.graph.remove(turn, safe=True)


def constant(before: ir.Node, numbers: list[int]) -> ir.Value:
    """An int64 constant in front of `before`."""
    node = ir.node("Constant", [], {"value": ir.tensor(np.array(numbers, dtype=np.int64))})
    before.graph.insert_before(before, node)
    return node.outputs[0]
