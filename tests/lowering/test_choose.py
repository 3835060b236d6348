"""Kernel or aten: the table's answers, on real CPU tensors, on faked CUDA tensors, and in a model's report."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import compile_eager, run
from tiny import prompt, tiny
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

import specpass
import specpass.ops
from specpass.kernels import dispatch
from specpass.kernels.archs import ARCHS
from specpass.kernels.cpu import decode
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.dispatch import choose
from specpass.kernels.registry import REGISTRY
from specpass.lowering.choose import choose_sites

SPEC = torch.ops.specpass
pytestmark = pytest.mark.usefixtures("triton_counts_as_installed")
B, H, K, T, R, C, N, W = 2, 8, 2, 90, 12, 20, 64, 4


def tensors(device: str, dim: int = 64, group: int = H // K, dtype: torch.dtype = torch.bfloat16) -> dict[str, Any]:
    make = {"device": device, "dtype": dtype}
    return {
        "whole": torch.empty(B, T, K * group, dim, **make).transpose(1, 2),
        "query": torch.empty(B, K * group, R, dim, **make),
        "key": torch.empty(B, T, K, dim, **make).transpose(1, 2),
        "rows": torch.zeros(B, R, dtype=torch.int64, device=device),
        "lengths": torch.zeros(B, dtype=torch.int64, device=device),
        "new": torch.empty(B, K * group, 1, dim, **make),
        "keys": torch.empty(B, K, C + N, dim, **make),
        "used": torch.zeros(B, K, dtype=torch.int64, device=device),
    }


def attend(query: Any, keys: Any, values: Any) -> dict[str, Any]:
    """Operands of `attend` that decide."""
    return {"query": query, "keys": keys, "values": values, "softcap": 0.0, "sinks": None}


def importance(query: Any, key: Any) -> dict[str, Any]:
    """Operands of `importance` that decide."""
    least = {"window": W, "reduce": "max", "weights": None, "lse": None, "softcap": 0.0, "sinks": None}
    return {"query": query, "key": key, **least}


def steps(whole: Any, query: Any, key: Any, rows: Any, lengths: Any, new: Any, keys: Any, used: Any) -> tuple[Any, ...]:
    """What a pruned prefill and a decode step hold."""
    attended = SPEC.prefill_attention(whole, key, key, 0.1)
    scores = SPEC.importance(query, key, rows, lengths, W, 0.1, "max")
    positions = SPEC.select(scores, lengths, C, W, 7, "max")
    stored = SPEC.gather_kv(key, key, positions, N)
    return attended, scores, positions, *stored, SPEC.attend(new, keys, keys, used, 0.1)


def test_fake_kernels_run_on_a_faked_cuda_device() -> None:
    with FakeTensorMode():
        given = tensors("cuda")
        attended, scores, positions, keys, values, lengths, out = steps(**given)
    assert {t.device.type for t in (attended, scores, positions, keys, values, lengths, out)} == {"cuda"}
    assert (scores.shape, scores.dtype) == ((B, K, T), torch.float32)
    assert (positions.shape, positions.dtype) == ((B, K, C), torch.int64)
    assert keys.shape == values.shape == (B, K * (C + N), 64)
    assert (lengths.shape, out.shape, out.dtype) == ((B, K), (B, H, 1, 64), torch.bfloat16)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_sites_of_a_graph_are_chosen_from_its_fake_tensors(device: str) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        given = tensors(device)
        gm = make_fx(steps)(*given.values())
    kernels = [choice.kernel for _, choice in choose_sites(gm)]
    names = [choice.operator for _, choice in choose_sites(gm)]
    assert names == ["prefill_attention", "importance", "select", "gather_kv", "attend"]
    own = (["prefill_tiles", "importance_tiles"], [None, None]) if device == "cpu" else ([None, "importance"],)
    assert kernels[:2] in own  # as this CPU is
    assert kernels[2:] == ([None] * 3 if device == "cpu" else [None, "gather", "decode"])
    assert all(choice.reason for _, choice in choose_sites(gm))


REFUSED = [
    ({"dim": 20}, "multiple of 8"),
    ({"dim": 320}, "at most 256"),
    ({"group": 17}, "17 query heads"),
    ({"dtype": torch.float64}, "float64"),
]


@pytest.mark.parametrize(("sizes", "reason"), REFUSED, ids=[reason for _, reason in REFUSED])
def test_unsupported_shapes_take_aten_and_say_why(sizes: dict[str, Any], reason: str) -> None:
    with FakeTensorMode():
        given = tensors("cuda", **sizes)
        choice = choose("attend", attend(given["new"], given["keys"], given["keys"]))
    assert choice.kernel is None
    assert reason in choice.reason


def test_appends_strided_storage_and_float32_of_large_heads_take_aten() -> None:
    with FakeTensorMode():
        given = tensors("cuda")
        keys = given["keys"]
        assert choose("attend", attend(given["query"], keys, keys)).reason == "several new queries at once"
        strided = torch.empty(B, C + N, K, 64, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
        assert choose("attend", attend(given["new"], strided, keys)).reason == "the cache's storage is not dense"
        large = tensors("cuda", dim=256, dtype=torch.float32)
        assert "spills" in choose("importance", importance(large["query"], large["key"])).reason
        assert choose("importance", importance(given["query"], given["key"])).kernel == "importance"


def test_sparse_prefill_is_a_kernels_where_the_prompt_is_not_read_whole() -> None:
    def reason(dtype: torch.dtype = torch.bfloat16, read: int = T // 2 - 1, ahead: int = 2, **sizes: int) -> str:
        given = tensors("cuda", dtype=dtype, **sizes)
        operands = {"query": given["whole"], "key": given["key"], "value": given["key"], "lengths": given["lengths"]}
        operands["columns"] = torch.zeros(B, K, read, dtype=torch.int64, device="cuda")
        return str(choose("prefill_attention_sparse", operands | {"window": W, "ahead": ahead, "recent": read}))

    with FakeTensorMode():
        assert "kernel sparse_prefill" in reason()
        assert "aten (a prompt that is read whole" in reason(read=T // 2)
        assert "aten (group of 17 query heads: at most 16" in reason(group=17)
        assert "free of spills" in reason(torch.float32, dim=256)
        assert "kernel sparse_prefill" in reason(torch.float32)
    symbolic = FakeTensorMode(shape_env=ShapeEnv())
    key = symbolic.from_tensor(torch.zeros(1, K, T, 64, device="meta"), static_shapes=False)
    operands = {"query": key, "columns": torch.zeros(1, K, T, dtype=torch.int64), "recent": T}
    assert REGISTRY["sparse_prefill"].refuse_layout(operands) is None  # the graph serves prompts of any length


def test_old_devices_and_a_missing_triton_take_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    with FakeTensorMode():
        given = tensors("cuda")
        positions = torch.zeros(B, K, C, dtype=torch.int64, device="cuda")
    operands = {"key": given["key"], "value": given["key"], "positions": positions, "room": N}
    old = dataclasses.replace(ARCHS["sm_80"], name="sm_75", capability=75)
    monkeypatch.setattr(dispatch, "device_arch", lambda index: old)
    assert choose("gather_kv", operands).reason == "sm_75 is older than sm_80"
    monkeypatch.setattr(dispatch, "triton_installed", lambda: False)
    assert "pip install triton" in choose("gather_kv", operands).reason


def test_the_cpu_path_never_imports_triton() -> None:
    code = (
        "import sys, torch, specpass.ops; s = torch.ops.specpass; k = torch.randn(1, 2, 9, 8); "
        "s.gather_kv(k, k, torch.zeros(1, 2, 3, dtype=torch.int64), 4); "
        "s.attend(k[:, :, :1], k, k, torch.ones(1, 2, dtype=torch.int64), 0.1); "
        "print('triton' in sys.modules)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "False"


def test_a_models_report_says_what_each_site_became(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode, "WAYS", {})  # whatever this CPU has
    layers, method = 2, specpass.SnapKV(budget=12, window=4)
    model = compile_eager(tiny(layers=layers), method)
    run(model, prompt(40, seed=1), 3)
    report = specpass.report(model)
    found = {record.kind: [(path, str(choice)) for path, choice in record.choices] for record in report.graphs}
    operators = {
        "prefill": ["prefill_attention_lse", "importance", "select", "gather_kv"],
        "decode": ["append_kv", "attend"],
    }
    for kind, names in operators.items():
        reasons = dict.fromkeys(dispatch.CPU_KERNELS, "float32, where AMX and AVX-512 multiply bfloat16")
        lines = [f"{name}: aten ({reasons.get(name, 'cpu tensors')})" for name in names]
        assert [line for _, line in found[kind]] == lines * layers
        assert all(f"layers.{index // len(names)}." in path for index, (path, _) in enumerate(found[kind]))
    assert f"{layers} x attend: aten (cpu tensors)" in str(report)


def test_a_step_in_float32_is_one_call_where_the_cpu_has_vectors() -> None:
    way = "decode_avx2"
    if isinstance(refused := decode.WAYS[way].library(), Unbuilt):
        pytest.skip(str(refused))
    model = compile_eager(tiny(layers=2), specpass.SnapKV(budget=12, window=4))
    run(model, prompt(40, seed=1), 3)
    assert f"2 x append_attend: kernel {way} (float32 and bfloat16 on a CPU with AVX2)" in str(specpass.report(model))
