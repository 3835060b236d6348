"""Every kernel, compiled for each architecture without a GPU: no spills, shared memory that fits, tensor cores."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from pathlib import Path
from typing import Any

import pytest

from specpass.kernels.aot import build, compile_launch, inspect
from specpass.kernels.archs import ARCHS
from specpass.kernels.emit import emit
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.tiles import Tile

EMITTED = Path(__file__).with_name("emitted")
# A layer of Llama-3.1-8B, for every kernel on every architecture; and a covering set: with it decode and gather meet
# every head dimension on every architecture, importance every one on two or more, and groups, dtypes, reductions,
# weights and batches vary along.
LLAMA = Shapes("bfloat16", 1, 8, 4, 128, 128, rows=64, window=32, budget=1024, room=256, columns=32768)


def other(dtype: str, group: int, dim: int, **sizes: Any) -> Shapes:
    return Shapes(
        dtype,
        **{"batch": 2, "kv_heads": 2, "rows": 40, "window": 33, "budget": 257, "room": 64, "columns": 8192, **sizes},
        group=group,
        dim=dim,
        value_dim=dim,
    )


OTHERS = [
    other("bfloat16", 7, 64, reduce="mean", sinks=True),
    other("float16", 1, 80, reduce="sum"),
    other("bfloat16", 16, 96, budget=34, batch=512, softcap=30.0),
    other("float16", 2, 256, softcap=50.0),
    other("float32", 7, 64),
    other("float32", 3, 128, weighted=True),
]
SLOTS = ("gather", "decode")
BROAD = ("sm_80", "sm_90", "sm_100", "gfx942")
# The others differ from one of these in limits or in instructions: sm_86, 89 and 120 have 99 KiB, gfx950 has 160.


def met_by(shapes: Shapes) -> tuple[str, ...]:
    """Kernels that one of OTHERS is compiled for; decode's twin over codes where something is done to logits, and
    reconstruction to the head dimensions that it takes."""
    left = set() if shapes.softcap or shapes.sinks else {"decode_codes"}
    left |= {"reconstruction"} if shapes.dim > (64 if shapes.dtype == "float32" else 128) else set()
    return tuple(name for name in REGISTRY if name not in left)


CASES = [
    (LLAMA, arch, tuple(REGISTRY) if arch in BROAD else ("importance_given_lse", "decode_append")) for arch in ARCHS
]
CASES += [
    (shapes, arch, met_by(shapes) if (index + turn) % 2 == 0 else SLOTS)
    for index, shapes in enumerate(OTHERS)
    for turn, arch in enumerate(BROAD)
]


def label(value: Any) -> str:
    if isinstance(value, Shapes):
        return f"{value.dtype}-D{value.dim}-G{value.group}"
    return value if isinstance(value, str) else f"{len(value)}"


@pytest.fixture(autouse=True)
def compiler() -> None:
    pytest.importorskip("triton")


@pytest.mark.parametrize(("shapes", "arch", "names"), CASES, ids=label)
def test_default_tiles_fit(shapes: Shapes, arch: str, names: tuple[str, ...]) -> None:
    for name in names:
        kernel = REGISTRY[name]
        assert kernel.refuse(shapes) is None
        tile = kernel.default_tile(shapes, ARCHS[arch])
        plan = kernel.plan(shapes, tile)
        for launch, built in zip(plan, build(kernel, shapes, tile, ARCHS[arch]), strict=True):
            where = f"{name}: {built} at {tile}"
            assert built.spills == 0, where
            assert 0 < built.regs <= 512, where
            assert built.shared_bytes <= ARCHS[arch].shared, where
            assert built.tensor_cores == launch.dot, where
            if launch.function == "attend_slots" and shapes.itemsize == 2:  # splits are two programs for each processor
                assert 2 * built.shared_bytes <= ARCHS[arch].shared_unit, where


def test_the_cases_cover_what_they_say() -> None:
    met = {(name, arch, shapes.dim) for shapes, arch, names in CASES for name in names}
    assert {arch for _, arch, _ in met} == set(ARCHS)
    for arch in BROAD:
        assert {dim for name, at, dim in met if (name, at) == ("decode", arch)} == {64, 80, 96, 128, 256}
        for name in REGISTRY:
            least = 2 if name in ("decode_codes", "reconstruction") else 3
            assert len({dim for other_name, at, dim in met if (other_name, at) == (name, arch)}) >= least
    assert {shapes.group for shapes, _, _ in CASES} >= {1, 2, 3, 4, 7, 16}
    assert {(shapes.reduce, shapes.weighted) for shapes, _, names in CASES if "importance" in names} >= {
        ("max", False),
        ("max", True),
        ("mean", False),
        ("sum", False),
    }
    for changed in (lambda shapes: shapes.softcap, lambda shapes: shapes.sinks):
        assert {name for shapes, _, names in CASES if changed(shapes) for name in names} == set(REGISTRY)


def test_the_report_sees_spills_and_oversized_shared_memory() -> None:
    """Both compile without a word: what the check above stands on."""
    kernel = REGISTRY["importance_given_lse"]
    spilled = build(kernel, LLAMA, Tile(256, 128, warps=4, stages=2), ARCHS["sm_90"])[0]
    assert spilled.spills > 0
    wide = Tile(128, splits=1, warps=8, stages=4)
    large = build(REGISTRY["decode"], other("float16", 4, 256), wide, ARCHS["sm_80"])[0]
    assert large.shared_bytes > ARCHS["sm_80"].shared


# What a golden file holds: each kernel for a plain layer, and those that read logits for a capped one with sinks.
CHANGED = dataclasses.replace(LLAMA, softcap=50.0, sinks=True)
GOLDEN = [(name, LLAMA, name) for name in REGISTRY] + [
    *((name, CHANGED, f"{name}_changed") for name in ("importance", "reconstruction", "decode_append")),
    ("decode_codes", dataclasses.replace(LLAMA, bits=4), "decode_codes_4_bits"),
]


@pytest.mark.parametrize(("name", "shapes", "file"), GOLDEN, ids=[file for _, _, file in GOLDEN])
def test_emitted_modules_are_golden_and_compile(name: str, shapes: Shapes, file: str, tmp_path: Path) -> None:
    """SPECPASS_ACCEPT=1 writes the golden files anew."""
    kernel, arch = REGISTRY[name], ARCHS["sm_90"]
    tile = kernel.default_tile(shapes, arch)
    text, golden = emit(kernel, shapes, tile), EMITTED / f"{file}.txt"
    if os.environ.get("SPECPASS_ACCEPT"):
        golden.write_text(text)
    assert text == golden.read_text()
    path = tmp_path / f"{file}.py"
    path.write_text(text)
    spec = importlib.util.spec_from_file_location(file, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for launch in kernel.plan(shapes, tile):
        emitted, generic = (inspect(compile_launch(code, launch, arch), launch) for code in (module, kernel.code))
        assert emitted == generic


@pytest.mark.parametrize("name", REGISTRY)
def test_candidates_are_distinct_and_start_with_the_default(name: str) -> None:
    kernel = REGISTRY[name]
    tiles = list(kernel.candidate_tiles(LLAMA, ARCHS["sm_80"]))
    assert tiles[0] == kernel.default_tile(LLAMA, ARCHS["sm_80"])
    assert len(tiles) == len(set(tiles)) > 10
