"""A kernel is one folder: what stands there, or is registered, is known to the table, the tuner and the bench."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import specpass.ops  # noqa: F401  (binds the operators)
from bench.gpu_kernels import SMALL, correctness, floors
from specpass.dialect.define import OPERATORS
from specpass.kernels import cost
from specpass.kernels.archs import ARCHS
from specpass.kernels.dispatch import choose
from specpass.kernels.registry import REGISTRY, kernels_of, register, unregister
from specpass.kernels.spec import FOLDER, Kernel
from specpass.kernels.tuner import Job

TOY = """
import torch
from sympy import Integer

from specpass.kernels.cost import Cost
from specpass.kernels.launch import Launch
from specpass.kernels.shapes import Shapes, constant, dtype_of
from specpass.kernels.spec import Kernel
from specpass.kernels.tiles import Tile


def take_rows(query, rows):
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


class TakeRows(Kernel):
    name = "toy"
    operator = "take_rows"
    reference = staticmethod(take_rows)
    cost = Cost(*[Integer(1)] * 7)

    def shapes_of(self, operands):
        query = operands["query"]
        return Shapes(dtype_of(query), constant(query.shape[0]), query.shape[1], 1, query.shape[3], query.shape[3])

    def refuse(self, shapes):
        return super().refuse(shapes) or ("one head is too few" if shapes.kv_heads == 1 else None)

    def table(self, shapes, arch):
        return Tile(16)

    def choices(self, shapes, arch):
        return (Tile(32), Tile(64))

    def plan(self, shapes, tile):
        return (Launch("copy", {}, {"BLOCK": tile.block_n}, tile.warps, tile.stages),)

    def run(self, operands, shapes, tile, plan):
        return plan[0].constants["BLOCK"], take_rows(**operands)

    def make(self, shapes, device, seed):
        query = torch.randn(shapes.batch, shapes.kv_heads, 9, shapes.dim, device=device)
        return {"query": query, "rows": torch.zeros(shapes.batch, 4, dtype=torch.int64, device=device)}

    def error(self, operands, found, shapes):
        return float((found - operands["query"][:, :, :1]).abs().max())


KERNELS = (TakeRows(),)
"""


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernel]:
    """A kernel of an operator that has none, in a package of somebody else's."""
    package = tmp_path / "toy_kernel"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "spec.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    kernel = importlib.import_module("toy_kernel.spec").KERNELS[0]
    register(kernel)
    yield kernel
    unregister(kernel)
    for name in ("toy_kernel", "toy_kernel.spec"):
        sys.modules.pop(name, None)


def operands(device: str, heads: int = 2, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    rows = torch.zeros(1, 3, dtype=torch.int64, device=device)
    return {"query": torch.ones(1, heads, 9, 16, device=device, dtype=dtype), "rows": rows}


@pytest.mark.usefixtures("triton_counts_as_installed")
def test_the_table_asks_a_registered_kernel(toy: Kernel) -> None:
    with FakeTensorMode():
        few, odd = operands("cuda", heads=1), operands("cuda", dtype=torch.float64)
        assert choose("take_rows", operands("cuda")).kernel == "toy"
    assert choose("take_rows", few).reason == "one head is too few"
    assert choose("take_rows", odd).reason == "dtype float64"
    assert choose("take_rows", operands("cpu")).reason == "cpu tensors"


def test_an_operator_runs_the_registered_kernel(toy: Kernel, monkeypatch: pytest.MonkeyPatch) -> None:
    given = operands("cpu")
    plain = torch.ops.specpass.take_rows(*given.values())
    chosen = SimpleNamespace(kernel="toy")
    monkeypatch.setattr("specpass.kernels.dispatch.choose", lambda operator, operands: chosen)
    monkeypatch.setattr(type(toy), "run", lambda self, operands, *rest: -operands["query"])
    assert torch.equal(torch.ops.specpass.take_rows(*given.values()), -given["query"])
    assert not torch.equal(plain, -given["query"])


def test_a_launch_takes_the_tables_tile_or_the_given_one(toy: Kernel) -> None:
    given = operands("cpu")
    block, found = toy.launch(given)
    assert block == 16
    assert torch.equal(found, toy.reference(**given))
    assert toy.launch(given, next(iter(toy.choices(SMALL, ARCHS["sm_90"]))))[0] == 32


def test_the_tuner_ranks_and_names_it(toy: Kernel) -> None:
    job = Job(toy, toy.shapes_of(operands("cpu")), ARCHS["sm_90"])
    assert job.refused is None
    assert [tile.block_n for tile in cost.shortlist(toy, job.shapes, ARCHS["sm_90"], 5)] == [16, 32, 64]
    assert json.loads(json.dumps(job.key.kernel)) == "toy"
    assert toy.folder / "spec.py" in toy.sources


def test_the_bench_checks_and_times_it(toy: Kernel) -> None:
    found: dict[str, dict[str, Any]] = {}

    def step(section: str, name: str, call: Any) -> Any:
        wanted = section == "rates" or name.split(",")[0] == "toy"
        return found.setdefault(section, {}).setdefault(name, call()) if wanted else {}

    run: Any = SimpleNamespace(tiny=True, device="cpu", step=step)
    correctness(run)
    floors(run)
    assert list(found["correctness"].values()) == [{"error_share": 0.0}]
    assert found["floors"]["toy"]["peers_us"]["aten"] > 0


def test_names_are_taken_once(toy: Kernel) -> None:
    with pytest.raises(ValueError, match="'toy'"):
        register(toy)


def test_what_is_forgotten_is_not_asked(toy: Kernel) -> None:
    assert kernels_of("take_rows") == (toy,)
    unregister(toy)
    assert kernels_of("take_rows") == ()
    register(toy)


def test_every_folder_is_scanned() -> None:
    folders = {path.parent for path in FOLDER.glob("*/spec.py")}
    assert {kernel.folder for kernel in REGISTRY.values()} == folders
    assert len(folders) >= 3
    assert all((folder / "jit.py").exists() for folder in folders)


@pytest.mark.parametrize("name", REGISTRY)
def test_references_take_the_operands_of_the_schema(name: str) -> None:
    kernel = REGISTRY[name]
    parameters = inspect.signature(kernel.reference).parameters
    declared = OPERATORS[kernel.operator].packet.default._schema.arguments
    assert list(parameters) == [argument.name for argument in declared]
    for argument in declared:
        default = parameters[argument.name].default
        assert (default is not inspect.Parameter.empty) == argument.has_default_value()
        assert not argument.has_default_value() or default == argument.default_value
    assert kernel.make(SMALL, "cpu", 0).keys() <= parameters.keys()


@pytest.mark.parametrize("file", sorted(FOLDER.rglob("*.py")), ids=lambda file: f"{file.parent.name}/{file.name}")
def test_kernels_import_nothing_of_the_rest(file: Path) -> None:
    """Nor Triton, where no jit function stands."""
    tree = ast.parse(file.read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    own = {name for name in names if name.split(".")[0] == "specpass"}
    assert all(name.startswith("specpass.kernels") or name == "specpass.bits" for name in own)
    at_once = {
        name
        for node in tree.body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
    }
    assert ("triton" in at_once) == (file.name in ("jit.py", "logits.py"))
