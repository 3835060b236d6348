"""Architectures that kernels are compiled for, with the limits that decide which tiles fit.

A GPU here is read from its own properties, whatever it is; ARCHS is for compiling without one. Rates there are the
vendors' data-sheet figures of one card (dense 16-bit); they rank tiles where nothing can be measured.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any


@dataclasses.dataclass(frozen=True)
class Arch:
    """One architecture.

    Args:
        name: "sm_90", "gfx942". backend, capability, warp: what Triton's GPUTarget takes.
        shared: bytes of shared memory that one program may use. shared_unit: bytes that a processor has.
        units: processors. registers: 32-bit registers of a processor. threads: resident threads of a processor.
        bandwidth: bytes/s. flops: 16-bit FLOP/s.
    """

    name: str
    backend: str
    capability: int | str
    warp: int
    shared: int
    shared_unit: int
    units: int
    registers: int
    threads: int
    bandwidth: float
    flops: float

    @property
    def too_old(self) -> bool:
        """Older than sm_80: neither kernels here nor torch's flash attention are made for it."""
        return self.backend == "cuda" and int(self.capability) < 80

    @property
    def kind(self) -> str:
        """What tuned tiles go by: its name, with the number of processors where the card of ARCHS has another.

        How many splits fill a card depends on them.
        """
        sheet = ARCHS.get(self.name)
        return self.name if sheet is not None and sheet.units == self.units else f"{self.name}x{self.units}"


KIB = 1024
ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (  # A100, A10, RTX 4090, H100, B200, B300, RTX 5090, MI300X, MI355X
        Arch("sm_80", "cuda", 80, 32, 163 * KIB, 164 * KIB, 108, 65536, 2048, 2.039e12, 312e12),
        Arch("sm_86", "cuda", 86, 32, 99 * KIB, 100 * KIB, 72, 65536, 1536, 0.6e12, 125e12),
        Arch("sm_89", "cuda", 89, 32, 99 * KIB, 100 * KIB, 128, 65536, 1536, 1.008e12, 165e12),
        Arch("sm_90", "cuda", 90, 32, 227 * KIB, 228 * KIB, 132, 65536, 2048, 3.35e12, 989e12),
        Arch("sm_100", "cuda", 100, 32, 227 * KIB, 228 * KIB, 148, 65536, 2048, 8.0e12, 2250e12),
        Arch("sm_103", "cuda", 103, 32, 227 * KIB, 228 * KIB, 148, 65536, 2048, 8.0e12, 2500e12),
        Arch("sm_120", "cuda", 120, 32, 99 * KIB, 100 * KIB, 170, 65536, 1536, 1.792e12, 209e12),
        Arch("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 304, 4 * 512 * 64, 2048, 5.3e12, 1307e12),
        Arch("gfx950", "hip", "gfx950", 64, 160 * KIB, 160 * KIB, 256, 4 * 512 * 64, 2048, 8.0e12, 2500e12),
    )
}


@functools.cache
def device_arch(index: int = 0) -> Arch | None:
    """The GPU here, or None without one."""
    import torch

    if not torch.cuda.is_available():
        return None
    return arch_of(torch.cuda.get_device_properties(index), hip=bool(torch.version.hip))


def arch_of(device: Any, hip: bool) -> Arch:
    """A GPU's architecture from what torch says of it.

    What a build of torch does not say, and the rate of its tensor cores, which none says, is that of the nearest
    architecture; rates are taken for as many processors as the device has.
    """
    name = device.gcnArchName.split(":")[0] if hip else f"sm_{device.major}{device.minor}"
    like = nearest(name)
    share = device.multi_processor_count / like.units
    shared = device.shared_memory_per_block if hip else getattr(device, "shared_memory_per_block_optin", like.shared)
    clock, width = (getattr(device, attribute, 0) for attribute in ("memory_clock_rate", "memory_bus_width"))
    said = not hip and clock and width  # kHz and bits; AMD's clock is a half or a quarter of what a pin carries
    return Arch(
        name,
        "hip" if hip else "cuda",
        name if hip else 10 * device.major + device.minor,
        device.warp_size,
        shared,
        max(shared, getattr(device, "shared_memory_per_multiprocessor", like.shared_unit)),
        device.multi_processor_count,
        getattr(device, "regs_per_multiprocessor", like.registers),
        device.max_threads_per_multi_processor,
        2e3 * clock * width / 8 if said else like.bandwidth * share,
        like.flops * share,
    )


def nearest(name: str) -> Arch:
    """What is known of an architecture: its own entry, else that of the newest one of its kind that is not newer."""
    if name in ARCHS:
        return ARCHS[name]
    if not name.startswith("sm_"):
        return ARCHS["gfx942"]
    older = [arch for arch in ARCHS.values() if arch.backend == "cuda" and int(arch.capability) <= int(name[3:])]
    return older[-1] if older else ARCHS["sm_80"]
