"""Graphs of a model on a GPU, without one: fake tensors say "cuda", and every pass must leave all of them there."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from graphs import SNAPKV, SPECKV, SPECPC, Traced
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map
from traces import prompt_graph, step_graph

import specpass
from specpass.graph.edit import copy_module, fake_mode_of, quiet
from specpass.methods.base import Method
from specpass.passes.draft import DraftGraphs
from specpass.passes.pipeline import PASSES
from specpass.rewrite import Kind, Pipeline

GPU = torch.device("cuda", 0)
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


def moved(item: Any) -> Any:
    if isinstance(item, Tensor):
        return torch.empty_strided(item.shape, item.stride(), dtype=item.dtype, device=GPU)
    return GPU if isinstance(item, torch.device) else item


def stays(node: fx.Node) -> bool:
    return node.op == "placeholder" and str(node.target) in STAYS


def rewritten(traced: Traced, gpu: bool) -> fx.GraphModule:
    """A copy, by all passes."""
    state = traced.fresh()
    if not gpu:
        return Pipeline(PASSES).run(state.gm, state.request, state.facts)
    gm = on_gpu(state.gm)
    facts = traced.facts(gm.graph.find_nodes(op="placeholder"))
    graphs = facts.get(DraftGraphs)
    if graphs is not None:
        facts.add(dataclasses.replace(graphs, prefill=on_gpu(graphs.prefill), step=on_gpu(graphs.step)))
    return Pipeline(PASSES).run(gm, state.request, facts)


def check(traced: Traced) -> None:
    """The GPU's graph is the CPU's, on the other device, and nothing in it is on the CPU but what must be."""
    ours, theirs = rewritten(traced, True), rewritten(traced, False)
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
