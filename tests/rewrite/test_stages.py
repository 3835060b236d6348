"""What a graph may hold and must hold at a stage, and what holds of every graph between passes."""

from __future__ import annotations

import pytest
from graphs import SNAPKV
from torch import fx
from traces import prompt_graph

from specpass.rewrite.stages import STAGES, check_stage
from specpass.rewrite.verify import StageError, verify


def test_stages_say_what_a_graph_holds() -> None:
    graphs = {"TRACED": "pack_rows", "DRAFTED": "resize_prompt", "PRUNED": "specialize"}
    gms = {stage: prompt_graph(SNAPKV, layers=2).after(name).gm for stage, name in graphs.items()}
    for stage, gm in gms.items():
        check_stage(gm, STAGES[stage], "mine", left=True, kind="prefill", sites=2)
    with pytest.raises(StageError, match=r"mine: fill\w* \(model.layers.0.*\) is not allowed in a PRUNED graph"):
        check_stage(gms["DRAFTED"], STAGES["PRUNED"], "mine", left=True, kind="prefill", sites=2)
    with pytest.raises(StageError, match=r"belongs to PRUNED .. LOWERED"):
        check_stage(gms["PRUNED"], STAGES["DRAFTED"], "mine", left=False, kind="prefill", sites=2)
    with pytest.raises(
        StageError,
        match="one gather_kv or gather_ragged or keep_kv for each of its 3 attention sites, and this one has",
    ):
        check_stage(gms["PRUNED"], STAGES["PRUNED"], "mine", left=True, kind="prefill", sites=3)


def broken() -> tuple[fx.GraphModule, fx.Node]:
    gm = prompt_graph(SNAPKV).after("specialize").gm
    return gm, next(node for node in gm.graph.nodes if "take_rows" in str(node.target))


def test_verify_finds_what_a_pass_may_not_leave() -> None:
    gm, node = broken()
    verify(gm, "mine", full=True)
    del node.meta["val"]
    with pytest.raises(StageError, match=r"after mine: node take_rows\w* has no fake value"):
        verify(gm, "mine")
    gm, node = broken()
    node.args = (node.args[0], gm)
    with pytest.raises(StageError, match="takes the Python object GraphModule"):
        verify(gm, "mine")
