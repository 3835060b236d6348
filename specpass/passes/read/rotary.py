"""How queries and keys turn with their positions (rotary embeddings, arXiv 2104.09864), found by running them.

Models spell it in many ways: halves of a head or neighbours make a pair, some dimensions are left alone, frequencies
are scaled, or come as a table. So nothing is read off the operators. What lies between a projection and attention is
run on random rows that stand at a few positions, in float64 on the CPU, and what comes out must be pairs that turn by
a fixed angle a position, the same in all heads, queries and keys alike. Anything else is named, and nobody guesses.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map

from specpass.graph.walk import ATEN, is_op, value
from specpass.passes.facts import Inputs, Weights
from specpass.passes.read.masks import is_argument
from specpass.rewrite.sites import Rotation

PROJECTIONS = (ATEN.linear, ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN.matmul, ATEN.einsum, ATEN.embedding)
SHAPED = (ATEN.ones_like, ATEN.zeros_like, ATEN.full_like, ATEN.new_ones, ATEN.new_zeros, ATEN.new_full)
TRIED = (1, 2, 31, 500, 9000)  # positions, beside 0; a query that is scaled beyond some thousands shows at the last
MOST = 300  # nodes between projections and attention are fewer
SIZE = 2  # what symbolic sizes become
STILL = 1e-9  # of the largest number: below this nothing has moved
EXACT = 1e-6  # of the same and a position: tables of cosines are float32


def hidden_nodes(graph: fx.Graph, inputs: Inputs) -> set[fx.Node]:
    """Nodes that are made of the tokens: of what they are, and not only of how many."""
    found = {node for node in (inputs.ids, inputs.embeds) if node is not None}
    for node in graph.nodes:
        counts = isinstance(node.meta.get("val"), (int, torch.SymInt)) or is_op(node, *SHAPED)
        if node.op == "call_function" and not counts and not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def read_rotation(
    query: fx.Node, key: fx.Node, hidden: set[fx.Node], weights: Weights | None, context: int | None
) -> Rotation | str:
    """The rotation of a site's new queries [B, H, q, D] and keys [B, K, q, D], or why it is not known.

    Args: hidden: see hidden_nodes. weights: the model's tensors. context: positions that the model was made for.
    """
    positions = [place for place in TRIED if place <= 2 or context is None or place < context]
    found = []
    for node in (query, key):
        part = _Part(node, hidden, weights)
        reason = part.why_not()
        if reason:
            return reason
        try:
            rows = [part.run(place) for place in (0, *positions)]
        except Exception as error:  # it holds an operator that cannot be run so
            return f"what turns its queries does not evaluate ({type(error).__name__})"
        found.append(rotation_of(rows, positions))
    ours, theirs = found
    if isinstance(ours, str) or isinstance(theirs, str):
        return ours if isinstance(ours, str) else str(theirs)
    if not ours.like(theirs):
        return "its keys do not turn as its queries do"
    return ours


class _Part:
    """What a query or key is made of, from the projections on: `sources`, what positions bring, and the model's own."""

    def __init__(self, result: fx.Node, hidden: set[fx.Node], weights: Weights | None) -> None:
        self.result, self.known = result, {} if weights is None else weights.tensors
        self.sources: set[fx.Node] = set()
        nodes: set[fx.Node] = set()
        work = [result]
        while work and len(nodes) < MOST:
            node = work.pop()
            if node in nodes or node in self.sources:
                continue
            rest = [own for own in node.all_input_nodes if own not in hidden]
            if node in hidden and (is_projection(node) and not any(map(self._is_placed, rest))):
                self.sources.add(node)
                continue
            nodes.add(node)
            work += [] if isinstance(node.meta.get("val"), (int, torch.SymInt)) else node.all_input_nodes
        self.whole = not work
        self.nodes = sorted(nodes)
        self.states = [node for node in (*self.sources, *self.nodes) if node in hidden]
        self.places = [node for node in self.nodes if is_whole_number(node)]  # inputs that positions are made of

    def _is_placed(self, node: fx.Node) -> bool:
        """Whether positions go into a node that no token goes into."""
        seen, work = set(), [node]
        while work:
            own = work.pop()
            if own not in seen:
                seen.add(own)
                work += own.all_input_nodes
        return any(is_whole_number(own) for own in seen)

    def why_not(self) -> str:
        """Why it cannot be run; "" where it can."""
        given = [node for node in self.nodes if node.op == "placeholder" and isinstance(value(node), Tensor)]
        strange = next((n for n in given if n not in self.places and (n not in self.known or is_argument(n))), None)
        written = next((node for node in self.states if is_written(node)), None)
        if not self.whole or not self.sources:
            return "no projection is found that its queries or keys are made by"
        if strange is not None:
            return f"its queries or keys depend on the input {strange.name}"
        if written is not None:
            return f"its queries or keys are changed in place ({written.name})"
        if len(self.places) > 1:
            return f"its positions are made of several inputs ({', '.join(node.name for node in self.places)})"
        symbols = [node for node in self.nodes if is_op(node, ATEN.arange) and not all_constant(node)]
        return "its positions are made of sizes" if symbols and not self.places else ""

    def run(self, place: int) -> Tensor:
        """[N, D] float64: rows that are the same each time, where positions are `place`."""
        generator = torch.Generator().manual_seed(0)
        env: dict[fx.Node, Any] = {}
        for node in sorted(self.sources):
            env[node] = torch.randn(shape_of(node), dtype=torch.float64, generator=generator)
        for node in self.nodes:
            if node.op == "get_attr":
                env[node] = exact(getattr(node.graph.owning_module, str(node.target)).detach().cpu())
            elif isinstance(value(node), (int, torch.SymInt)):
                env[node] = number(value(node))
            elif node in self.places:
                env[node] = torch.full(shape_of(node), place, dtype=value(node).dtype)
            elif node.op == "placeholder":
                env[node] = exact(self.known[node].detach().cpu())
            else:
                args, kwargs = fx.map_arg(tree_map(in_float64, (node.args, dict(node.kwargs))), lambda n: env[n])
                env[node] = node.target(*args, **kwargs)
        return env[self.result].double().flatten(0, -2)


def rotation_of(rows: list[Tensor], positions: list[int]) -> Rotation | str:
    """Of rows [N, D] at position 0 and at each of `positions`, the first of which is 1; or why there is none."""
    start, others = rows[0], torch.stack(rows[1:])
    largest = float(start.abs().max())
    if not bool(start.isfinite().all() and others.isfinite().all()):
        return "what turns its queries does not evaluate (numbers that are not finite)"
    moved = (others - start).abs().amax((0, 1)) > STILL * largest
    dims, half = moved.nonzero()[:, 0].tolist(), int(moved.sum()) // 2
    if not dims:
        return Rotation()
    allowed = EXACT * largest * (1 + torch.tensor(positions, dtype=torch.float64))
    for first, second in ((dims[:half], dims[half:]), (dims[::2], dims[1::2])):  # halves, neighbours
        if len(first) != len(second):
            break
        begin, turned = (torch.complex(own[..., first], own[..., second]) for own in (start, others))
        omega = (begin.conj() * turned[0]).sum(0).angle()
        angles = torch.tensor(positions)[:, None, None] * omega
        off = (torch.polar(torch.ones_like(angles), angles) * begin - turned).abs().amax((1, 2))
        if bool((off <= allowed).all()):
            return Rotation(tuple(first), tuple(second), tuple(omega.tolist()))
    return "its queries or keys change with their positions, and not in pairs that turn by a fixed angle a position"


def is_projection(node: fx.Node) -> bool:
    """Whether a node's rows are others than those that went in: what comes before it has no place of its own."""
    custom = getattr(node.target, "namespace", "aten") not in ("aten", "prim", "prims", "_operator")
    return is_op(node, *PROJECTIONS) or (node.op == "call_function" and custom)


def is_whole_number(node: fx.Node) -> bool:
    """Whether it is an input of integers, as positions are."""
    val = node.meta.get("val")
    if node.op != "placeholder" or not isinstance(val, Tensor):
        return False
    return not val.is_floating_point() and not val.is_complex() and val.dtype != torch.bool


def is_written(node: fx.Node) -> bool:
    """Whether some operator changes what a node holds in place, or a view of it."""
    for user in node.users:
        schema = getattr(user.target, "_schema", None)
        if user.op != "call_function" or schema is None:
            continue
        taken = zip(schema.arguments, user.args, strict=False)
        alias = next((own.alias_info for own, given in taken if given is node), None)
        if alias is not None and (alias.is_write or is_written(user)):
            return True
    return False


def all_constant(node: fx.Node) -> bool:
    return not any(isinstance(own, fx.Node) for own in node.all_input_nodes)


def number(size: Any) -> int:
    """A size, with SIZE for each symbol in it."""
    if isinstance(size, int):
        return size
    expr = size.node.expr
    return int(expr.subs(dict.fromkeys(expr.free_symbols, SIZE)))


def shape_of(node: fx.Node) -> list[int]:
    return [number(size) for size in value(node).shape]


def exact(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def in_float64(argument: Any) -> Any:
    """An operator's argument, or float64 in the place of another float's dtype, and the CPU in a device's."""
    if isinstance(argument, torch.device):
        return torch.device("cpu")
    if isinstance(argument, torch.dtype) and (argument.is_floating_point or argument.is_complex):
        return torch.complex128 if argument.is_complex else torch.float64
    return argument
