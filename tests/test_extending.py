"""The additions of docs/extending.md, written where the page says, and used as specpass uses its own.

A folder is laid out like the tree, and specpass looks into it as well: the page's files are what they would be there.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import onnx_ir as ir
import onnxruntime
import pytest
import torch
from announced import announce
from cli_models import save_model
from overlay import overlay
from pages import apply, example, titled
from support import compile_eager, kept, run
from tiny import prompt, tiny
from torch import Tensor, fx
from torch._dynamo.exc import BackendCompilerFailed
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from transformers import DynamicCache
from typer.testing import CliRunner

import specpass
import specpass.ops.flops
from bench.gpu_kernels import LARGE, SMALL, correctness, floors
from specpass.backend import compile as backend
from specpass.cli import entry
from specpass.dialect import OPERATORS
from specpass.export.flatten import Inliner, flatten
from specpass.export.program import Program
from specpass.export.translate import translate
from specpass.graph.edit import copy_module
from specpass.graph.walk import value
from specpass.kernels import cost
from specpass.kernels.aot import build
from specpass.kernels.archs import ARCHS
from specpass.kernels.dispatch import choose
from specpass.kernels.emit import emit
from specpass.kernels.registry import REGISTRY, register, unregister
from specpass.kernels.spec import Kernel
from specpass.kernels.tuner import Job
from specpass.lowering.choose import choose_sites
from specpass.methods import registry
from specpass.ops import IMPLEMENTATIONS
from specpass.rewrite import Request
from specpass.rewrite.stages import STAGES
from specpass.testing import eager

ROOT = Path(__file__).parents[1]
PAGE = "extending.md"
METHOD, OPERATOR, KERNEL = "A method: one file", "An operator: two files", "A kernel: one folder"
PASS, COMMAND = "A pass: two files", "A command: one file"
C, W = 24, 6
runner = CliRunner()


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The files of all sections; afterwards nothing knows of them but torch, which forgets no operator."""
    folder = tmp_path_factory.mktemp("tree")
    for section in (OPERATOR, KERNEL, PASS, COMMAND):
        for path, text in titled(PAGE, section).items():
            there = ROOT / path
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(apply(text, there.read_text()) if there.exists() else text)
    (folder / "specpass/kernels/weigh/__init__.py").touch()
    points = tomllib.loads(example(PAGE, METHOD, "toml"))["project"]["entry-points"]["specpass.methods"]
    (source,) = titled(PAGE, METHOD).values()
    with overlay(folder) as patch:
        announce(folder, patch, "own_method", source, [f"{name} = {target}" for name, target in points.items()])
        yield folder


@pytest.fixture(scope="module")
def operator(tree: Path) -> Iterator[Any]:
    """The declared and bound operator."""
    declared = importlib.import_module("specpass.dialect.weigh").WeighScores
    importlib.import_module("specpass.ops.weigh")
    specpass.ops.flops.register()
    yield declared
    del OPERATORS[declared.name], IMPLEMENTATIONS[declared.name], flop_registry[declared.packet]


@pytest.fixture(scope="module")
def kernel(tree: Path, operator: Any) -> Iterator[Kernel]:
    (found,) = importlib.import_module("specpass.kernels.weigh.spec").KERNELS
    register(found)
    yield found
    unregister(found)


@pytest.fixture(scope="module")
def pipeline(tree: Path, operator: Any) -> ModuleType:
    """The order with the pass in it."""
    spec = importlib.util.spec_from_file_location("own_pipeline", tree / "specpass/passes/pipeline.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("section", "files"),
    [
        (METHOD, ["own_method.py"]),
        (OPERATOR, ["specpass/dialect/weigh.py", "specpass/ops/weigh.py"]),
        (KERNEL, [f"specpass/kernels/weigh/{name}.py" for name in ("jit", "reference", "spec")]),
        (PASS, ["specpass/passes/weigh_values.py", "specpass/passes/pipeline.py"]),
        (COMMAND, ["specpass/cli/sizes.py"]),
    ],
)
def test_what_an_addition_takes(section: str, files: list[str]) -> None:
    assert list(titled(PAGE, section)) == files
    edited = [path for path in files if (ROOT / path).exists()]
    assert edited == (["specpass/passes/pipeline.py"] if section == PASS else [])


def test_a_method_has_a_name_and_generates(tree: Path) -> None:
    torch._dynamo.reset()
    method = registry.make_method("keynorm", C, [f"window={W}"])
    ours = run(compile_eager(tiny(), method), prompt(60), 3)
    assert [len(tokens) for tokens in ours.tokens] == [3]
    assert all(positions.shape[1] == C for positions in kept(ours.cache))


def operands(device: str = "cpu", columns: int = 40, dim: int = 16) -> dict[str, Tensor]:
    """As torch's own generator has them: scores [2, 2, T], value [2, 2, T, Dv]."""
    scores, values = torch.rand(2, 2, columns, device=device), torch.randn(2, 2, columns, dim, device=device)
    return {"scores": scores, "value": values}


def traced(operator: Any) -> fx.GraphModule:
    """A graph of one call, sizes as symbols."""
    call = operator.packet.default
    return make_fx(lambda scores, value: call(scores, value), tracing_mode="symbolic")(*operands().values())


def test_an_operators_call_is_seen_by_name_and_runs(operator: Any) -> None:
    gm, given = traced(operator), operands(columns=50)
    (view,) = operator.find(gm.graph)
    assert [view.scores, view.value] == gm.graph.find_nodes(op="placeholder")
    assert value(view.node).shape == value(view.scores).shape
    weighed = given["scores"] * given["value"].norm(p=1, dim=-1)
    torch.testing.assert_close(gm(*given.values()), weighed)
    torch.library.opcheck(operator.packet.default, tuple(given.values()), test_utils=("test_schema", "test_faketensor"))
    allowed = {name: stage.may_hold(operator, left=True) for name, stage in STAGES.items()}
    assert allowed == {"TRACED": False, "DRAFTED": False, "PRUNED": True, "LOWERED": True}


def test_an_operator_counts_flops(operator: Any) -> None:
    with FlopCounterMode(display=False) as counter:
        operator.packet(*operands(columns=50).values())
    assert counter.get_total_flops() == 2 * (2 * 2 * 50 * 16)


def test_an_operator_becomes_onnx(operator: Any) -> None:
    gm, given = traced(operator), operands(columns=50)
    inputs = [node.meta["val"] for node in gm.graph.find_nodes(op="placeholder")]
    flat = flatten(gm, lambda *args: (Inliner(gm).run(*args),), inputs, "prefill")
    assert not operator.find(flat.graph)
    model = translate(Program(flat, tuple(given), ("weighed",), {}), "weigh")
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    (weighed,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    torch.testing.assert_close(torch.from_numpy(weighed), operator.packet(*given.values()))


@pytest.mark.usefixtures("triton_counts_as_installed")
def test_the_table_chooses_a_kernel(kernel: Kernel) -> None:
    with FakeTensorMode():
        served, odd = operands("cuda"), operands("cuda", dim=12)
        turned = served | {"scores": torch.rand(2, 40, 2, device="cuda").mT}
        assert choose("weigh_scores", served).kernel == "weigh"
    assert choose("weigh_scores", odd).reason == "head dimension 12: at most 256 and a multiple of 8"
    assert choose("weigh_scores", turned).reason == "scores that are not contiguous"
    given = operands()
    assert choose("weigh_scores", given).reason == "cpu tensors"
    assert torch.equal(kernel.reference(**given), torch.ops.specpass.weigh_scores(**given))


def test_a_kernel_is_tuned_compiled_and_emitted(kernel: Kernel) -> None:
    pytest.importorskip("triton")
    for arch in (ARCHS["sm_90"], ARCHS["gfx942"]):
        job = Job(kernel, kernel.shapes_of(operands("meta", columns=4000, dim=128)), arch)
        tiles = cost.shortlist(kernel, job.shapes, arch, 4)
        assert len(tiles) == 4
        assert kernel.default_tile(job.shapes, arch) in tiles
        assert [built.spills for built in build(kernel, job.shapes, tiles[0], arch)] == [0]
    text = emit(kernel, LARGE, tiles[0])
    assert "def weigh_columns(scores, value, weighed, T, value_b, value_k, value_t):" in text
    assert "DV = tl.constexpr(128)" in text


def test_a_kernel_is_right_in_the_interpreter(kernel: Kernel, tree: Path) -> None:
    """In a process of its own, as tests/kernels/interpreted.py: Triton decides when it is imported."""
    pytest.importorskip("triton")
    code = f"""
import dataclasses, importlib, specpass.kernels
from bench.gpu_kernels import SMALL
from specpass.kernels.tiles import Tile
specpass.kernels.__path__ = [*specpass.kernels.__path__, {str(tree / "specpass/kernels")!r}]
kernel = importlib.import_module("specpass.kernels.weigh.spec").KERNELS[0]
for shapes in (SMALL, dataclasses.replace(SMALL, dtype="bfloat16", value_dim=80, columns=75)):
    operands = kernel.make(shapes, "cpu", seed=1)
    print(kernel.error(operands, kernel.launch(operands, Tile(32)), shapes))
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    errors = [float(line) for line in done.stdout.split()]
    assert len(errors) == 2
    assert max(errors) <= 1


def test_the_bench_checks_and_times_a_kernel(kernel: Kernel) -> None:
    found: dict[str, Any] = {}

    def step(section: str, name: str, call: Any) -> Any:
        wanted = section == "rates" or name.split(",")[0] == "weigh"
        return found.setdefault(section, call()) if wanted else {}

    bench: Any = SimpleNamespace(tiny=True, device="cpu", step=step)
    correctness(bench)
    floors(bench)
    assert found["correctness"]["error_share"] <= 1
    assert found["floors"]["floor_us"] > 0
    assert REGISTRY["weigh"].make(SMALL, "cpu", 0).keys() == operands().keys()


def prune(passes: Any, method: Any, ids: Tensor, **options: Any) -> tuple[list[Tensor], dict[str, fx.GraphModule]]:
    """Kept positions [K, C] of each layer, and the graph behind each of the passes."""
    torch._dynamo.reset()
    after: dict[str, fx.GraphModule] = {}

    def keep(request: Request, name: str, gm: fx.GraphModule) -> None:
        if request.kind == "prefill":
            after[name] = copy_module(gm)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "PASSES", passes)
        patch.setattr(backend, "fingerprint", lambda skip: "own")
        model = compile_eager(tiny(), method, full_verify=True, observe=keep, **options)
        return kept(run(model, ids, 2).cache), after


SNAP = specpass.SnapKV(budget=C, window=W, kernel=1)  # unpooled, so that a score is one column's


def test_a_pass_rewrites_the_prefill(pipeline: ModuleType, operator: Any, kernel: Kernel) -> None:
    ids = prompt(60, seed=7)
    positions, after = prune(pipeline.PASSES, SNAP, ids)
    names = list(after)
    assert names[names.index("score_importance") :][:3] == ["score_importance", "weigh_values", "gather_prune"]
    assert not operator.find(after["score_importance"].graph)
    assert len(operator.find(after["weigh_values"].graph)) == 2
    choices = [(where, str(choice)) for where, choice in choose_sites(after["gather_prune"]) if "weigh" in str(choice)]
    assert choices == [(f"model.layers.{n}.self_attn", "weigh_scores: aten (cpu tensors)") for n in range(2)]
    for weighed, own in zip(weighed_scores(ids), positions, strict=True):
        assert eager.score_margin(weighed, own, W) >= -1e-6
    skipped, _ = prune(pipeline.PASSES, SNAP, ids, skip_passes=["weigh_values"])
    assert any(not torch.equal(ours, theirs) for ours, theirs in zip(positions, skipped, strict=True))


def weighed_scores(ids: Tensor) -> list[Tensor]:
    """Eager: SnapKV's scores [K, S - W] of each layer, times the L1 norms of its values."""
    cache, twin = DynamicCache(), tiny()
    plain = eager.select(twin, ids, C, None, eager.Scoring(W, kernel=1, reduce="mean", pool="avg"))
    with torch.no_grad():
        twin(input_ids=ids, past_key_values=cache)
    norms = [layer.values[0].norm(p=1, dim=-1)[:, :-W] for layer in cache.layers]
    return [scores * norm for scores, norm in zip(plain.scores, norms, strict=True)]


def test_a_pass_leaves_alone_what_has_no_scores(pipeline: ModuleType) -> None:
    _, after = prune(pipeline.PASSES, specpass.StreamingLLM(budget=C), prompt(60))
    assert "gather_prune" in after
    assert "weigh_values" not in after


def test_a_pass_in_the_wrong_place_is_an_error(pipeline: ModuleType) -> None:
    (own,) = (item for item in pipeline.PASSES if item.name == "weigh_values")
    index = [item.name for item in pipeline.PASSES].index("score_importance")
    others = [item for item in pipeline.PASSES if item is not own]
    wrong = (*others[:index], own, *others[index:])
    with pytest.raises(BackendCompilerFailed, match="StageError: weigh_values needs Scores, which no pass before it"):
        prune(wrong, SNAP, prompt(60))


def test_a_command_is_there(tree: Path, tmp_path: Path) -> None:
    result = runner.invoke(entry.build(), ["sizes", "-t", str(save_model(tmp_path / "model"))])
    assert result.stdout == "2 layers, 2 KV heads of 16\n"
