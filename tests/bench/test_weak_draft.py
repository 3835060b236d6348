"""bench/weak_draft.py on tiny models: the draft that is left answers as a model of so many layers does."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cli_models import save_model
from tiny import tiny

from bench import weak_draft
from specpass.benchmarks.results import read_results


def test_a_cut_model_is_the_first_layers_and_the_last() -> None:
    model = tiny("qwen2", layers=4)
    whole = copy.deepcopy(model)
    weak_draft.cut(model, 3)
    expected = copy.deepcopy(whole)
    with torch.no_grad():  # a layer that adds nothing is a layer left out
        left_out = expected.get_decoder().layers[2]
        left_out.self_attn.o_proj.weight.zero_()
        left_out.mlp.down_proj.weight.zero_()
    ids = torch.arange(5, 45)[None]
    ours, theirs = (m.generate(input_ids=ids, max_new_tokens=6, do_sample=False) for m in (model, expected))
    assert ours.tolist() == theirs.tolist()
    with pytest.raises(SystemExit, match=r"--layers 9: .* at most 3"):
        weak_draft.cut(model, 9)


def test_each_depth_is_measured_once(tmp_path: Path) -> None:
    folder = str(save_model(tmp_path / "tiny"))
    out = tmp_path / "weak.json"
    sizes = {"layers": [2], "tokens": 1536, "seeds": 1}
    methods = ("full", "draft", "specpass_best")
    how = {"methods": methods, "dtype": "float32", "lowering": "eager", "restart": False}
    args = SimpleNamespace(target=folder, draft=folder, out=out, **sizes, **how)
    bench = weak_draft.Bench(args)
    bench.run()
    assert not list(bench.todo())
    document = read_results(out)
    assert {(r["draft_layers"], r["method"]) for r in document["results"]} == {
        (None, "full"),
        (2, "draft"),
        (2, "specpass_best"),
    }
    assert [(e["draft_layers"], e["method"]) for e in document["summary"]] == [
        (None, "full"),
        (2, "draft"),
        (2, "specpass_best"),
    ]
    assert {e["prompts"] for e in document["summary"]} == {4}
    assert not list(weak_draft.Bench(args).todo())
