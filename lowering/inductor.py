"""Compile each distinct region once with Inductor and stitch the calls.

before: embed; layer 0's 60 nodes; ...; layer 27's 60 nodes; norm; lm_head
after:  embed; region_0(...); ...; region_0(...); norm; lm_head       one artifact, 28 calls

The surrounding graph's generated code drops each value after its last use, so a layer's full K/V die with its call.
Whole-graph compilation is no choice: it takes a minute and keeps every layer's buffers alive at once.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import operator
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._inductor.cpu_vec_isa import valid_vec_isa_list
from torch.fx._lazy_graph_module import _LazyGraphModule

from specpass.graph.edit import copy_module
from specpass.graph.walk import value
from specpass.lowering.regions import Region, close, find_regions, layer_of
from specpass.lowering.restate import Hints, Size, hint_of, symbolic_sizes
from specpass.lowering.row_pieces import Pieces, split_rows
from specpass.lowering.variants import Variants
from specpass.observe import progress


class CompiledRegion(nn.Module):
    """A compiled region as a callable that a graph can hold; equal regions share one.

    Args: work: how much of a prompt's work one call is, for who watches: elements of the weights that it reads.
    """

    def __init__(self, run: Callable[..., Any], work: int) -> None:
        super().__init__()
        self.run, self.work = run, work

    def forward(self, *args: Any) -> Any:
        out = self.run(*args)
        progress.advance(self.work, progress.READING)  # a step or a proposal goes the same way
        return out


def _probe() -> None:
    with contextlib.suppress(Exception):  # it comes again where a region is compiled, and is told there
        valid_vec_isa_list()


@functools.cache
def compiler_probe() -> threading.Thread:
    """Inductor's dry runs of the C++ compiler (which vector instructions work?), started once, in the background.

    On a new machine they take eight seconds of subprocesses, which pass while the target is traced.
    """
    thread = threading.Thread(target=_probe, name="specpass-compiler-probe", daemon=True)
    thread.start()
    return thread


def tagged(fingerprint: str) -> AbstractContextManager[None]:
    """What is compiled inside has the pipeline's fingerprint and the lowering's sources in its cache keys.

    Inductor's keys know an operator by its name alone: a region that an older specpass compiled must not be found.
    """
    sources = "".join(path.read_text() for path in sorted(Path(__file__).parent.glob("*.py")))
    own = hashlib.sha256(sources.encode()).hexdigest()[:16]
    tag = torch.compiler.config.cache_key_tag  # the user's
    return torch.compiler.config.patch(cache_key_tag=f"{tag} specpass {fingerprint} {own}".strip())


def lower_regions(
    gm: fx.GraphModule, note: Callable[[str], None], hints: Hints | None = None, *, prompt: bool, step: bool = False
) -> tuple[int, int]:
    """Replace each decoder layer by a call of its compiled region, in place; subgraphs (the draft) too.

    Args:
        note, hints, prompt: see compile_region.
        step: the graph is called for each token, which is little beside a prompt.
    Returns: how many regions there were, and how many of them are distinct.
    """
    compiler_probe().join()
    count = distinct = 0
    for name, child in list(gm.named_children()):
        if isinstance(child, fx.GraphModule):
            # The captured draft is shared by later graphs: lowered once, kept beside it.
            lowered = child.meta.get("specpass_lowered")
            if lowered is None:
                lowered = copy_module(child)
                often = len(gm.graph.find_nodes(op="call_module", target=name)) > 1
                inside = lower_regions(lowered, note, called_with(gm, name, hints), prompt=prompt, step=often)
                count, distinct = count + inside[0], distinct + inside[1]
                lowered.recompile()
                child.meta["specpass_lowered"] = lowered
            setattr(gm, name, lowered)
    regions = find_regions(gm)
    compiled: dict[str, str] = {}
    for found in regions:
        region = close(found.nodes)
        key = region.key()
        if key not in compiled:
            compiled[key] = f"region_{len(compiled)}"
            run = compile_region(gm, region, hints, note, prompt=prompt)
            gm.add_submodule(compiled[key], CompiledRegion(run, 0 if step else weights_of(region)))
            progress.advance()
        stitch(gm, region, compiled[key])
    gm.graph.lint()
    return count + len(regions), distinct + len(compiled)


def distinct_regions(gm: fx.GraphModule) -> int:
    """How many regions `lower_regions` will compile."""
    inside = [child for child in gm.children() if isinstance(child, fx.GraphModule)]
    still = [child for child in inside if "specpass_lowered" not in child.meta]
    return len({region.key() for region in find_regions(gm)}) + sum(map(distinct_regions, still))


def weights_of(region: Region) -> int:
    """Elements of what a region reads that has no symbolic size: weights, beside which the rest is small."""
    values = [value(node) for node in region.inputs]
    tensors = [val for val in values if isinstance(val, Tensor)]
    return sum(val.numel() for val in tensors if all(isinstance(size, int) for size in val.shape))


def work_of(gm: fx.GraphModule) -> int:
    """The work of all regions that one call of a lowered graph runs, those of its subgraphs too."""
    called = [gm.get_submodule(str(node.target)) for node in gm.graph.find_nodes(op="call_module")]
    regions = sum(child.work for child in called if isinstance(child, CompiledRegion))
    return regions + sum(work_of(child) for child in called if isinstance(child, fx.GraphModule))


def extract(gm: fx.GraphModule, region: Region) -> fx.GraphModule:
    """The region as a graph of its own: its inputs are placeholders, its outputs a tuple."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for index, node in enumerate(region.inputs):
        env[node] = graph.placeholder(f"input_{index}")
        env[node].meta = {"val": node.meta["val"]}
    for node in region.nodes:
        env[node] = graph.node_copy(node, lambda n: env[n])
    graph.output(tuple(env[node] for node in region.outputs))
    return _LazyGraphModule(gm, graph)


def compile_region(
    gm: fx.GraphModule,
    region: Region,
    hints: Hints | None = None,
    note: Callable[[str], None] = lambda text: None,
    *,
    prompt: bool = False,
) -> Callable[..., Any]:
    """Inductor's code for one region, for the symbolic sizes of its inputs.

    Args:
        hints: sizes of the call that is compiled for, where the graph is called by another with sizes of its own;
            None for a graph of Dynamo's, whose symbols are at least 2 (Dynamo checks that on each call).
        note: see Variants.
        prompt: the graph reads prompts: what is computed of each row alone runs in pieces (row_pieces.py).
    """
    layer = layer_of(region.nodes[0]) or "a region"
    name = layer if hints is None else f"the draft's {layer}"
    least = 2 if hints is None else 1

    def compiled(part: Region, given: Sequence[Any], expected: Sequence[int]) -> Callable[..., Any]:
        return Variants(extract(gm, part), given, expected, least, name, note).callable()

    def known(part: Region) -> tuple[list[Any], list[int]]:
        values = [node.meta["val"] for node in part.inputs]
        return values, [hint_of(size, hints or {}) for size, _ in symbolic_sizes(values)]

    split = split_rows(region) if prompt else None
    if split is None:
        return compiled(region, *known(region))
    return Pieces(compiled(split.head, *known(split.head)), compiled(split.tail, *split.piece()), split, region)


def called_with(gm: fx.GraphModule, name: str, hints: Hints | None) -> Hints:
    """The sizes that the graph's first call of its subgraph `name` hands over, by the subgraph's symbols."""
    calls = gm.graph.find_nodes(op="call_module", target=name)
    return hints_of(gm.get_submodule(name), [value(given) for given in calls[0].args], hints) if calls else {}


def hints_of(gm: fx.GraphModule, given_values: Iterable[Any], hints: Hints | None = None) -> Hints:
    """Sizes by the graph's own symbols, where it is called with such values: tensors, or counts."""
    found: dict[sympy.Symbol, int] = {}
    for inside, outside in zip(gm.graph.find_nodes(op="placeholder"), given_values, strict=True):
        for own, given in zip(_numbers(value(inside)), _numbers(outside), strict=True):
            if isinstance(own, torch.SymInt) and own.node.expr.is_Symbol:
                found[own.node.expr] = hint_of(given, hints or {}) if isinstance(given, torch.SymInt) else int(given)
    return found


def _numbers(val: Any) -> tuple[Size, ...]:
    """The sizes of a tensor, or a number."""
    return tuple(val.shape) if isinstance(val, Tensor) else (val,)


def stitch(gm: fx.GraphModule, region: Region, name: str) -> None:
    """Call the compiled region where its nodes stood."""
    graph = gm.graph
    with graph.inserting_after(region.nodes[-1]):
        call = graph.call_module(name, tuple(region.inputs))
    call.meta["val"] = tuple(node.meta.get("val") for node in region.outputs)
    last, inside = call, set(region.nodes)
    for index, node in enumerate(region.outputs):
        with graph.inserting_after(last):
            last = graph.call_function(operator.getitem, (call, index))
        last.meta["val"] = node.meta.get("val")
        node.replace_all_uses_with(last, delete_user_cb=lambda user: user not in inside)
    for node in outside_readers(region, call):
        last.append(node)
        last = node
    for node in reversed(region.nodes):
        graph.erase_node(node)


def outside_readers(region: Region, call: fx.Node) -> list[fx.Node]:
    """Nodes of no region that stood between the region's nodes and read its results: they follow the call now."""
    inside, moved = set(region.nodes), {call, *call.users}
    found = []
    node = region.nodes[0]
    while node is not call:
        if node not in inside and any(source in moved for source in node.all_input_nodes):
            moved.add(node)
            found.append(node)
        node = node.next
    return found
