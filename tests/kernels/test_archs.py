"""Any GPU is known by its properties; without one a data sheet speaks; what Triton does not know is said by name."""

from __future__ import annotations

import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specpass.kernels import aot, archs, cost, dispatch, spec, store
from specpass.kernels.archs import ARCHS, KIB, Arch, arch_of, device_arch, nearest
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes

LLAMA = Shapes("bfloat16", 1, 8, 4, 128, 128, rows=64, window=32, budget=1024, room=256, columns=32768)


def card(major: int, minor: int, units: int, clock: int, width: int, **more: Any) -> Any:
    """A device's properties as torch gives them: kHz, bits, KiB of shared memory."""
    wide = more.pop("shared", 99)
    sizes = {"shared_memory_per_block": 48 * KIB, "shared_memory_per_block_optin": wide * KIB}
    sizes |= {"shared_memory_per_multiprocessor": (wide + 1) * KIB, "regs_per_multiprocessor": 65536}
    sizes |= {"max_threads_per_multi_processor": 1536, "warp_size": 32, "multi_processor_count": units}
    rates = {"memory_clock_rate": clock, "memory_bus_width": width}
    return SimpleNamespace(major=major, minor=minor, **{**sizes, **rates, **more})


CARDS = {
    "A10": (card(8, 6, 72, 6_251_000, 384), 600e9),
    "4090": (card(8, 9, 128, 10_501_000, 384), 1008e9),
    "L4": (card(8, 9, 58, 6_251_000, 192), 300e9),
    "B300": (card(10, 3, 148, 3_996_000, 8192, shared=227, max_threads_per_multi_processor=2048), 8.18e12),
    "5090": (card(12, 0, 170, 14_001_000, 512), 1792e9),
    "Orin": (card(8, 7, 16, 3_200_000, 256, shared=163), 204.8e9),  # on no data sheet here
}


@pytest.mark.parametrize("name", CARDS)
def test_a_card_is_read_from_its_properties(name: str) -> None:
    device, bandwidth = CARDS[name]
    arch = arch_of(device, hip=False)
    assert (arch.name, arch.capability) == (f"sm_{device.major}{device.minor}", 10 * device.major + device.minor)
    assert (arch.units, arch.threads) == (device.multi_processor_count, device.max_threads_per_multi_processor)
    assert (arch.shared, arch.shared_unit - arch.shared) == (device.shared_memory_per_block_optin, KIB)
    assert arch.bandwidth == pytest.approx(bandwidth, rel=0.01)
    if arch.name in ARCHS and name != "L4":
        sheet = ARCHS[arch.name]
        assert dataclasses.replace(arch, bandwidth=sheet.bandwidth) == sheet
    for kernel in REGISTRY.values():
        tiles = cost.shortlist(kernel, LLAMA, arch, 4)
        assert len(tiles) == 4


def test_a_slower_card_of_a_kind_gets_its_own_number_of_splits() -> None:
    decode = REGISTRY["decode"]
    few, many = (decode.default_tile(LLAMA, arch_of(CARDS[name][0], hip=False)).splits for name in ("Orin", "4090"))
    assert few == 4  # two programs for each of 16 processors, of 8 heads
    assert many == 20
    kinds = {name: arch_of(device, hip=False).kind for name, (device, _) in CARDS.items()}  # what tuned tiles go by
    assert kinds == {
        "A10": "sm_86",
        "4090": "sm_89",
        "L4": "sm_89x58",
        "B300": "sm_103",
        "5090": "sm_120",
        "Orin": "sm_87x16",
    }


def test_a_build_that_says_less_takes_the_nearest_ones_figures() -> None:
    device, _ = CARDS["L4"]
    for silent in ("memory_clock_rate", "shared_memory_per_block_optin", "shared_memory_per_multiprocessor"):
        del device.__dict__[silent]
    arch, sheet = arch_of(device, hip=False), ARCHS["sm_89"]
    assert (arch.shared, arch.shared_unit) == (sheet.shared, sheet.shared_unit)
    assert arch.bandwidth == pytest.approx(sheet.bandwidth * 58 / 128)
    amd = SimpleNamespace(gcnArchName="gfx942:sramecc+:xnack-", multi_processor_count=38, warp_size=64)
    amd.shared_memory_per_block, amd.max_threads_per_multi_processor = 64 * KIB, 2048
    amd.memory_clock_rate, amd.memory_bus_width = 1_300_000, 8192
    part = arch_of(amd, hip=True)  # an eighth of an MI300X, as its partitions are
    assert (part.name, part.capability, part.shared, part.units) == ("gfx942", "gfx942", 64 * KIB, 38)
    assert part.bandwidth == pytest.approx(ARCHS["gfx942"].bandwidth / 8)


def test_the_nearest_is_the_newest_that_is_not_newer() -> None:
    names = {"sm_75": "sm_80", "sm_87": "sm_86", "sm_90": "sm_90", "sm_110": "sm_103", "sm_121": "sm_120"}
    names |= {"gfx950": "gfx950", "gfx90a": "gfx942", "gfx1100": "gfx942"}
    assert {name: nearest(name).name for name in names} == names


def test_tiles_and_dispatch_ask_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: CARDS["Orin"][0])
    here = device_arch.__wrapped__(0)
    assert here == arch_of(CARDS["Orin"][0], hip=False)
    monkeypatch.setattr(spec, "device_arch", lambda index: here)
    spec._find_tile.cache_clear()
    assert spec.find_tile(REGISTRY["decode"], LLAMA, torch.device("cuda", 0)).splits == 4


def test_what_triton_does_not_know_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    future = dataclasses.replace(ARCHS["sm_120"], name="sm_130", capability=130)
    reason = dispatch.refuse_arch(future) or ""  # asked in this process it is the end of it: "LLVM ERROR"
    assert reason.startswith(f"Triton {store.triton_version()} does not compile for sm_130 (")
    aot.probe(json.dumps(dataclasses.asdict(arch_of(CARDS["Orin"][0], hip=False))))

    def unasked(arch: Arch) -> str:
        raise AssertionError(arch)

    monkeypatch.setattr(dispatch, "refused", unasked)
    assert [dispatch.refuse_arch(arch) for arch in archs.ARCHS.values()] == [None] * len(ARCHS)
    old = dataclasses.replace(ARCHS["sm_80"], name="sm_75", capability=75)
    assert dispatch.refuse_arch(old) == "sm_75 is older than sm_80"
