"""`specpass bench quality`, `verify` and `plot` on tiny models; the peers' side of the pipe."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from announced import SNAP, announce
from cli_models import save_model
from matplotlib.image import imread
from typer.testing import CliRunner

import specpass
from specpass import cli, hub
from specpass.benchmarks import methods, pace
from specpass.benchmarks.models import Pair, load_tokenizer, told
from specpass.benchmarks.peers import run as peers
from specpass.benchmarks.quality import run as quality
from specpass.benchmarks.quality import summary, variants
from specpass.benchmarks.quality.run import Grid, Run
from specpass.benchmarks.quality.variants import Variant
from specpass.benchmarks.results import read_results
from specpass.benchmarks.speed.child import Engine
from specpass.benchmarks.speed.run import Config, Plan
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.cli import bench as cli_bench
from specpass.errors import BenchmarkError, BudgetError, PeerError
from specpass.files import cache_dir

runner = CliRunner()
TASK, METHODS = "niah_multikey_2", ("full", "draft", "specpass_snapkv", "specpass_oracle")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_model(tmp_path_factory.mktemp("models") / "tiny"))


def pair(folder: str) -> Pair:
    return Pair(folder, folder, "float32", lowering="eager")


@pytest.fixture(scope="module")
def file(folder: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete result file of a small grid at the budget 64."""
    out = tmp_path_factory.mktemp("results") / "quality.json"
    grid = Grid(METHODS, (TASK,), (320,), seeds=2, rounds=(1,))
    assert Run(pair(folder), grid, out, minutes=9).run()
    return out


def verify(file: Path, folder: str) -> Any:
    return runner.invoke(cli.app, ["bench", "verify", str(file), "-t", folder])


def test_every_cell_of_the_grid_has_a_record(file: Path) -> None:
    document = read_results(file)
    assert document["versions"]["torch"]
    assert document["machine"]["cores"] > 0
    assert document["settings"]["target"] == "tiny"  # no path of this machine
    found = {(r["method"], r["budget"], r["seed"]) for r in document["results"]}
    budgets = {"full": None, "draft": None, "specpass_snapkv": 64, "specpass_oracle": 64}
    assert found == {(method, budgets[method], seed) for method in METHODS for seed in (0, 1)}
    for record in document["results"]:
        assert {"seed", "answer", "score", "digest", "expected", "prompt_tokens"} <= record.keys()
        assert 0 < record["prompt_tokens"] <= 320
        assert 0 < len(record["tokens"]) <= 16
    assert any("first answer token" in note for note in document["notes"])
    assert {entry["method"]: entry["prompts"] for entry in document["summary"]} == dict.fromkeys(METHODS, 2)


def test_full_kv_and_a_draft_that_is_the_target_answer_alike(file: Path) -> None:
    tokens = {(r["method"], r["seed"]): r["tokens"] for r in read_results(file)["results"]}
    for seed in (0, 1):
        assert tokens["full", seed] == tokens["draft", seed]
        assert tokens["full", seed][0] == tokens["specpass_snapkv", seed][0]  # the first one comes from the prefill


def test_a_rerun_computes_nothing_and_a_wider_grid_goes_on(
    file: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "copy.json"
    copy.write_text(file.read_text())
    with monkeypatch.context() as patch:
        patch.setattr(quality, "answers", lambda *_: pytest.fail("computed again"))
        assert Run(pair(folder), Grid(METHODS, (TASK,), (320,), 2, (1,)), copy, minutes=9).run()
    assert Run(pair(folder), Grid(("full",), (TASK,), (320,), 3), copy, minutes=9).run()
    assert len(read_results(copy)["results"]) == len(read_results(file)["results"]) + 1


def test_it_stops_at_its_limit_and_says_so(folder: str, tmp_path: Path) -> None:
    out = tmp_path / "late.json"
    args = [
        "bench",
        "quality",
        "-t",
        folder,
        "-d",
        folder,
        "--dtype",
        "float32",
        "--lowering",
        "eager",
        "--tasks",
        TASK,
        "--methods",
        "full",
        "--lengths",
        "300",
        "--seeds",
        "1",
        "--out",
        str(out),
    ]
    result = runner.invoke(cli.app, [*args, "--minutes", "0"])
    assert result.exit_code == 0, result.output
    assert "not complete" in result.stdout
    result = runner.invoke(cli.app, args)
    assert result.exit_code == 0, result.output
    assert "not complete" not in result.stdout
    assert "| full | - | 300 | 1 |" in out.with_suffix(".md").read_text()
    assert verify(out, folder).exit_code == 0


def test_a_file_that_was_cut_off_verifies(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "cut.json"

    def cut(*_: Any) -> None:
        raise KeyboardInterrupt

    run = Run(pair(folder), Grid(("full",), (TASK,), (320,), 2), out, minutes=9)
    with monkeypatch.context() as patch:
        patch.setattr(pace.Pace, "step", cut)
        with pytest.raises(KeyboardInterrupt):
            run.run()
    result = verify(out, folder)
    assert result.exit_code == 0, result.output
    assert "1 answer" in result.stdout


def test_verify_finds_the_file_right(file: Path, folder: str) -> None:
    result = verify(file, folder)
    assert result.exit_code == 0, result.output
    assert "8 answers verified" in result.stdout


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("score", 1.0, "the score is 1.0"),
        ("answer", "w1 w2", "the answer is not"),
        ("seed", 7, "the prompt is not"),
        ("digest", "0" * 16, "the prompt is not"),
        ("expected", ["1234567"], "the prompt is not"),
    ],
)
def test_verify_finds_a_changed_record(
    field: str, value: Any, says: str, file: Path, folder: str, tmp_path: Path
) -> None:
    document = json.loads(file.read_text())
    document["results"][3][field] = value
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document))
    result = verify(changed, folder)
    assert result.exit_code == 1
    assert says in result.stderr


def test_verify_finds_a_changed_summary(file: Path, folder: str, tmp_path: Path) -> None:
    document = json.loads(file.read_text())
    document["summary"][0]["score"] = 0.9
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(document))
    result = verify(changed, folder)
    assert result.exit_code == 1
    assert "summary" in result.stderr


def test_other_settings_are_not_mixed_into_a_file(file: Path, folder: str) -> None:
    with pytest.raises(BenchmarkError, match="--restart"):
        Run(Pair(folder, folder, "bfloat16", lowering="eager"), Grid(), file, minutes=1)


def test_other_machines_and_versions_are_not_mixed_into_a_file(file: Path, folder: str, tmp_path: Path) -> None:
    for part, name in (("machine", "cpu"), ("versions", "torch")):
        document = json.loads(file.read_text())
        document[part][name] = "of long ago"
        other = tmp_path / "other.json"
        other.write_text(json.dumps(document))
        with pytest.raises(BenchmarkError, match=f"{name} of long ago.*--restart"):
            Run(pair(folder), Grid(), other, minutes=1)


def test_verify_takes_a_revision_of_the_target(
    file: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document = json.loads(file.read_text())
    document["settings"]["target"] = "org/model"
    other = tmp_path / "other.json"
    other.write_text(json.dumps(document))
    asked = []
    monkeypatch.setattr("specpass.benchmarks.quality.verify.load_tokenizer", lambda name: asked.append(name) or made)
    made = load_tokenizer(folder)
    for named in ([], ["-t", "org/model"]):
        done = runner.invoke(cli.app, ["bench", "verify", str(other), "--revision", "v1", *named])
        assert done.exit_code == 0, done.output
    assert asked == ["org/model@v1"] * 2


def test_verify_and_plot_find_the_default_files(
    file: Path, folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = tmp_path / cli_bench.RESULTS
    results.mkdir(parents=True)
    (results / "quality_quick.json").write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    done = runner.invoke(cli.app, ["bench", "verify", "--quick", "-t", folder])
    assert "8 answers verified" in done.stdout
    assert "100 % niah_multikey_2 320 seed 1" in done.stderr
    done = runner.invoke(cli.app, ["bench", "plot", "--quick"])
    assert done.exit_code == 0, done.output
    assert (results / "quality_quick_accuracy.png").exists()
    assert not (results / "speed_quick_decode.png").exists()
    done = runner.invoke(cli.app, ["bench", "verify"])
    assert done.exit_code == 1
    assert "quality.json" in done.stderr


# -- what the figures mean


def records(method: str, budget: int | None, scores: list[float]) -> list[dict[str, Any]]:
    return [
        {"method": method, "budget": budget, "task": "vt", "length": 2048, "seed": seed, "score": score}
        for seed, score in enumerate(scores)
    ]


def test_summary_is_means_and_paired_intervals() -> None:
    full, half = records("full", None, [1.0, 0.5, 1.0, 0.5]), records("specpass_snapkv", 64, [0.5, 0.25, 0.5, 0.25])
    first, second = summary.summarise(full + half)
    assert (first["score"], second["score"], second["retention"]) == (0.75, 0.375, 0.5)
    assert second["retention_interval"] == [0.5, 0.5]  # half on each prompt: no chance in the ratio
    assert first["score_interval"][0] < 0.75 < first["score_interval"][1]
    assert summary.summarise(full + half) == [first, second]
    assert "| specpass_snapkv | 64 | 2048 | 4 |" in summary.markdown([first, second])
    alone = summary.summarise(half)[0]
    assert alone["retention"] is None


def test_plots_are_pictures(file: Path, tmp_path: Path) -> None:
    scored = records("full", None, [1.0, 0.5]) + records("specpass_snapkv", 64, [0.5, 0.5])
    scored += records("specpass_snapkv", 256, [1.0, 0.5]) + records("kvpress_snapkv", 64, [0.0, 0.5])
    document = json.loads(file.read_text()) | {"results": scored, "summary": summary.summarise(scored)}
    given = tmp_path / "scores.json"
    given.write_text(json.dumps(document))
    result = runner.invoke(cli.app, ["bench", "plot", str(given), str(file), "--out", str(tmp_path / "pictures")])
    assert result.exit_code == 0, result.output
    made = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    assert made == ["quality_accuracy.png", "quality_retention.png", "scores_accuracy.png", "scores_retention.png"]
    picture = imread(tmp_path / "pictures" / "scores_retention.png")
    blue = (picture[..., 2] > 0.6) & (picture[..., 0] < 0.5)
    orange = (picture[..., 0] > 0.9) & (picture[..., 2] < 0.5)
    assert blue.sum() > orange.sum() > 1000  # bars of ours (0.67, 1.0) and of the peer (0.33)


def test_the_grid_is_in_the_order_of_importance() -> None:
    first, *rest = (stage for stage in Grid(lengths=(100, 200)).stages() if stage)
    assert {cell.length for cell in first} == {100}
    assert {cell.seed for cell in first} == set(range(8))
    assert [cell.variant.budget for cell in first if cell.variant.method == "specpass_speckv"] == [256] * 32 + [64] * 32
    assert {cell.length for cell in rest[0] + rest[1]} == {200}
    assert ({cell.seed for cell in rest[0]}, {cell.seed for cell in rest[1]}) == ({0, 1}, {2, 3, 4, 5, 6, 7})
    assert {cell.variant.budget for cell in rest[0] if cell.variant.method == "specpass_speckv"} == {256}
    assert {cell.task for cell in rest[2]}.isdisjoint(cell.task for cell in first)
    keys = [cell.key for stage in (first, *rest) for cell in stage]
    assert len(keys) == len(set(keys))


def test_budgets_of_ones_own_are_those_of_every_method_and_length() -> None:
    ours = ("specpass_speckv", "specpass_specpc", "kvpress_snapkv")
    grid = Grid(("full", *ours), (TASK,), (100, 200), 1, budgets=(96, 0.5))
    found = {(cell.variant.method, cell.variant.budget, cell.length) for stage in grid.stages() for cell in stage}
    assert found == {(method, budget, length) for method in ours for budget in (96, 0.5) for length in (100, 200)} | {
        ("full", None, 100),
        ("full", None, 200),
    }
    assert all(cell.variant.work(2048, 40, 0.3) > 0 for stage in grid.stages() for cell in stage)


@pytest.mark.parametrize(
    "wrong",
    [
        {"methods": ("h2o",)},
        {"tasks": ("riddles",)},
        {"lengths": ()},
        {"seeds": 0},
        {"budgets": (8,)},  # no larger than the window
        {"budgets": (1.5,)},
        {"methods": ("kvpress_snapkv",), "budgets": (1.5,)},
        {"methods": ("kvpress_snapkv",), "budgets": (0,)},
    ],
)
def test_a_grid_that_cannot_be_run_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises((BenchmarkError, BudgetError)):
        Grid(**wrong)


def test_budgets_are_read_from_the_command_line(folder: str, tmp_path: Path) -> None:
    args = ["bench", "quality", "-t", folder, "-d", folder, "--dtype", "float32", "--lowering", "eager"]
    args += ["--methods", "full,specpass_snapkv", "--tasks", TASK, "--lengths", "300", "--seeds", "1"]
    args += ["--out", str(tmp_path / "own.json")]
    result = runner.invoke(cli.app, [*args, "--budgets", "0.5"])
    assert result.exit_code == 0, result.output
    assert "| specpass_snapkv | 0.5 | 300 | 1 |" in result.stdout
    for wrong, word in (("half", "256,0.1"), ("0.5,8", "window")):
        result = runner.invoke(cli.app, [*args, "--budgets", wrong])
        assert result.exit_code
        assert word in result.output


def test_the_oracle_is_told_the_answer_and_its_end() -> None:
    assert told([5, 6], eos=9, pad=0) == [[5, 6, 9, *[0] * 29]]
    assert told([5, 9], eos=[9, 8], pad=0) == [[5, 9, *[0] * 30]]
    assert told(list(range(40)), eos=9, pad=0) == [list(range(32))]


def test_every_variant_is_a_method() -> None:
    for variant in variants.variants(variants.GRID, (0, 1)):
        if variant.method.startswith("specpass_"):
            assert variant.specpass_method().budget == variant.budget
        assert variant.work(2048, 40, 0.3) > 0


def test_a_variant_that_is_no_method_is_an_error_and_not_speckv() -> None:
    for name in ("specpass_nothing", "h2o", "full"):
        with pytest.raises(
            BenchmarkError, match=f"'{name}' is not a method.*specpass_pyramidkv.*specpass_streamingllm"
        ):
            Variant(name, 64).specpass_method()
    with pytest.raises(BenchmarkError, match=r"'specpass_nothing' is not .* Known: full, draft, specpass_speckv, "):
        variants.variants(["specpass_nothing"], (0,))


def test_variants_are_the_methods_that_they_were() -> None:
    made = {name: Variant(name, 256).specpass_method() for name in variants.known() if name.startswith("specpass_")}
    assert made == {
        "specpass_speckv": specpass.SpecKV(256, window=32, lookahead=32),
        "specpass_oracle": specpass.SpecKV(256, window=32, lookahead=32),
        "specpass_snapkv": specpass.SnapKV(256, window=32),
        "specpass_pyramidkv": specpass.PyramidKV(256, window=32),
        "specpass_streamingllm": specpass.StreamingLLM(256),
        "specpass_specpc": specpass.SpecPC(256),
        "specpass_speckvpc": specpass.SpecKVPC(256, window=32, lookahead=32, prompt_budget=1024),
    }
    assert variants.known() == tuple(variants.GRID)
    # target, draft and decode in tokens that the target reads: 2048 of them, 40 new ones, a draft of a third
    reads, draft, decode = 2048, 0.3 * (2048 + 30 * 16), 30 * 20
    for name, work in {
        "full": reads + decode,
        "draft": draft + 0.3 * decode,
        "specpass_snapkv": reads + decode,
        "specpass_oracle": reads + decode,
        "specpass_speckv": reads + decode + draft,
        "specpass_specpc": 256 + decode + draft,
        "specpass_speckvpc": 1024 + decode + draft,
        "kvpress_snapkv": reads + decode,
        "kvpress_kvzip": 3 * reads + decode,
    }.items():
        assert Variant(name, 256).work(2048, 40, 0.3) == pytest.approx(work), name


def test_what_measured_best_is_a_variant_if_asked_for() -> None:
    assert tuple(variants.PRESETS) == methods.presets()
    found = variants.variants(["specpass_bestpc", "specpass_best"], (0, 1))
    assert [(v.method, v.budget) for v in found] == [
        ("specpass_best", 256),
        ("specpass_bestpc", 1024),
        ("specpass_best", 64),
        ("specpass_bestpc", 512),
    ]
    assert found[0].specpass_method() == specpass.SpecKV.best(256, lookahead=32)
    assert Plan(methods=methods.presets()).methods == methods.presets()


def test_a_method_of_ones_own_is_a_variant(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, "bench_method", SNAP, ["toy = bench_method:Toy"])
    assert variants.known() == (*variants.GRID, "specpass_toy")
    assert "specpass_toy" in Plan(methods=("specpass_toy",)).methods
    assert [(v.method, v.budget) for v in variants.variants(["specpass_toy", "full"], (0, 1))] == [
        ("full", None),
        ("specpass_toy", 256),
        ("specpass_toy", 64),
    ]
    out = tmp_path / "quality.json"
    assert Run(pair(folder), Grid(("specpass_toy",), (TASK,), (320,), 1, (1,)), out, minutes=9).run()
    (record,) = read_results(out)["results"]
    assert (record["method"], record["budget"]) == ("specpass_toy", 64)
    config = Config("specpass_toy", 64, 500, 1, 1)
    engine = Engine({**config._asdict(), **pair_settings(folder), "steps": 2})
    assert engine.method is not None
    assert engine.method.key.startswith("bench_method.Toy(budget=64, ")


def pair_settings(folder: str) -> dict[str, str]:
    return {"target": folder, "draft": folder, "dtype": "float32", "device": "cpu", "lowering": "eager"}


def test_pace_tells_what_is_left(capsys: pytest.CaptureFixture[str]) -> None:
    steps = pace.Pace(total=4, minutes=1)
    assert steps.left() is None
    steps.start -= 20
    steps.step(1, "one")
    assert steps.left() == pytest.approx(60, abs=1)
    assert not steps.over
    assert " 25 % one (20 s passed, about 60 s left, stops in 40 s)" in capsys.readouterr().err
    steps.start -= 41
    assert steps.over
    assert pace.duration(6000) == "1 h 40 min"


# -- peers

WORKER = """
import json, sys
job = json.load(open(sys.argv[1]))
print("a line that a library wrote")
for number, prompt in enumerate(job["prompts"]):
    for press, _ in enumerate(prompt["presses"]):
        if number == 1:
            sys.exit("no more memory")
        print(json.dumps({"prompt": number, "press": press, "tokens": prompt["ids"][:2], "seconds": 0.5, "kept": 64.0}))
"""


def test_peers_answer_line_by_line_and_a_failure_leaves_them_out(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    worker = tmp_path / "worker.py"
    worker.write_text(WORKER)
    monkeypatch.setattr(peers, "WORKER", worker)
    monkeypatch.setattr(peers, "python", lambda: Path(sys.executable))
    chosen = [Variant("kvpress_snapkv", 64), Variant("kvpress_adakv_snapkv", 64)]
    work = [(Prompt(TASK, seed, 300, "", (4, 5, 6), ("x",)), 8, chosen) for seed in (0, 1)]
    answers = peers.answers(pair(folder), work)
    assert [(found.variant, found.tokens, found.kept) for found in (next(answers), next(answers))] == [
        (variant, [4, 5], 64.0) for variant in chosen
    ]
    with pytest.raises(PeerError, match="no more memory"):
        next(answers)

    out = tmp_path / "peers.json"
    grid = Grid(("kvpress_snapkv",), (TASK,), (300,), seeds=2, rounds=(1,))
    assert not Run(pair(folder), grid, out, minutes=9).run()
    document = read_results(out)
    assert [record["seed"] for record in document["results"]] == [0]
    assert "no more memory" in document["left_out"]["kvpress_snapkv 64"]


def test_pip_that_finds_nothing_is_a_peer_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pins = tmp_path / "peers.txt"
    pins.write_text("torch==0.0.0\n")
    monkeypatch.setattr(peers, "PINS", pins)
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(PeerError, match="--methods"):
        peers.python()
    assert not list((tmp_path / "cache" / "peers").glob(f"*/{peers.STAMP}"))


TOGETHER = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import worker
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[2], dtype=torch.float32).eval()
ids = torch.randint(3, 9000, (1, 300), generator=torch.Generator().manual_seed(0))
names = sys.argv[3:]
with torch.no_grad():
    presses = [worker.make_press(name, 64, 300) for name in names]
    first, found = worker.prefill_together(model, ids, presses)
    for name, (cache, masks) in zip(names, found):
        alone, other, other_masks = worker.prefill(model, ids, worker.make_press(name, 64, 300))
        assert first == alone
        assert worker.kept_slots(cache, masks) == worker.kept_slots(other, other_masks) == 64.0, name
        assert all(torch.equal(a.keys, b.keys) for a, b in zip(cache.layers, other.layers)), name
        tokens = worker.decode(model, cache, masks, first, 300, 6)
        assert tokens == worker.decode(model, other, other_masks, alone, 300, 6), name
    first, found = worker.prefill_kvzip(model, ids, [64, 32])
    for budget, (cache, masks) in zip((64, 32), found):
        alone, other, other_masks = worker.prefill(model, ids, worker.make_press("kvpress_kvzip", budget, 300))
        assert abs(worker.kept_slots(cache, masks) - budget) < 0.1
        tokens = worker.decode(model, cache, masks, first, 300, 6)
        assert tokens == worker.decode(model, other, other_masks, alone, 300, 6), budget
    plain = model.generate(ids, max_new_tokens=6, do_sample=False)[0, 300:].tolist()
    presses = [worker.make_press("kvpress_snapkv", 280, 280)]  # keeps all that it sees; 20 ids come behind
    first, ((cache, masks),) = worker.prefill_together(model, ids[:, :280], presses)
    assert worker.decode(model, cache, masks, first, 300, 6, ids[0, 280:].tolist()) == plain
print("as kvpress runs it")
"""


@pytest.mark.real
def test_presses_that_share_a_prefill_are_kvpress_alone() -> None:
    if not list((cache_dir() / "peers").glob(f"*/{peers.STAMP}")):
        pytest.skip("the peers are not installed (1.4 GB); `specpass bench quality` does it")
    model = str(hub.model_path("smollm2-135m"))
    command = [str(peers.python()), "-P", "-c", TOGETHER, str(peers.HERE), model, *peers.SHARING]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "as kvpress runs it" in done.stdout
