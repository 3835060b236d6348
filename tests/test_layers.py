"""What import contracts cannot say: kernels without FX, imports without torch, documents that match the tree."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import grimp
import pytest
import typer.main

from specpass import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


CODE = [file for part in ("specpass", "lowering", "kernels") for file in sorted((ROOT / part).rglob("*.py"))]
LAYERS = next(
    contract["layers"]
    for contract in tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
    if contract["type"] == "layers"
)


@pytest.fixture(scope="module")
def imports() -> grimp.ImportGraph:
    """Who imports whom, those for type checkers too; the linked folders are roots of their own."""
    return grimp.build_graph("specpass", "specpass.lowering", "specpass.kernels", cache_dir=None)


def package_of(module: str) -> str:
    """specpass.passes of specpass.passes.read.masks; specpass itself stays."""
    return ".".join(module.split(".")[:2])


def test_contracts_see_the_linked_folders(imports: grimp.ImportGraph) -> None:
    for importer, imported in (
        ("specpass.backend.compile", "specpass.lowering.lower"),
        ("specpass.lowering.share_lse", "specpass.kernels.dispatch"),
        ("specpass.ops.select", "specpass.kernels.importance.reference"),
    ):
        assert imports.direct_import_exists(importer=importer, imported=imported)


def test_packages_import_downwards_without_a_cycle(imports: grimp.ImportGraph) -> None:
    packages = {package_of(module) for module in imports.modules} - {"specpass"}
    assert packages == set(LAYERS), "the layers in pyproject.toml name every package"
    upwards = {
        (importer, imported)
        for importer in imports.modules
        for imported in imports.find_modules_directly_imported_by(importer)
        if {package_of(importer), package_of(imported)} <= packages
        and LAYERS.index(package_of(imported)) < LAYERS.index(package_of(importer))
    }
    assert not upwards  # what only points downwards has no cycle


def by_number(tree: ast.AST) -> list[int]:
    """Lines that read a node's operands by their place: `node.args[1]`, `query, key = node.args`."""
    found = []
    for node in ast.walk(tree):
        sliced = isinstance(node, ast.Subscript) and is_args(node.value)
        unpacked = isinstance(node, ast.Assign) and is_args(node.value) and isinstance(node.targets[0], ast.Tuple)
        if sliced or unpacked:
            found.append(node.lineno)
    return found


def is_args(node: ast.expr) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "args"


def test_operands_have_names() -> None:
    """Where an operand stands is known to the views' own packages alone."""
    assert by_number(ast.parse("x.args[0]; x.args[:2]; a, *b = node.args")) == [1, 1, 1]
    views = (ROOT / "specpass" / "graph", ROOT / "specpass" / "dialect")
    for file in CODE:
        if file.parent not in views:
            assert not by_number(ast.parse(file.read_text())), file


def imported(file: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").rglob("[a-z]*.py")), ids=lambda file: file.name)
def test_kernels_know_nothing_of_fx(file: Path) -> None:
    names = imported(file)
    assert names
    for name in names:
        assert not name.startswith(("torch.fx", "torch._dynamo", "torch._inductor", "specpass.passes")), name


@pytest.mark.parametrize("module", ["specpass", "specpass.cli", "specpass.runtime", "specpass.methods.registry"])
def test_importing_loads_no_torch(module: str) -> None:
    code = f"import sys, {module}; print([name for name in ('torch', 'transformers', 'sympy') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("file", DOCUMENTS, ids=lambda file: str(file.relative_to(ROOT)))
def test_paths_in_documents_exist(file: Path) -> None:
    text = file.read_text()
    links = {link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link}
    code = set(re.findall(r"`((?:specpass|lowering|kernels|bench|tests|docs)/[\w./]*)`", text))
    missing = [path for path in links if not (file.parent / path).exists()]
    assert not missing + [path for path in code if not (ROOT / path).exists()]


def test_architecture_names_every_pass() -> None:
    import specpass.ops  # noqa: F401  (passes name its operators)
    from specpass.passes.pipeline import PASSES

    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| [A-Z]+ \|", text, flags=re.M)
    assert rows == [item.name for item in PASSES]


def test_architecture_names_every_package() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| `(\w+)/` \|", text, flags=re.M)
    packages = [folder.name for folder in (ROOT / "specpass").iterdir() if any(folder.glob("*.py"))]
    assert len(packages) > 15
    assert sorted(rows) == sorted(packages)


def commands_in(text: str) -> list[str]:
    """Lines of ```sh blocks that call specpass."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.M | re.S)
    return [line for block in blocks for line in block.splitlines() if line.startswith("specpass ")]


LINES = sorted({line for file in DOCUMENTS for line in commands_in(file.read_text())})


@pytest.mark.parametrize("line", LINES)
def test_command_lines_in_documents_parse(line: str) -> None:
    words = shlex.split(line, comments=True)[1:]
    command: Any = typer.main.get_command(cli.app)
    while hasattr(command, "commands"):
        command = command.commands[words.pop(0)]
    command.make_context("specpass", words)
