"""Every pass has a file of tests of its own, and in it the tests that a pass must have."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from specpass.export.functionalize import Functionalize
from specpass.export.lift_constants import LiftConstants
from specpass.export.name_nodes import NameNodes
from specpass.lowering.fuse import FUSION
from specpass.methods.speckvpc import SpecKVPC
from specpass.passes.pipeline import PASSES, draft_prefill_passes, draft_step_passes
from specpass.rewrite import Pass

TESTS = Path(__file__).parent.parent
METHOD = SpecKVPC(budget=100, sparse_prefill=50)  # whose draft scores, and reads sparsely
DRAFTS = (*draft_prefill_passes(1, METHOD), *draft_step_passes(1, METHOD.prompt))
FOLDERS: dict[str, tuple[Pass, ...]] = {
    "passes": (*PASSES, *DRAFTS),
    "lowering": FUSION,
    "export": (NameNodes(), Functionalize(), LiftConstants()),
}
FILES = sorted({(folder, item.name) for folder, passes in FOLDERS.items() for item in passes})

# What a test's name starts with: the graph as text, how many sites, the same or the formula's numbers, a graph that is
# left alone and why, and the pass run with the facts that it requires and no others.
MUST = ("test_text", "test_count", "test_numbers", "test_leaves", "test_alone")


@pytest.mark.parametrize(("folder", "name"), FILES, ids=[name for _, name in FILES])
def test_a_pass_has_its_tests(folder: str, name: str) -> None:
    file = TESTS / folder / f"test_{name}.py"
    assert file.is_file(), f"the pass {name} has no tests: {file}"
    found = [node.name for node in ast.parse(file.read_text()).body if isinstance(node, ast.FunctionDef)]
    missing = [start for start in MUST if not any(test.startswith(start) for test in found)]
    assert not missing, f"{file} has no {' and no '.join(missing)}"


def test_every_pass_of_the_package_is_known_here() -> None:
    """A pass that stands in no order would escape."""
    ours = {sub.name for sub in Pass.__subclasses__() if sub.__module__.startswith("specpass.")}
    assert ours == {name for _, name in FILES}
