"""The runner: order, what passes say of themselves, stages, observers, dumps."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from graphs import SNAPKV, small_graph
from torch import fx
from traces import prompt_graph

from specpass.dialect.define import SPEC
from specpass.graph.edit import Editor
from specpass.graph.walk import ATEN, first_call, output_of
from specpass.passes.annotate import Annotate
from specpass.passes.pipeline import PASSES
from specpass.rewrite import Facts, Kind, Pass, Pipeline, Refusal, Request
from specpass.rewrite.pipeline import check_names
from specpass.rewrite.verify import StageError

PREFILL = Request("prefill", SNAPKV)


@dataclasses.dataclass(frozen=True)
class Number:
    """A fact."""

    value: int


@dataclasses.dataclass(frozen=True)
class Say(Pass):
    """Says a number, if it keeps its word."""

    number: int | None = 1

    name: ClassVar[str] = "say"
    provides: ClassVar[tuple[type, ...]] = (Number,)

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        if self.number is not None:
            facts.add(Number(self.number))


@dataclasses.dataclass(frozen=True)
class Add(Pass):
    """Adds the number to what the graph returns."""

    name: ClassVar[str] = "add"
    kinds: ClassVar[tuple[Kind, ...]] = ("prefill",)
    requires: ClassVar[tuple[type, ...]] = (Number,)

    def applies(self, request: Request) -> bool:
        return request.method is not None

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        output = output_of(gm.graph)
        result = output.all_input_nodes[0]
        new = Editor(gm).call(ATEN.add.Tensor, result, facts[Number].value, before=output)
        output.replace_input_with(result, new)


def doubled() -> fx.GraphModule:
    return small_graph(lambda x: x * 2, torch.zeros(3)).gm


def test_passes_run_in_their_order() -> None:
    gm = Pipeline((Say(), Add()), entry="").run(doubled(), PREFILL, Facts())
    assert gm(torch.ones(3)).tolist() == [3, 3, 3]


@pytest.mark.parametrize("request_", [Request("decode", SNAPKV), Request("prefill")], ids=["kind", "applies"])
def test_passes_that_do_not_apply_are_left_out(request_: Request) -> None:
    gm = Pipeline((Say(), Add()), entry="").run(doubled(), request_, Facts())
    assert gm(torch.ones(3)).tolist() == [2, 2, 2]


def test_a_fact_that_nobody_has_said() -> None:
    with pytest.raises(StageError, match="add needs Number, which no pass before it has said"):
        Pipeline((Add(),), entry="").run(doubled(), PREFILL, Facts())


def test_a_promise_that_is_not_kept() -> None:
    with pytest.raises(StageError, match="say promises Number and has not said so"):
        Pipeline((Say(None),), entry="").run(doubled(), PREFILL, Facts())


# -- skipped passes


def test_what_a_skipped_pass_would_have_said_is_a_refusal() -> None:
    """An experiment that cannot be: the model then runs exactly."""
    with pytest.raises(Refusal, match="add needs Number, and say is skipped"):
        Pipeline((Say(), Add()), entry="", skip=["say"]).run(doubled(), PREFILL, Facts())
    gm = Pipeline((Say(), Add()), entry="", skip=["add"]).run(doubled(), PREFILL, Facts())
    assert gm(torch.ones(3)).tolist() == [2, 2, 2]


def test_an_unknown_name_is_no_skip() -> None:
    with pytest.raises(ValueError, match=r"skip_passes=\['ad'\]: no such pass; the passes are say, add"):
        check_names(["ad"], (Say(), Add()))
    assert not Pipeline((Say(), Add()), skip=["share_lse"]).skip  # a pass of another tuple


# -- stages


class Nothing(Pass):
    name = "nothing"
    stage = "PRUNED"

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        """Leaves the graph as it is."""


def test_the_entry_stage_is_checked() -> None:
    pruned = prompt_graph(SNAPKV).after("specialize").gm
    with pytest.raises(StageError, match=r"before the first pass: \w+ \(.*\) is not allowed in a TRACED graph"):
        Pipeline((Nothing(),)).run(pruned, PREFILL, Facts())


def test_a_stage_is_checked_when_it_is_left() -> None:
    """Nobody pruned: of the operators that a PRUNED graph is done with, the first is named."""
    state = prompt_graph(SNAPKV).after("take_last")
    with pytest.raises(StageError, match=r"after nothing: fill \(model.layers.0.*\) is not allowed in a PRUNED graph"):
        Pipeline((Nothing(),), entry="DRAFTED").run(state.gm, PREFILL, state.facts)


def test_a_stage_is_checked_after_each_pass() -> None:
    """What a stage may not hold yet is found behind the pass that put it in."""

    class TooEarly(Nothing):
        name = "too_early"
        stage = "TRACED"

        def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
            ids = gm.graph.find_nodes(op="placeholder")[0]
            Editor(gm).call(SPEC.row_index, ids, before=first_call(gm.graph))

    with pytest.raises(
        StageError, match=r"after too_early: row_index.* is not allowed in a TRACED graph: row_index bel"
    ):
        Pipeline((TooEarly(), Annotate())).run(prompt_graph(SNAPKV).fresh().gm, PREFILL, Facts())


def test_full_verification_compares_shapes() -> None:
    class Lie(Nothing):
        name = "lie"

        def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
            node = next(node for node in gm.graph.nodes if "take_rows" in str(node.target))
            node.meta["val"] = node.meta["val"][:, :, 1:]

    Pipeline((Lie(),), entry="PRUNED").run(prompt_graph(SNAPKV).after("specialize").gm, PREFILL, Facts())
    gm = prompt_graph(SNAPKV).after("specialize").gm
    with pytest.raises(StageError, match="after lie: take_rows"):
        Pipeline((Lie(),), entry="PRUNED", full_verify=True).run(gm, PREFILL, Facts())


# -- observers


def planned(request: Request) -> list[str]:
    return [item.name for item in PASSES if request.kind in item.kinds and item.applies(request)]


def test_observers_see_the_traced_graph_and_each_pass_in_order() -> None:
    seen: list[tuple[str, str, int]] = []

    def observe(request: Request, name: str, gm: fx.GraphModule) -> None:
        seen.append((request.kind, name, len(gm.graph.nodes)))

    state = prompt_graph(SNAPKV).fresh()
    size = len(state.gm.graph.nodes)
    pipeline = Pipeline(PASSES, observers=[observe])
    pipeline.run(state.gm, PREFILL, state.facts)
    assert [name for _, name, _ in seen] == ["traced", *planned(PREFILL)]
    assert seen[0] == ("prefill", "traced", size)
    assert seen[-1][2] == len(state.gm.graph.nodes)
    assert list(pipeline.seconds) == planned(PREFILL)


def test_dumps_are_numbered_readable_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "dump"
    state = prompt_graph(SNAPKV).fresh()
    monkeypatch.setenv("SPECPASS_DUMP", str(folder))
    Pipeline(PASSES).run(state.gm, PREFILL, state.facts)
    Pipeline((Nothing(),), entry="PRUNED").run(state.gm, dataclasses.replace(PREFILL, model="draft"), Facts())
    files = sorted(folder.iterdir())
    names = ["traced", *planned(PREFILL)]
    numbers = [int(file.name.split("_")[0]) for file in files]
    assert numbers == list(range(numbers[0], numbers[0] + len(names) + 1))
    stems = [file.stem.split("_", 1)[1] for file in files]
    assert stems == [*(f"prefill_{name}" for name in names), "draft_prefill_nothing"]
    assert "specpass.fill.default" in files[0].read_text()
    assert "specpass.select.default" in files[-1].read_text()
    for file in files:
        ast.parse(file.read_text())


def test_without_the_variable_nothing_is_dumped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPECPASS_DUMP", raising=False)
    monkeypatch.chdir(tmp_path)
    Pipeline((Say(),), entry="").run(doubled(), PREFILL, Facts())
    assert not list(tmp_path.iterdir())


def test_a_request_that_prunes_nothing_has_no_method() -> None:
    with pytest.raises(Exception, match="this decode graph is not pruned"):
        Request("decode").pruning  # noqa: B018
    assert not Request("decode").compresses


def test_a_pass_without_a_body() -> None:
    class Empty(Pass):
        name = "empty"

    with pytest.raises(NotImplementedError, match="Empty"):
        Pipeline((Empty(),), entry="").run(doubled(), PREFILL, Facts())
