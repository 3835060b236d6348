"""`specpass bench speed`: its plan, its floors, and measurements of tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_models import save_model
from typer.testing import CliRunner

from specpass import cli
from specpass.benchmarks.models import Pair
from specpass.benchmarks.results import read_results
from specpass.benchmarks.speed import child as speed_child
from specpass.benchmarks.speed import floors, profiles, rates
from specpass.benchmarks.speed import run as speed
from specpass.benchmarks.speed.run import Config, Plan, Run
from specpass.benchmarks.speed.table import aims, markdown
from specpass.errors import BenchmarkError, PeerError
from specpass.hub import read_config
from specpass.reports import cost
from specpass.sizes import Decoder

runner = CliRunner()
FIELDS = {"ttft_s", "decode_tokens_per_s", "kv_bytes", "peak_bytes", "compile_cold_s", "compile_warm_s"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


def job(folder: str, method: str, **changes: Any) -> dict[str, Any]:
    return {
        "method": method,
        "budget": None,
        "length": 500,
        "batch": 1,
        "prefills": 1,
        "steps": 4,
        "target": folder,
        "draft": folder,
        "dtype": "float32",
        "device": "cpu",
        "lowering": "eager",
        **changes,
    }


def test_full_kv_is_measured(folder: str) -> None:
    found = speed_child.measure(job(folder, "full_eager", batch=2))
    assert found["ttft_s"] > 0
    assert found["decode_tokens_per_s"] == pytest.approx(2000 / found["decode_ms"])
    tokens = 500 + 1 + speed_child.WARM_UP_STEPS + 1 + 4  # prompt, the token that generate feeds, what was decoded
    layer = 2 * 2 * 2 * 16 * 4  # keys and values, batch, KV heads, head size, float32
    assert tokens - 2 <= found["kv_bytes"] / (2 * layer) <= tokens
    assert found["peak_bytes"] > found["kv_bytes"]


def test_what_is_neither_full_kv_nor_a_method_is_an_error(folder: str) -> None:
    for name in ("specpass_nothing", "h2o", "kvpress_snapkv"):
        with pytest.raises(BenchmarkError, match=f"'{name}' is not a method of specpass. Known: specpass_"):
            speed_child.Engine(job(folder, name, budget=64))


def test_a_pruned_cache_is_measured_at_its_budget(folder: str) -> None:
    engine = speed_child.Engine(job(folder, "specpass_snapkv", budget=64, length=5000))
    cache = engine.filled_cache()
    assert int(cache.get_seq_length()) == 5000
    assert cache.layers[0].slots == 64 + 64
    assert len(engine.decode_seconds(cache, 4)) == 4
    assert int(cache.get_seq_length()) == 5005
    assert cache.layers[0].lengths.tolist() == [[64 + 5] * 2]


def test_steps_by_turns_are_of_both_methods(folder: str) -> None:
    ours = job(folder, "specpass_snapkv", budget=128, length=512)
    found = speed_child.by_turns({**ours, "other": {"method": "full_eager", "budget": None, "length": 128}})
    assert found["decode_ms"] > 0
    assert found["other_decode_ms"] > 0
    layer = 2 * 2 * 2 * 16 * 4  # keys and values, layers, KV heads, head size, float32
    assert 128 <= found["kv_bytes"] // layer <= 256  # slots, and room for new tokens
    assert 128 < found["other_kv_bytes"] // layer <= 256


def test_a_static_cache_is_filled(folder: str) -> None:
    cache = speed_child.Engine(job(folder, "full_static_compiled")).filled_cache()
    assert cache.get_seq_length() == 500
    assert all(float(layer.keys[:, :, 499].abs().sum()) > 0 for layer in cache.layers)


def test_a_child_process_writes_the_file(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    args = [
        "bench",
        "speed",
        "-t",
        folder,
        "-d",
        folder,
        "--dtype",
        "float32",
        "--lowering",
        "eager",
        "--quick",
        "--methods",
        "full_eager",
        "--lengths",
        "300",
        "--batches",
        "1",
        "--out",
        str(out),
    ]
    result = runner.invoke(cli.app, args)
    assert result.exit_code == 0, result.output
    document = read_results(out)
    (record,) = document["results"]
    assert record.keys() >= FIELDS
    assert record["method"] == "full_eager"
    assert record["decode_floor_ms"] > 0
    assert record["ttft_floor_s"] > 0
    assert document["machine"]["cores"] > 0
    assert document["versions"]["torch"]
    assert document["rates"]["bytes_per_s"] > 0
    assert runner.invoke(cli.app, args).exit_code == 0  # nothing left to do
    assert "| full_eager | - | 300 | 1 |" in out.with_suffix(".md").read_text()


def test_a_failed_measurement_says_why(folder: str, tmp_path: Path) -> None:
    run = Run(Pair(folder, folder, "float32"), Plan(("full_eager",), (64,), (1,)), tmp_path / "s.json", 9)
    with pytest.raises(BenchmarkError, match="measuring full_eager, S 64, batch 1 failed"):
        run.child(tmp_path, Config("full_eager", None, 64, 1, 1), what="nothing")


def test_a_peer_that_fails_is_left_out(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise PeerError("no room")

    monkeypatch.setattr(speed.peers, "speed", fail)
    monkeypatch.setattr(Run, "child", lambda *_, **__: {"bytes_per_s": 1.0, "flops_per_s": 1.0})
    run = Run(Pair(folder, folder, "float32"), Plan(("kvpress_snapkv",), (64,), (1,)), tmp_path / "s.json", 9)
    assert not run.run()
    assert read_results(tmp_path / "s.json")["left_out"] == {"kvpress_snapkv": "no room"}


def test_a_file_of_a_machine_of_another_pace_is_refused(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(Pair(folder, folder, "float32"), Plan(("full_eager",), (64,), (1,)), tmp_path / "s.json", 9)
    run.store.save(rates={"bytes_per_s": 2.0, "flops_per_s": 2.0})
    monkeypatch.setattr(Run, "child", lambda *_, **__: {"bytes_per_s": 2.0, "flops_per_s": 1.7})
    assert run.rates(tmp_path) == {"bytes_per_s": 2.0, "flops_per_s": 2.0}
    monkeypatch.setattr(Run, "child", lambda *_, **__: {"bytes_per_s": 2.0, "flops_per_s": 4.0})
    with pytest.raises(BenchmarkError, match=r"2\.00 times .* --restart"):
        run.run()


def test_equal_kv_is_measured_once(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    jobs = []

    def child(run: Run, caches: Path, config: Config | None = None, **changes: Any) -> dict[str, Any]:
        if changes["what"] == "by_turns":
            jobs.append((config, changes["other"]))
            return {"decode_ms": 2.0, "other_decode_ms": 3.0, "kv_bytes": 8, "other_kv_bytes": 8}
        return {
            "bytes_per_s": 1.0,
            "flops_per_s": 1.0,
            "compile_s": 1.0,
            "ttft_s": 1.0,
            "decode_ms": 1.0,
            "kv_bytes": 1,
            "decode_tokens_per_s": 1.0,
        }

    monkeypatch.setattr(Run, "child", child)
    plan = Plan(("specpass_snapkv", "full_static_compiled"), (1024,), (1, 4))
    for _ in range(2):
        assert Run(Pair(folder, folder, "float32"), plan, tmp_path / "s.json", 9).run()
    assert [(config.batch, config.budget, other["batch"], other["length"]) for config, other in jobs] == [
        (1, 1024, 1, 1024),
        (4, 1024, 4, 1024),
    ]
    found = read_results(tmp_path / "s.json")["aims"]
    assert [value for name, value in found.items() if "equal KV" in name] == [1.5, 1.5]


def test_the_plan_starts_with_what_matters() -> None:
    configs = Plan().configs()
    assert len({config.key for config in configs}) == len(configs)
    assert {config.batch for config in configs[:24]} == {1}
    assert {(c.length, c.batch) for c in configs[24:30]} == {(16384, 4)}
    keys = {config.key for config in configs}
    assert {
        (method, speed.METHODS[method], length, batch)
        for method in speed.METHODS
        for length in Plan().lengths
        for batch in (1, 4, 8)
    } <= keys
    assert ("specpass_snapkv", 1024, 4096, 4) in keys
    assert all(config.prefills == 0 for config in configs if config.batch > 1 or config.length > 8192)
    with pytest.raises(BenchmarkError, match="h2o"):
        Plan(methods=("h2o",))
    with pytest.raises(BenchmarkError, match="at least one"):
        Plan(lengths=())


def test_floors_count_the_flops_that_cost_counts(folder: str) -> None:
    pair = Pair(folder, folder)
    decoder = Decoder.of(read_config(folder))
    assert decoder is not None
    costs = cost.costs_of(cost_method(), decoder, decoder)
    assert costs is not None
    full = costs.numbers(600, 8)["prefill_flops"][0]
    ours = floors.prefill_flops(pair, "full_eager", None, 600, 1)
    assert ours is not None
    attention = 4 * 600 * 600 * decoder.layers * decoder.heads * decoder.head_dim
    assert ours == pytest.approx(full - attention / 2, rel=1e-3)  # cost counts attention in full
    assert floors.prefill_flops(pair, "specpass_specpc", 128, 600, 1) < 2 * ours
    assert floors.prefill_flops(pair, "specpass_speckv", 64, 600, 2) > 2 * 2 * ours
    model = speed_child.Engine(job(folder, "full_eager")).model
    matrices = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    embedding = model.get_input_embeddings().weight.numel()
    assert floors.target_weights(pair) == 4 * (matrices - embedding)


def cost_method() -> Any:
    import specpass

    return specpass.SpecKV(budget=64, window=8, lookahead=4)


def test_rates_and_shares_are_measured() -> None:
    assert rates.bandwidth("cpu", mebibytes=4) > 0
    assert rates.matmul_rate("cpu", "float32", 32, 32, 32) > 0
    matrix = torch.ones(400, 400)
    shares = profiles.shares(lambda: [matrix @ matrix for _ in range(20)])
    assert shares["seconds"] > 0
    assert shares["matrix products"] > shares["selection"]
    assert 0 <= shares["other"] <= 1


def test_fused_kernels_are_seen_by_the_profile() -> None:
    @torch.compile(dynamic=False)
    def fused(x: torch.Tensor) -> torch.Tensor:
        return ((x.sin() + 1).cos() * 2).tanh()

    x = torch.ones(1000, 1000)
    with torch._inductor.config.patch({"cpp.enable_kernel_profile": True}):
        fused(x)
    shares = profiles.shares(lambda: [fused(x) for _ in range(20)])
    assert shares["fused pointwise"] > 0.5 > shares["other"]


def record(method: str, budget: int | None, length: int, batch: int, rate: float, ttft: float | None) -> dict[str, Any]:
    return {
        "method": method,
        "budget": budget,
        "length": length,
        "batch": batch,
        "ttft_s": ttft,
        "ttft_floor_s": 0.5,
        "decode_ms": 1000 * batch / rate,
        "decode_tokens_per_s": rate,
        "decode_floor_ms": 1.0,
        "kv_bytes": 1 << 20,
        "peak_bytes": 1 << 30,
        "compile_cold_s": 3.0,
        "compile_warm_s": 1.0,
    }


RECORDS = [
    record("full_eager", None, 8192, 1, 2.0, 50.0),
    record("specpass_specpc", 1024, 8192, 1, 3.0, 20.0),
    record("full_static_compiled", None, 16384, 4, 2.0, None),
    record("specpass_speckv", 256, 16384, 4, 3.0, None),
]


def test_aims_are_ratios_of_one_run() -> None:
    equal = {"1": {"decode_ms": 4.0, "other_decode_ms": 5.0}}
    records = {tuple(r[name] for name in speed.KEY): r for r in RECORDS}
    assert list(aims(records, equal).values()) == [0.4, 1.5, 1.0, 1.25]
    assert list(aims({}, {}).values()) == [None] * 3


def test_tables_and_plots(tmp_path: Path) -> None:
    shares = {"seconds": 1.0, "matrix products": 0.6, "other": 0.4}
    document = {
        "settings": {"kind": "speed"},
        "results": RECORDS,
        "aims": {"an aim": 0.4, "none yet": None},
        "profiles": {"full_eager": {"length": 2048, "prefill": shares, "decode": shares}},
    }
    text = markdown(document)
    assert "| specpass_specpc | 1024 | 8192 | 1 | 20.00 (0.5) | 333.3 (1.0) | 3.00 | 1.0 | 1024 | 3 / 1 |" in text
    assert "| an aim | 0.40 |" in text
    assert "none yet" not in text
    assert "| full_eager | decode | 2048 | 1.00 | 0.60 | 0.40 |" in text
    file = tmp_path / "speed.json"
    file.write_text(json.dumps(document))
    result = runner.invoke(cli.app, ["bench", "plot", str(file)])
    assert result.exit_code == 0, result.output
    assert all((tmp_path / f"speed_{name}.png").read_bytes().startswith(b"\x89PNG") for name in ("decode", "ttft"))
