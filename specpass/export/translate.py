"""A Program in plain ATen becomes an ONNX model, through torch.onnx's own translation.

Weights stay inputs while it is translated, so that no real number is touched; specpass.export.bind turns them into
initializers. ONNX nodes are named by the module that they come from: `model.layers.3.self_attn.select/TopK_2`.
"""

from __future__ import annotations

import ast
import collections
import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes import common
from onnxscript import opset20 as op
from onnxscript import optimizer
from torch.export import ExportedProgram

from specpass.errors import ExportError
from specpass.export.decompose import FlatProgram
from specpass.export.lift_constants import Constants, LiftConstants
from specpass.export.program import Program
from specpass.graph.edit import fake_mode_of
from specpass.graph.walk import module_path
from specpass.rewrite import Facts, Pipeline, Request

OPSET = 20
_TARGET = re.compile(r"Error when translating node .*?target=torch\.ops\.([\w.]+)\]")
_SCOPES = "pkg.torch.onnx.name_scopes"


def translate(program: Program, title: str) -> ir.Model:
    """The ONNX model of `program`: its inputs, then its weights as inputs; functions inlined, nodes named.

    Raises: ExportError naming the operator and the layer that has no ONNX form.
    """
    lift_constants(program)
    exported = FlatProgram.of(program.graph)
    try:
        # Nothing that torch decides on the way may depend on the sizes that were traced.
        sizes = fake_mode_of(program.graph).shape_env
        with warnings.catch_warnings(), quiet_log("torch.onnx"), sizes.suppress_guards():
            warnings.simplefilter("ignore")  # of torch.onnx, about its own use of torch
            done = torch.onnx.export(
                exported,
                dynamo=True,
                opset_version=OPSET,
                verbose=False,
                optimize=False,
                custom_translation_table={
                    torch.ops.aten.sort.stable: sort_stable,
                    torch.ops.aten.searchsorted.Tensor: searchsorted,
                },
            )
    except torch.onnx.OnnxExporterError as error:
        raise ExportError(_explain(error, exported, title)) from error
    model = done.model
    model.graph.name = title
    simplify(model)
    name_values(model, program)
    name_nodes(model)
    return model


@contextlib.contextmanager
def quiet_log(name: str) -> Iterator[None]:
    """Errors only, of one logger and those below it."""
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def simplify(model: ir.Model) -> None:
    """Inline, fold, merge equal nodes. torch.onnx's own optimizer takes as long as the rest of an export; ONNX Runtime
    does what is left of its work when it loads the model."""
    common.InlinePass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    optimizer.fold_constants(model, onnx_shape_inference=False)
    for clean in (common.RemoveUnusedNodesPass(), common.RemoveUnusedFunctionsPass(), common.RemoveUnusedOpsetsPass()):
        clean(model)


def sort_stable(self: Any, stable: bool = True, dim: int = -1, descending: bool = False) -> Any:
    """aten.sort.stable. TopK puts the lower index first where values tie, which is what a stable sort does."""
    small = self.dtype in (ir.DataType.INT8, ir.DataType.BOOL)  # which ONNX Runtime does not sort
    numbers = op.Cast(self, to=ir.DataType.INT32) if small else self
    count = op.Slice(op.Shape(numbers), [dim], [dim + 1 if dim != -1 else 2**62])
    values, indices = op.TopK(numbers, count, axis=dim, largest=int(descending), sorted=1)
    return (op.CastLike(values, self) if small else values), indices


def searchsorted(
    sorted_sequence: Any, self: Any, out_int32: bool = False, right: bool = False, side: Any = None, sorter: Any = None
) -> Any:
    """aten.searchsorted of few numbers [..., K], each compared with all of [..., T]: how many are below, [..., T]."""
    few, each = op.Unsqueeze(sorted_sequence, [-2]), op.Unsqueeze(self, [-1])
    below = op.LessOrEqual(few, each) if right or side == "right" else op.Less(few, each)
    counted = op.ReduceSum(op.Cast(below, to=ir.DataType.INT64), [-1], keepdims=0)
    return op.Cast(counted, to=ir.DataType.INT32) if out_int32 else counted


def lift_constants(program: Program) -> None:
    """Constants of the graph become the last of the program's weights."""
    facts = Facts()
    Pipeline((LiftConstants(),), entry="").run(program.graph, Request(program.kind), facts)
    program.weights |= {f"constant.{name}": tensor for name, tensor in facts[Constants].tensors.items()}


def _explain(error: Exception, exported: ExportedProgram, title: str) -> str:
    text = ""
    cause: BaseException | None = error
    while cause is not None and not text:
        found = _TARGET.search(str(cause))
        text = found.group(1) if found else ""
        cause = cause.__cause__
    if not text:
        return f"the {title} graph cannot be translated to ONNX: {str(error).strip().splitlines()[-1]}"
    name = text.split(".")[1]  # what torch.onnx made of aten.special_bessel_j0 is prims.bessel_j0
    layers = [module_path(node) for node in exported.graph.nodes if name in str(node.target)]
    where = next(filter(None, layers), f"the {title} graph")
    return (
        f"{where}: the operator {text} has no ONNX form, so this architecture cannot be exported; it runs through "
        "specpass.compile."
    )


def name_values(model: ir.Model, program: Program) -> None:
    """Inputs, weights and outputs by their names; symbolic sizes by their meaning."""
    graph = model.graph
    names = (*program.inputs, *program.weights)
    if len(names) != len(graph.inputs) or len(program.outputs) != len(graph.outputs):
        raise ExportError(f"the {graph.name} graph has {len(graph.inputs)} inputs and {len(names)} names: a bug")
    for value, name in zip(graph.inputs, names, strict=True):
        value.name = name
    sizes = {
        str(dim): name
        for value in graph.inputs[: len(program.inputs)]
        for dim, name in zip(value.shape or (), _axes(value.name or ""), strict=False)
        if not isinstance(dim, int)
    }
    produced: set[int] = set()
    for index, (value, name) in enumerate(zip(list(graph.outputs), program.outputs, strict=True)):
        if id(value) in produced or value.producer() is None:  # one value returned twice: ONNX wants two
            node = ir.node("Identity", [value])
            node.outputs[0].type, node.outputs[0].shape = value.type, value.shape
            graph.append(node)
            value = graph.outputs[index] = node.outputs[0]
        produced.add(id(value))
        value.name = name
    for value in (*graph.inputs, *graph.outputs):
        if value.shape is not None:
            value.shape = ir.Shape(
                [dim if isinstance(dim, int) else sizes.get(str(dim), "sequence") for dim in value.shape]
            )


def _axes(name: str) -> tuple[str, ...]:
    """Names of the axes of an input; "" where the size is a constant."""
    if name in ("input_ids", "attention_mask"):
        return ("batch", "sequence")
    return ("", "batch", "") if name == "lengths" else ("batch", "", "slots", "")


def name_nodes(model: ir.Model) -> None:
    """Nodes by their module's path; what describes torch's side of them is dropped, shapes inside too."""
    counts: collections.Counter[str] = collections.Counter()
    for node in model.graph.all_nodes():
        scopes = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        path = next((scope for scope in scopes[:-1] if scope and not scope.startswith("_empty")), "")
        path = re.sub(r"^L\['self'\]\.?", "", path)
        stem = f"{path}/{node.op_type}" if path else node.op_type
        node.name = f"{stem}_{counts[stem]}"
        counts[stem] += 1
        node.metadata_props.clear()
        for body in (attr.as_graph() for attr in node.attributes.values() if attr.type == ir.AttributeType.GRAPH):
            for index, value in enumerate(body.inputs):
                value.name = f"{node.name}/in_{index}"
        for index, value in enumerate(node.outputs):
            if not (value.is_graph_output() and node.graph is model.graph):  # one name, one value, in bodies too
                value.name = f"{node.name}/out_{index}"
    model.graph.metadata_props.clear()
