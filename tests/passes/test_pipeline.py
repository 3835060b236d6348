"""The passes together, in a compiled model: their order, and what holds of the graphs that they make.

Each pass by itself has a file of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from graph_text import count
from support import call, kept, padded
from tiny import prompt, tiny
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import specpass
import specpass.backend.compile
from specpass.lowering.lower import Lowered
from specpass.passes import pipeline
from specpass.rewrite import Request
from specpass.testing import eager

C, W, L, LAYERS = 24, 8, 4, 2
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L)


class Record:
    """One model, its backend, what each pass left behind, and the inputs of each prefill graph."""

    def __init__(
        self, method: Any, draft: Any = None, layers: int = LAYERS, attention: str = "sdpa", **options: Any
    ) -> None:
        self.after: dict[tuple[str, str], Counter[str]] = {}
        self.inputs: list[tuple[Any, ...]] = []
        self.model, self.method = tiny(layers=layers, attention=attention), method
        self.backend = specpass.Backend(
            draft,
            method,
            lowering="eager",
            keep_stages=("TRACED", "DRAFTED", "PRUNED"),
            full_verify=True,
            observe=self.observe,
            **options,
        )
        self.model.compile(backend=self.backend, dynamic=True)

    def __call__(self, ids: torch.Tensor, **kwargs: Any) -> specpass.BudgetCache:
        cache = specpass.BudgetCache(self.model.config, self.method, max_new_tokens=8)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("specpass.backend.compile.lower", self.lower)
            call(self.model, ids, cache, **kwargs)
            if len(ids) > 1:
                position = torch.full((len(ids), 1), ids.shape[1])
                call(self.model, prompt(1, batch=len(ids)), cache, position_ids=position)
        return cache

    def observe(self, request: Request, name: str, gm: fx.GraphModule) -> None:
        if name != "traced":
            self.after[request.kind, name] = count(gm)

    def lower(self, gm: fx.GraphModule, lowering: str, request: Request, **options: Any) -> Lowered:
        gm.recompile()

        def run(*args: Any) -> Any:
            if request.kind == "prefill":
                self.inputs.append(args)
            return gm.forward(*args)

        return Lowered(run, (), 0, 0, (), {}, 0.0, 0)


@pytest.fixture(scope="module")
def draft() -> Any:
    return tiny(seed=1, layers=1)


@pytest.fixture(scope="module")
def record(draft: Any) -> Record:
    """SpecKV on a padded batch of two: prefill and one decode step."""
    record = Record(METHOD, draft)
    ids, mask = padded([prompt(60, seed=1), prompt(43, seed=2)])
    record.ids, record.mask = ids, mask
    record.cache = record(ids, attention_mask=mask)
    return record


def test_every_pass_ran_in_the_order_of_the_pipeline(record: Record) -> None:
    for kind in ("prefill", "decode"):
        request = Request(kind, METHOD, L, verify=True)
        names = [item.name for item in pipeline.PASSES if kind in item.kinds and item.applies(request)]
        assert [name for seen, name in record.after if seen == kind] == names
    for kind in ("prefill", "decode"):  # annotate only looks
        assert record.after[kind, "annotate"] == record.after[kind, "canonicalize"]


def test_eager_attention_becomes_one_operator() -> None:
    """attn_implementation="eager" spells matmul, softmax, matmul; the kept sets are those of SDPA."""
    method = specpass.SnapKV(budget=C, window=W)
    cache = (record := Record(method, layers=1, attention="eager"))(prompt(60, seed=4))
    found = record.after["prefill", "canonicalize"]
    assert found["aten.scaled_dot_product_attention"] == 1
    assert found["aten.softmax"] == 0
    chosen = eager.select(tiny(layers=1), prompt(60, seed=4), C, None, eager.Scoring(W, reduce="mean", pool="avg"))
    for scores, positions in zip(chosen.scores, kept(cache), strict=True):
        assert eager.score_margin(scores, positions, W) >= -1e-6


# -- invariants of the graphs themselves


def graphs_of(gm: fx.GraphModule) -> list[fx.Graph]:
    return [module.graph for module in gm.modules() if isinstance(module, fx.GraphModule)]


def test_the_drafted_graph_alone_yields_the_lookahead(record: Record, draft: Any) -> None:
    results = fx.Interpreter(record.backend.stages["DRAFTED"]).run(*record.inputs[0])
    found = [out for out in results if isinstance(out, torch.Tensor) and out.shape == (2, L)]
    assert len(found) == 1
    assert torch.equal(found[0], record.cache.lookahead_ids)
    rows = [eager.draft_lookahead(draft, record.ids[[row], (0, 17)[row] :], L)[0] for row in range(2)]
    assert torch.equal(found[0], torch.cat(rows))


def test_the_pruned_graph_runs_on_fake_tensors(record: Record) -> None:
    """A read of a tensor's value on the host would raise here, as would a tensor that is not an input."""
    mode = FakeTensorMode()
    inputs = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in record.inputs[0]]
    assert all(isinstance(a, (torch.Tensor, int)) for a in inputs)
    with mode:
        results = fx.Interpreter(record.backend.stages["PRUNED"]).run(*inputs)
    shapes = Counter(tuple(out.shape) for out in results)
    assert shapes[2, 1, 128] == 1
    assert shapes[2, 2 * (C + 64), 16] == 2 * LAYERS


def test_no_operator_takes_an_object(record: Record) -> None:
    plain = (fx.Node, int, float, str, bool, torch.dtype, torch.device, torch.layout, torch.memory_format)
    for graph in graphs_of(record.backend.stages["PRUNED"]):
        for node in graph.nodes:
            assert node.op != "get_attr"
            for argument in torch.utils._pytree.tree_leaves((node.args, node.kwargs)):
                assert argument is None or isinstance(argument, plain), (node, argument)


def test_no_value_has_two_axes_of_prompt_length(record: Record) -> None:
    for graph in graphs_of(record.backend.stages["PRUNED"]):
        for node in graph.nodes:
            for value in torch.utils._pytree.tree_leaves(node.meta.get("val")):
                if isinstance(value, torch.Tensor) and value.dim() > 1:
                    symbols = [str(size) for size in value.shape[1:] if isinstance(size, torch.SymInt)]
                    assert len(symbols) < 2, (node, value.shape)


def test_the_draft_is_dead_before_the_targets_first_layer(record: Record) -> None:
    nodes = list(record.backend.stages["PRUNED"].graph.nodes)
    prefill = next(node for node in nodes if node.op == "call_module" and node.target == "draft_prefill")
    last = max(nodes.index(user) for part in prefill.users for user in part.users)
    first = next(index for index, node in enumerate(nodes) if "aten.embedding" in str(node.target))
    assert last < first


def test_each_layers_kv_dies_in_that_layer(record: Record) -> None:
    nodes = list(record.backend.stages["PRUNED"].graph.nodes)
    sites = [i for i, node in enumerate(nodes) if "prefill_attention" in str(node.target)]
    for index, site in enumerate(sites):
        readers = [nodes.index(user) for source in nodes[site].args[1:3] for user in source.users]
        assert max(readers) < (sites[index + 1] if index + 1 < LAYERS else len(nodes) - 10)


def test_a_one_layer_graph(draft: Any) -> None:
    """Golden: the operators of specpass, in order, with what the target does between them left out."""
    record = Record(METHOD, draft, layers=1)
    record(prompt(60))
    names = [str(node.target).removesuffix(".default") for node in record.backend.stages["PRUNED"].graph.nodes]
    assert_expected_inline(
        "\n".join(name for name in names if name.startswith(("specpass.", "draft_p", "draft_s"))),
        """\
specpass.full_lengths
draft_prefill
specpass.next_token
draft_step
specpass.next_token
draft_step
specpass.next_token
draft_step
specpass.next_token
specpass.score_rows
specpass.append_ids
specpass.size
specpass.prefill_attention
specpass.take_rows
specpass.importance
specpass.select
specpass.ahead_index
specpass.add_lookahead
specpass.gather_kv
specpass.take_positions
specpass.ahead_index
specpass.take_positions""",
    )


# -- skipped passes


def test_a_pass_can_be_skipped_by_name(draft: Any) -> None:
    """Without its draft SpecKV is SnapKV with its own reductions."""
    record = Record(METHOD, draft, layers=1, skip_passes=["insert_draft"])
    cache = record(prompt(60, seed=5))
    assert not {"draft_prefill", "specpass.append_ids"} & set(record.after["prefill", "specialize"])
    chosen = eager.select(tiny(layers=1), prompt(60, seed=5), C, None, eager.Scoring(W))
    for scores, positions in zip(chosen.scores, kept(cache), strict=True):
        assert eager.score_margin(scores, positions, W) >= -1e-6
    with pytest.raises(ValueError, match=r"insert_drift.*insert_draft"):
        specpass.Backend(draft, METHOD, skip_passes=["insert_drift"])
