"""The graphs: what each pass takes away and puts in, what may stand in them, how many of them there are."""

from __future__ import annotations

import ast
import operator
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from expecttest import assert_expected_inline
from support import call, compile_eager, kept, padded
from tiny import prompt, tiny
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import specpass
import specpass.backend.compile
from specpass.graph.edit import copy_module
from specpass.lowering.fuse import FUSION
from specpass.lowering.lower import Lowered
from specpass.passes import pipeline
from specpass.rewrite import Request
from specpass.rewrite.stages import STAGES, check_stage
from specpass.rewrite.verify import StageError, verify
from specpass.testing import eager

C, W, L, LAYERS = 24, 8, 4, 2
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L)


def count(gm: fx.GraphModule) -> Counter[str]:
    """Operators by name without overloads, submodules by theirs."""
    names = Counter[str]()
    for node in gm.graph.nodes:
        if node.op == "call_function" and node.target is not operator.getitem:
            names[str(getattr(node.target, "overloadpacket", node.target))] += 1
        elif node.op == "call_module":
            names[node.target] += 1
    return names


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

        return Lowered(run, (), 0, 0, (), {}, 0.0)


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


# (kind, pass) -> operators that are gone, operators that are there and how often
EXPECTED: dict[tuple[str, str], tuple[list[str], dict[str, int]]] = {
    ("prefill", "canonicalize"): (
        ["aten.softmax"],
        {"aten.scaled_dot_product_attention": LAYERS, "specpass.fill": LAYERS, "specpass.lookahead": 1},
    ),
    ("prefill", "attend_packed"): (
        ["aten.scaled_dot_product_attention", "aten.bitwise_and", "aten.__and__", "aten.le"],
        {"specpass.prefill_attention": LAYERS},
    ),
    ("prefill", "pack_rows"): ([], {"specpass.pack_order": 1, "specpass.pack_ids": 1}),
    ("prefill", "insert_draft"): (
        ["specpass.lookahead"],
        {"draft_prefill": 1, "draft_step": L - 1, "specpass.next_token": L, "specpass.append_ids": 1},
    ),
    ("prefill", "take_last"): ([], {"specpass.take_positions": 1, "specpass.fill": LAYERS}),
    ("prefill", "score_importance"): (
        [],
        {"specpass.score_rows": 1, "specpass.take_rows": LAYERS, "specpass.importance": LAYERS},
    ),
    ("prefill", "gather_prune"): (["specpass.fill"], {"specpass.select": LAYERS, "specpass.gather_kv": LAYERS}),
    ("decode", "canonicalize"): ([], {"aten.scaled_dot_product_attention": LAYERS, "specpass.append_kv": LAYERS}),
    ("decode", "attend_slots"): (
        ["aten.scaled_dot_product_attention", "aten.le", "aten.lt", "aten.bitwise_and"],
        {"specpass.attend": LAYERS, "specpass.append_kv": LAYERS},
    ),
}


@pytest.mark.parametrize(("kind", "name"), EXPECTED, ids=["-".join(key) for key in EXPECTED])
def test_what_each_pass_does(record: Record, kind: str, name: str) -> None:
    (gone, there), found = EXPECTED[kind, name], record.after[kind, name]
    assert {operator_name: found[operator_name] for operator_name in gone} == dict.fromkeys(gone, 0)
    assert {operator_name: found[operator_name] for operator_name in there} == there


def test_every_pass_ran_in_the_order_of_the_pipeline(record: Record) -> None:
    for kind in ("prefill", "decode"):
        request = Request(kind, METHOD, L)
        names = [item.name for item in pipeline.PASSES if kind in item.kinds and item.applies(request)]
        assert [name for seen, name in record.after if seen == kind] == names
    for kind in ("prefill", "decode"):  # annotate only looks
        assert record.after[kind, "annotate"] == record.after[kind, "canonicalize"]


def test_methods_without_scores_or_draft_insert_neither() -> None:
    record = Record(specpass.StreamingLLM(budget=C), layers=1)
    record(prompt(60))
    found = record.after["prefill", "specialize"]
    assert found["specpass.select_recent"] == found["specpass.gather_kv"] == 1
    assert not {"specpass.importance", "specpass.select", "specpass.next_token", "draft_prefill"} & set(found)


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
specpass.gather_kv
specpass.take_positions""",
    )


# -- verification, dumps, skipped passes


def test_verify_finds_what_a_pass_may_not_leave(record: Record) -> None:
    def broken() -> tuple[fx.GraphModule, fx.Node]:
        twin = copy_module(record.backend.stages["PRUNED"])
        return twin, next(node for node in twin.graph.nodes if "take_rows" in str(node.target))

    gm, node = broken()
    verify(gm, "mine", full=True)
    del node.meta["val"]
    with pytest.raises(StageError, match=r"after mine: node take_rows\w* has no fake value"):
        verify(gm, "mine")
    gm, node = broken()
    node.meta["val"] = node.meta["val"][:, :, 1:]
    with pytest.raises(StageError, match="after mine: take_rows"):
        verify(gm, "mine", full=True)
    gm, node = broken()
    node.args = (node.args[0], gm)
    with pytest.raises(StageError, match="takes the Python object GraphModule"):
        verify(gm, "mine")


def test_stages_say_what_a_graph_holds(record: Record) -> None:
    stages = record.backend.stages
    for name in ("TRACED", "DRAFTED", "PRUNED"):
        check_stage(stages[name], STAGES[name], "mine", left=True, kind="prefill", sites=LAYERS)
    with pytest.raises(StageError, match=r"mine: fill\w* \(model.layers.0.*\) is not allowed in a PRUNED graph"):
        check_stage(stages["DRAFTED"], STAGES["PRUNED"], "mine", left=True, kind="prefill", sites=LAYERS)
    with pytest.raises(StageError, match=r"score_rows belongs to PRUNED .. LOWERED"):
        check_stage(stages["PRUNED"], STAGES["DRAFTED"], "mine", left=False, kind="prefill", sites=LAYERS)
    with pytest.raises(
        StageError, match="one gather_kv or keep_kv for each of its 3 attention sites, and this one has 2"
    ):
        check_stage(stages["PRUNED"], STAGES["PRUNED"], "mine", left=True, kind="prefill", sites=3)


def test_dumps_are_numbered_readable_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECPASS_DUMP", str(tmp_path / "dump"))
    model = compile_eager(tiny(layers=1), specpass.SnapKV(budget=C, window=W))
    call(model, prompt(60), specpass.BudgetCache(model.config, specpass.SnapKV(budget=C, window=W)))
    files = sorted((tmp_path / "dump").iterdir())
    request = Request("prefill", specpass.SnapKV(budget=C, window=W))
    planned = [item.name for item in pipeline.PASSES if "prefill" in item.kinds and item.applies(request)]
    names = ["traced", *planned, "traced", *(item.name for item in FUSION if "prefill" in item.kinds)]
    numbers = [int(file.name.split("_")[0]) for file in files]
    assert numbers == list(range(numbers[0], numbers[0] + len(names)))
    assert [file.stem.split("_prefill_")[1] for file in files] == names
    assert "specpass.select.default" in files[-1].read_text()
    assert "specpass.fill.default" in files[0].read_text()
    for file in files:
        ast.parse(file.read_text())


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
