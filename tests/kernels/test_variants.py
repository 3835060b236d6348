"""A kernel is compiled for its launches' constants: how many there are of them when nothing but the prompt differs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from specpass.bits import blocks_of
from specpass.kernels.archs import ARCHS
from specpass.kernels.decode.plan import cut
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes
from specpass.kernels.tiles import Tile
from specpass.tune.jobs import Layer

LENGTHS = (*range(1024, 131_072, 509), 131_072)  # of prompts, in tokens
ARCH = ARCHS["sm_90"]


def importance(layer: Layer, length: int, given: int) -> dict[str, Any]:
    return layer.importance(64, length, 32, "max")[given]


def codes(layer: Layer, length: int) -> dict[str, Any]:
    blocks = torch.empty(layer.batch, layer.kv_heads, blocks_of(length), 1, device="meta", dtype=torch.uint8)
    return layer.attend(64) | {"quantized": [blocks, blocks, blocks], "bits": 4}


# Operands at a prompt's length, and the most variants of each launch. A draft that keeps its whole prompt has slots for
# it; what a target keeps is its budget, gather's constants C and N, and does not follow the prompt.
CALLS: dict[str, tuple[Callable[[Layer, int], dict[str, Any]], int]] = {
    "decode": (lambda layer, length: layer.attend(length), 3),
    "decode_append": (lambda layer, length: layer.append_attend(length), 3),
    "decode_append_lse": (lambda layer, length: layer.append_attend_lse(length), 3),
    "decode_codes": (lambda layer, length: codes(layer, length), 3),
    "importance": (lambda layer, length: importance(layer, length, 0), 1),
    "importance_given_lse": (lambda layer, length: importance(layer, length, 1), 1),
    "reconstruction": (lambda layer, length: layer.reconstruction(64, length, 32, "max"), 1),
    "sparse_prefill": (lambda layer, length: layer.prefill_attention_sparse(length, 2048, 32, 32), 1),
    "gather": (lambda layer, length: layer.gather_kv(length, 1024, 256), 1),
}


def test_every_kernel_is_asked() -> None:
    assert CALLS.keys() == REGISTRY.keys()


@pytest.mark.parametrize("batch", [1, 8, 64])
@pytest.mark.parametrize("name", CALLS)
def test_variants_do_not_follow_the_prompt(name: str, batch: int) -> None:
    kernel, (operands, most) = REGISTRY[name], CALLS[name]
    layer = Layer(batch, 32, 8, 128, "bfloat16")
    variants: dict[str, set[tuple[Any, ...]]] = {}
    for length in LENGTHS:
        shapes = kernel.shapes_of(operands(layer, length))
        for launch in kernel.plan(shapes, kernel.default_tile(shapes, ARCH)):
            compiled = (*sorted(launch.constants.items()), launch.warps, launch.stages)
            variants.setdefault(launch.function, set()).add(compiled)
    assert {function: len(found) for function, found in variants.items() if len(found) > most} == {}


@pytest.mark.parametrize("name", CALLS)
def test_sizes_that_follow_the_prompt_are_not_specialised(name: str) -> None:
    """Triton compiles anew for an integer that is 1 or a multiple of 16, unless it is told not to."""
    pytest.importorskip("triton")
    kernel = REGISTRY[name]
    shapes = kernel.shapes_of(CALLS[name][0](Layer(1, 32, 8, 128, "bfloat16"), 5000))
    for launch in kernel.plan(shapes, kernel.default_tile(shapes, ARCH)):
        parameters = getattr(kernel.code, launch.function).params
        assert tuple(launch.arguments) == tuple(each.name for each in parameters if not each.is_constexpr)
        free = tuple(each.name for each in parameters if each.do_not_specialize)
        assert launch.unaligned == free
        assert {each for each, kind in launch.arguments.items() if kind == "i32"} == set(free)  # strides are i64


def test_splits_cover_all_slots_in_whole_steps() -> None:
    for slots in (1, 63, 64, 65, 1280, 5000, 131_072):
        for tile in (Tile(16), Tile(64, splits=3), Tile(64, splits=33), Tile(32, splits=64)):
            splits, steps = cut(Shapes("bfloat16", 1, 8, 4, 128, 128, budget=slots), tile)
            assert 1 <= splits <= tile.splits
            assert (splits - 1) * steps * tile.block_n < slots <= splits * steps * tile.block_n
