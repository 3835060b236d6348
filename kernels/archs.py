"""Architectures that kernels are compiled for, with the limits that decide which tiles fit.

Rates are the vendors' data-sheet figures (dense 16-bit); they rank tiles where nothing can be measured.
"""

from __future__ import annotations

import dataclasses
import functools


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


KIB = 1024
ARCHS: dict[str, Arch] = {
    arch.name: arch
    for arch in (
        Arch("sm_80", "cuda", 80, 32, 163 * KIB, 164 * KIB, 108, 65536, 2048, 2.039e12, 312e12),
        Arch("sm_90", "cuda", 90, 32, 227 * KIB, 228 * KIB, 132, 65536, 2048, 3.35e12, 989e12),
        Arch("sm_100", "cuda", 100, 32, 227 * KIB, 228 * KIB, 148, 65536, 2048, 8.0e12, 2250e12),
        Arch("gfx942", "hip", "gfx942", 64, 64 * KIB, 64 * KIB, 304, 4 * 512 * 64, 2048, 5.3e12, 1307e12),
    )
}


@functools.cache
def device_arch(index: int = 0) -> str | None:
    """Name of the GPU's architecture here, or None without a GPU; it need not be one of ARCHS."""
    import torch

    if not torch.cuda.is_available():
        return None
    if torch.version.hip:
        return torch.cuda.get_device_properties(index).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(index)
    return f"sm_{major}{minor}"


def nearest(name: str | None) -> Arch:
    """The architecture whose tile table serves `name`: itself, else the newest one of its kind that is not newer."""
    if name in ARCHS:
        return ARCHS[str(name)]
    if name and name.startswith("gfx"):
        return ARCHS["gfx942"]
    if name and name.startswith("sm_"):
        older = [arch for arch in ARCHS.values() if arch.backend == "cuda" and int(arch.capability) <= int(name[3:])]
        return older[-1] if older else ARCHS["sm_80"]
    return ARCHS["sm_90"]
