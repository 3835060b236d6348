"""Graphs of a model on a GPU, without one: fake tensors say "cuda", and every pass must leave all of them there."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from graphs import SNAPKV, SPECKV, SPECPC, Traced
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map
from traces import prompt_graph, step_graph

import specpass
from specpass.dialect.attention import AppendAttend, AppendAttendLse
from specpass.dialect.cache import AppendKv
from specpass.dialect.define import OPERATORS
from specpass.graph.edit import Editor, copy_module, fake_mode_of, quiet
from specpass.graph.walk import behind
from specpass.lowering.lower import lower
from specpass.lowering.regions import layer_of
from specpass.methods.base import Method
from specpass.passes.draft import DraftGraphs
from specpass.passes.pipeline import PASSES
from specpass.rewrite import Kind, Pipeline

GPU, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
STAYS = ("handle", "given_ids")  # inputs on the CPU, whatever the model's device
METHODS: dict[str, Method] = {
    "snapkv": SNAPKV,
    "speckv": SPECKV,
    "specpc": SPECPC,
    "streaming": specpass.StreamingLLM(budget=24),
    "given ids": dataclasses.replace(SPECKV, lookahead=None, lookahead_ids=((1, 2, 3),)),
}
# Not Bloom: a build of torch without CUDA cannot negate its fake mask of a GPU.
FAMILIES = ("mistral-sliding", "gemma2", "llama4", "gpt2")


def on_gpu(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of the graph as it would have been traced of a model on a GPU."""
    gm, meta = copy_module(gm), gm.meta
    with quiet(fake_mode_of(gm)):
        for node in gm.graph.nodes:
            node.args, node.kwargs = tree_map(moved, (node.args, dict(node.kwargs)))
            if not stays(node):
                node.meta["val"] = tree_map(moved, node.meta.get("val"))
    gm.meta = dict(meta)
    return gm


def moved(item: Any, device: torch.device = GPU) -> Any:
    if isinstance(item, Tensor):
        return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=device)
    return device if isinstance(item, torch.device) else item


def spread(gm: fx.GraphModule) -> fx.GraphModule:
    """The same of a model that lies on two: its second layer, and what follows, on the second one."""
    gm = on_gpu(gm)
    nodes = list(gm.graph.nodes)
    ids = {node for node in nodes if str(node.target) == "input_ids"}  # the cache's length is read of them
    second = {node for node in nodes if (layer_of(node) or "").endswith(".1") and not ids & set(node.all_input_nodes)}
    second |= {node for each in list(second) for node in behind(each)}
    weights = {node for node in nodes if node.op == "placeholder" and node.users and node.users.keys() <= second}
    there = {node for node in second | weights if not stays(node)}
    with quiet(fake_mode_of(gm)):
        for node in there:
            node.meta["val"] = tree_map(lambda item: moved(item, SECOND), node.meta.get("val"))
            node.args, node.kwargs = tree_map(lambda item: moved(item, SECOND), (node.args, dict(node.kwargs)))
    editor = Editor(gm)
    for node in nodes:  # as accelerate's hooks do
        for source in node.all_input_nodes if node in there and node.op == "call_function" else ():
            if source not in there and isinstance(source.meta["val"], Tensor) and not stays(source):
                copy = editor.call(torch.ops.aten._to_copy, source, before=node)
                copy.kwargs = {"device": SECOND}
                node.replace_input_with(source, editor.refresh(copy))
    gm.recompile()
    return gm


def stays(node: fx.Node) -> bool:
    return node.op == "placeholder" and str(node.target) in STAYS


def rewritten(traced: Traced, move: Callable[[fx.GraphModule], fx.GraphModule] | None) -> fx.GraphModule:
    """A copy, by all passes."""
    state = traced.fresh()
    if move is None:
        return Pipeline(PASSES).run(state.gm, state.request, state.facts)
    gm = move(state.gm)
    facts = traced.facts(gm.graph.find_nodes(op="placeholder"))
    graphs = facts.get(DraftGraphs)
    if graphs is not None:
        facts.add(dataclasses.replace(graphs, prefill=on_gpu(graphs.prefill), step=on_gpu(graphs.step)))
    return Pipeline(PASSES).run(gm, state.request, facts)


def check(traced: Traced) -> None:
    """The GPU's graph is the CPU's, on the other device, and nothing in it is on the CPU but what must be."""
    ours, theirs = rewritten(traced, on_gpu), rewritten(traced, None)
    for node in ours.graph.nodes:
        if stays(node) or str(node.target).startswith("draft_"):  # the draft's own tensors are real ones
            continue
        devices = {item.device for item in tree_leaves(node.meta.get("val")) if isinstance(item, Tensor)}
        assert devices <= {GPU}, f"{node.format_node()}: {devices}"
    assert text(ours) == text(theirs)


def text(gm: fx.GraphModule) -> str:
    return gm.code.replace("device(type='cuda', index=0)", "device(type='cpu')")


@pytest.mark.parametrize("mask", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_prompts(method: str, mask: bool) -> None:
    check(prompt_graph(METHODS[method], mask=mask, positions=mask))


@pytest.mark.parametrize("family", FAMILIES)
def test_what_masks_mean_is_found_wherever_they_are_made(family: str) -> None:
    check(prompt_graph(SNAPKV, mask=True, family=family))


@pytest.mark.parametrize("kind", ["decode", "append"])
@pytest.mark.parametrize("method", METHODS)
def test_steps(method: str, kind: Kind) -> None:
    check(step_graph(METHODS[method], kind=kind, shift=method == "specpc"))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_lowered_for_a_gpu_runs_as_kernels(method: str) -> None:
    """Of a draft too, which is lowered inside the prompt's graph."""
    for traced in (prompt_graph(METHODS[method]), step_graph(METHODS[method], shift=method == "specpc")):
        gm = rewritten(traced, on_gpu)
        lowered = lower(gm, "eager", traced.request, cudagraphs=False)
        kernels = {choice.operator for _, choice in lowered.choices if choice.kernel}
        found = {name for name in ("importance", "gather_kv", "append_attend") if OPERATORS[name].find(gm.graph)}
        assert found
        assert found <= kernels
        for step in (child for name, child in gm.named_children() if name == "draft_step"):
            own = AppendAttendLse if method == "specpc" else AppendAttend
            assert own.find(step.graph)
            assert not AppendKv.find(step.graph)


def check_spread(traced: Traced) -> None:
    """Each of our operators finds all of its tensors on one device, and leaves what it makes there."""
    gm = rewritten(traced, spread)
    seen = set()
    for node in gm.graph.nodes:
        if node.op != "call_function" or getattr(node.target, "namespace", "") != "specpass":
            continue
        values = [source.meta["val"] for source in node.all_input_nodes if not stays(source)]
        devices = {item.device for item in tree_leaves([values, node.meta["val"]]) if isinstance(item, Tensor)}
        assert len(devices) == 1, f"{node.format_node()}: {devices}"
        seen |= devices
    assert seen == {GPU, SECOND}


@pytest.mark.parametrize("mask", [False, True], ids=["", "padded"])
@pytest.mark.parametrize("method", METHODS)
def test_a_sites_tensors_are_on_its_device(method: str, mask: bool) -> None:
    check_spread(prompt_graph(METHODS[method], mask=mask, positions=mask, layers=2))


@pytest.mark.parametrize("kind", ["decode", "append"])
def test_a_steps_tensors_are_on_its_sites_devices(kind: Kind) -> None:
    check_spread(step_graph(SNAPKV, kind=kind, mask=kind == "append", layers=2))
