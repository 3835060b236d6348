"""Methods as values: what they accept, what they are called, how a ratio becomes a count."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specpass import PyramidKV, SnapKV, SpecKV, SpecKVPC, SpecPC, StreamingLLM
from specpass.errors import BudgetError, FuturesError, LookaheadError


class Selects(SnapKV):
    """Chooses for each KV head by itself."""

    def select(self, scores: torch.Tensor, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        raise NotImplementedError


EXAMPLES = [
    SpecKV(budget=1024),
    SpecKV(budget=0.25, window=16, lookahead=8, reduce="mean", pool="avg", kernel=5, temperature=0.7, seed=3),
    SpecKV(budget=64, lookahead_ids=((1, 2), (3, 4))),
    SnapKV(budget=1024),
    SnapKV(budget=1.0, window=1),
    StreamingLLM(budget=64),
    StreamingLLM(budget=0.5, sinks=0),
]


def test_defaults_are_the_papers() -> None:
    spec, snap, streaming = SpecKV(budget=1024), SnapKV(budget=1024), StreamingLLM(budget=1024)
    assert (spec.window, spec.reduce, spec.pool, spec.kernel, spec.lookahead) == (32, "max", "max", 7, None)
    assert (snap.window, snap.reduce, snap.pool, snap.kernel) == (32, "mean", "avg", 7)
    assert streaming.sinks == 4
    assert [m.drafts for m in (spec, snap, streaming)] == [True, False, False]
    assert [m.scored for m in (spec, snap, streaming)] == [True, True, False]


@pytest.mark.parametrize(
    ("method", "arguments", "names"),
    [
        (SpecKV, {"budget": 32}, "budget=32.*window=32"),
        (SpecKV, {"budget": 4.0}, r"budget=4\.0"),
        (SpecKV, {"budget": 0.0}, r"budget=0\.0"),
        (SpecKV, {"budget": float("nan")}, "budget=nan"),
        (SpecKV, {"budget": "64"}, "budget='64'"),
        (SpecKV, {"budget": "auto", "window": 4096}, "window=4096"),
        (SpecKV, {"budget": "auto", "share": 1.5}, r"share=1\.5"),
        (SnapKV, {"budget": "auto", "spread": "heads"}, "budget='auto'.*spread='heads'"),
        (SnapKV, {"budget": 64, "share": 0.9, "spread": "heads"}, r"share=0\.9.*spread='heads'"),
        (PyramidKV, {"budget": "auto"}, "budget='auto': PyramidKV"),
        (SpecKVPC, {"budget": "auto"}, "budget='auto': SpecKVPC"),
        (SpecPC, {"budget": "auto"}, "budget='auto': SpecPC"),
        (StreamingLLM, {"budget": "auto"}, "budget='auto': StreamingLLM"),
        (SpecKV, {"budget": 64, "window": 0}, "window=0"),
        (SpecKV, {"budget": 64, "window": 8.0}, r"window=8\.0"),
        (SpecKV, {"budget": 64, "lookahead": 1.5}, r"lookahead=1\.5"),
        (SpecKV, {"budget": 64, "kernel": 0}, "kernel=0"),
        (SpecKV, {"budget": 64, "temperature": float("nan")}, "temperature=nan"),
        (SnapKV, {"budget": 16, "window": 16}, "budget=16.*window=16"),
        (SnapKV, {"budget": 64, "kernel": 6}, "kernel=6"),
        (StreamingLLM, {"budget": 4}, "budget=4.*sinks=4"),
        (StreamingLLM, {"budget": 64, "sinks": -1}, "sinks=-1"),
        (StreamingLLM, {"budget": None}, "budget=None"),
        (SnapKV, {"budget": 64, "spread": "layers"}, "spread='layers'.*uniform.*heads.*global"),
        (PyramidKV, {"budget": 64, "spread": "heads"}, "spread='heads'.*spread of its own"),
        (Selects, {"budget": 64, "spread": "heads"}, "spread='heads'.*Selects selects by a function of its own"),
    ],
)
def test_what_no_graph_can_be_compiled_for_is_refused(method: type, arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(BudgetError, match=names):
        method(**arguments)


@pytest.mark.parametrize("method", EXAMPLES, ids=str)
def test_methods_are_frozen_values(method: Any) -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        method.budget = 7
    twin = dataclasses.replace(method)
    assert twin == method
    assert twin.key == method.key
    assert hash(twin) == hash(method)


def test_keys_tell_all_methods_and_all_fields_apart() -> None:
    keys = [method.key for method in EXAMPLES]
    for method in EXAMPLES:
        for field in dataclasses.fields(method):
            changed = {
                "budget": 4096,
                "window": 9,
                "sinks": 5,
                "reduce": "mean",
                "pool": "avg",
                "kernel": 11,
                "lookahead": 31,
                "temperature": 0.1,
                "seed": 99,
                "lookahead_ids": ((5,),),
                "verify": False,
                "sparse_prefill": 2048,
                "spread": "heads",
                "value_norms": True,
                "reconstruction": True,
                "futures": 4,
                "share": 0.5,
            }[field.name]
            if getattr(method, field.name) != changed and "lookahead" not in field.name:
                alone = {"temperature": 0.0, "lookahead_ids": None} if field.name == "futures" else {}
                keys.append(dataclasses.replace(method, **{field.name: changed}, **alone).key)
    keys += [SpecKV(budget=1024, lookahead=31).key, SpecKV(budget=1024, lookahead_ids=((5,),)).key]
    assert len(set(keys)) == len(keys)


def test_keys_are_the_same_in_every_process() -> None:
    code = "import specpass; print(specpass.SpecKV(budget=64, lookahead_ids=[[1, 2]]).key)"
    for seed in ("0", "1"):
        out = subprocess.run(
            [sys.executable, "-c", code],
            env={**_environment(), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == SpecKV(budget=64, lookahead_ids=[[1, 2]]).key


def _environment() -> dict[str, str]:
    import os

    return dict(os.environ)


@given(st.floats(0.001, 1.0), st.integers(1, 200_000))
def test_a_ratio_is_resolved_upwards_in_few_sizes(ratio: float, length: int) -> None:
    slots = SpecKV(budget=ratio, window=32).resolve(length).budget
    assert isinstance(slots, int)
    assert slots >= int(ratio * length)
    assert slots >= 33
    assert slots == 33 or (slots % 64 == 0 and slots < int(ratio * length) * 9 / 8 + 64)


def test_resolving_changes_the_budget_alone() -> None:
    assert SnapKV(budget=0.5, window=8).resolve(1000) == SnapKV(budget=512, window=8)
    assert StreamingLLM(budget=0.001, sinks=4).resolve(10) == StreamingLLM(budget=5)
    count = SpecKV(budget=100)
    assert count.resolve(None) is count
    assert count.resolve(7).layer_budgets(3) == (100, 100, 100)
    with pytest.raises(BudgetError, match=r"budget=0\.5.*prompt_length="):
        SpecKV(budget=0.5).resolve(None)
    with pytest.raises(BudgetError, match=r"budget=0\.5.*resolve"):
        SpecKV(budget=0.5).layer_budgets(2)


@pytest.mark.parametrize("kind", [SpecKV, SnapKV, StreamingLLM, PyramidKV, SpecPC, SpecKVPC])
def test_every_number_of_layers_has_its_budgets(kind: Any) -> None:
    """None, too: where all layers have windows."""
    for layers in range(4):
        assert len(kind(budget=100).layer_budgets(layers)) == layers


def test_speckv_pcs_first_step_says_what_the_whole_does() -> None:
    named = {"lookahead": 3, "neighbours": 5, "first_layer": 1, "reduce": "mean", "positions": "original"}
    named |= {"temperature": 0.5, "seed": 7}
    first = SpecKVPC(budget=256, prompt_budget=512, prompt_window=48, prompt_kernel=9, **named).prompt
    assert first == SpecPC(budget=512, window=48, kernel=9, **named)
    own = {"budget", "window", "kernel", "pool"}  # which the second step has for itself
    assert {field.name for field in dataclasses.fields(SpecPC)} == {*named, *own}


@pytest.mark.parametrize("ids", [torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]], ((1, 2), (3, 4))])
def test_lookahead_ids_become_tuples_and_set_the_lookahead(ids: Any) -> None:
    method = SpecKV(budget=64, lookahead_ids=ids)
    assert method.lookahead_ids == ((1, 2), (3, 4))
    assert all(type(token) is int for row in method.lookahead_ids for token in row)
    assert method.lookahead == 2
    assert method == SpecKV(budget=64, lookahead=2, lookahead_ids=ids)
    assert hash(method) == hash(SpecKV(budget=64, lookahead_ids=((1, 2), (3, 4))))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"lookahead_ids": [[1, 2], [3]]}, r"\[1, 2\]"),
        ({"lookahead_ids": []}, r"\[B, L\]"),
        ({"lookahead_ids": [[]]}, r"\[0\]"),
        ({"lookahead_ids": [1, 2]}, r"\[B, L\]"),
        ({"lookahead_ids": torch.tensor([1, 2])}, r"\[B, L\]"),
        ({"lookahead_ids": [[1, 2]], "lookahead": 3}, "lookahead=3.*2 tokens"),
    ],
)
def test_lookahead_ids_of_another_shape_are_refused(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(LookaheadError, match=names):
        SpecKV(budget=64, **arguments)


def test_a_lookahead_of_the_prompts_own_needs_no_draft() -> None:
    method = SpecKV(budget=64, lookahead="ngram")
    assert [method.look_ahead(new) for new in (None, 7, 500)] == [32, 7, 32]
    assert (method.drafts, method.looks_up, method.needs_draft) == (True, True, False)
    assert [SpecKV(budget=64, **given).needs_draft for given in ({}, {"lookahead_ids": [[1]]})] == [True, False]
    with pytest.raises(BudgetError, match=r"lookahead='draft'.*'ngram' or 'self'"):
        SpecKV(budget=64, lookahead="draft")
    with pytest.raises(BudgetError, match=r"lookahead=2\.5"):
        SpecKV(budget=64, lookahead=2.5)
    with pytest.raises(BudgetError, match="lookahead='ngram'"):
        SpecPC(budget=64, lookahead="ngram")
    with pytest.raises(LookaheadError, match=r"lookahead='ngram'.*2 tokens"):
        SpecKV(budget=64, lookahead="ngram", lookahead_ids=[[1, 2]])
    with pytest.raises(LookaheadError, match=r"SpecKVPC.*lookahead='ngram'"):
        SpecKVPC(budget=64, lookahead="ngram")


def test_a_lookahead_of_the_targets_own_needs_no_draft() -> None:
    method = SpecKV(budget=64, lookahead="self")
    assert [method.look_ahead(new) for new in (None, 7, 500)] == [32, 7, 32]
    assert (method.drafts, method.looks_up, method.writes_itself, method.needs_draft) == (True, False, True, False)
    with pytest.raises(LookaheadError, match=r"lookahead='self'.*2 tokens"):
        SpecKV(budget=64, lookahead="self", lookahead_ids=[[1, 2]])
    with pytest.raises(LookaheadError, match=r"SpecKVPC.*lookahead='self'"):
        SpecKVPC(budget=64, lookahead="self")
    with pytest.raises(FuturesError, match=r"futures=2.*lookahead='self' writes one"):
        SpecKV(budget=64, lookahead="self", futures=2)


def test_methods_need_no_torch() -> None:
    """`specpass models path` and friends start fast: naming a method does not import torch."""
    code = "import sys, specpass; specpass.SpecKV(budget=64); print('torch' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"
