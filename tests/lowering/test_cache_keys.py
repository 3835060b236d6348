"""What specpass compiled and cached is not found again by another version of its passes or kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import specpass.ops  # noqa: F401  (registers the operators)
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import FOLDER
from specpass.kernels.store import Key
from specpass.lowering.inductor import compile_region, tagged
from specpass.lowering.regions import close
from specpass.passes import pipeline
from specpass.passes.pipeline import SOURCES, fingerprint


def test_the_pipelines_fingerprint_is_of_its_passes_and_sources(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fingerprint()
    assert whole == fingerprint()
    assert fingerprint(["take_last"]) != whole
    assert {"gather_prune.py", "walk.py", "select.py", "reference.py", "jit.py"} <= {path.name for path in SOURCES}
    changed = tmp_path / SOURCES[0].name
    changed.write_text(SOURCES[0].read_text() + "# one comment more\n")
    monkeypatch.setattr(pipeline, "SOURCES", (changed, *SOURCES[1:]))
    assert fingerprint() != whole


DECIDING = ["decode/jit.py", "decode/spec.py", "decode/plan.py", "launch.py", "logits.py", "spec.py", "shapes.py"]


@pytest.mark.parametrize("changed", [*DECIDING, "gather/jit.py"])
def test_a_tuned_tiles_key_is_of_its_kernels_sources(
    changed: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, shapes = REGISTRY["decode"], Shapes("float16", 2, 4, 2, 64, 64, budget=256, room=64)
    before = Key.of(kernel, shapes, "sm_90")
    copy = tmp_path / "changed.py"
    copy.write_text((FOLDER / changed).read_text() + "# more\n")
    sources = tuple(copy if path == FOLDER / changed else path for path in kernel.sources)
    monkeypatch.setattr(type(kernel), "sources", sources)
    assert (Key.of(kernel, shapes, "sm_90") != before) == (changed in DECIDING)


def compiled(gm: fx.GraphModule, fingerprint: str) -> tuple[int, int]:
    """Inductor's hits and misses while the graph is compiled as a region."""
    counters.clear()
    torch._dynamo.reset()
    nodes = [node for node in gm.graph.nodes if node.op == "call_function"]
    with tagged(fingerprint):
        run: Any = compile_region(gm, close(nodes))
    given = torch.randn(2, 2, 9, 8), torch.zeros(2, 2, 3, dtype=torch.int64)
    torch.testing.assert_close(run(*given)[0], gm(*given))
    return counters["inductor"]["fxgraph_cache_hit"], counters["inductor"]["fxgraph_cache_miss"]


def test_inductors_caches_are_keyed_by_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))

    def region(key: Any, positions: Any) -> Any:
        return torch.ops.specpass.gather_kv(key * 2, key + 1, positions, 4)[0]

    with FakeTensorMode():
        gm = make_fx(region)(torch.empty(2, 2, 9, 8), torch.empty(2, 2, 3, dtype=torch.int64))
    assert compiled(gm, "one") == (0, 1)
    assert compiled(gm, "one") == (1, 0)
    assert compiled(gm, "other") == (0, 1)
    assert torch.compiler.config.cache_key_tag == ""
