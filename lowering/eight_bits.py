"""eight_bits: a draft's steps read copies of its linear layers' weights in int8, half the bytes.

before: q = linear(x, wq, bq); k = linear(x, wk, bk)                     ids, position, *caches, *params
after:  q, k = linear_rows8(x, [wq8, wk8], [sq, sk], [bq, bk])           ids, position, *caches, *params, wq8, sq, ...

What a draft writes is looked at or verified by its target, so its steps need not be exact. Its prefill keeps the
weights as they are: it has many rows, and waits for products rather than memory.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, fx

from specpass.dialect.define import SPEC
from specpass.graph.aten import Linear
from specpass.graph.edit import Editor, quiet
from specpass.graph.walk import value
from specpass.kernels.cpu.linear8 import quantized, serves8
from specpass.lowering.few_rows import together


def eight_bits(steps: Iterable[fx.GraphModule], others: Iterable[fx.GraphModule], params: dict[str, Tensor]) -> int:
    """Rewrite a draft's graphs in place, and add the copies to `params`, which are the last inputs of each graph.

    Args: steps: read the copies. others: only take them.
    Returns: bytes of the copies.
    """
    steps, others = list(steps), list(others)
    before = list(params)
    found = {gm: _groups(gm, len(before)) for gm in steps}
    inputs = {gm: gm.graph.find_nodes(op="placeholder")[-len(before) :] for gm in steps}
    read = {before[inputs[gm].index(linear.weight)] for gm in steps for group in found[gm] for linear in group}
    for name in sorted(read, key=before.index):
        params[f"{name}.int8"], params[f"{name}.scale"] = quantized(params[name])
    added = list(params)[len(before) :]
    for gm in (*steps, *others):
        copies = dict(zip(added, _append(gm, [params[name] for name in added]), strict=True))
        if gm in found:
            names = dict(zip(inputs[gm], before, strict=True))
            for group in found[gm]:
                _replace(Editor(gm), group, copies, names)
        gm.recompile()
    return sum(params[name].nbytes for name in added)


def _groups(gm: fx.GraphModule, count: int) -> list[list[Linear]]:
    """Linear layers whose weights are among the last `count` inputs, together where they can be one call."""
    params = set(gm.graph.find_nodes(op="placeholder")[-count:])
    linears = [linear for linear in Linear.find(gm.graph) if linear.weight in params]
    return together(linear for linear in linears if serves8(value(linear.weight), value(linear.bias)))


def _append(gm: fx.GraphModule, tensors: list[Tensor]) -> list[fx.Node]:
    """Inputs for `tensors` behind those that there are."""
    editor, nodes = Editor(gm), []
    last = gm.graph.find_nodes(op="placeholder")[-1]
    for index, tensor in enumerate(tensors):
        with gm.graph.inserting_after(last):
            last = gm.graph.placeholder(f"copy_{index}")
        with quiet(editor.mode):
            last.meta["val"] = editor.mode.from_tensor(tensor, static_shapes=True)
        nodes.append(last)
    return nodes


def _replace(editor: Editor, group: list[Linear], copies: dict[str, fx.Node], names: dict[fx.Node, str]) -> None:
    first = group[0].node
    weights = [copies[f"{names[linear.weight]}.int8"] for linear in group]
    scales = [copies[f"{names[linear.weight]}.scale"] for linear in group]
    biases = [linear.bias for linear in group]
    call = editor.call(SPEC.linear_rows8, group[0].input, weights, scales, biases, before=first, like=first)
    for index, linear in enumerate(group):
        editor.replace(linear.node, editor.item(call, index, linear.node))
