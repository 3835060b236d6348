"""Compile a kernel's launches for an architecture without a GPU, and read what the compiler made of them."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from specpass.kernels import store
from specpass.kernels.archs import Arch
from specpass.kernels.launch import Launch
from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import Kernel
from specpass.kernels.tiles import Tile

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
_CDNA = {"regs": re.compile(r"\.vgpr_count:\s+(\d+)"), "spills": re.compile(r"\.vgpr_spill_count:\s+(\d+)")}
_FATAL = re.compile(r"\bLLVM ERROR\b|\bfatal\b")  # what LLVM and ptxas say of a name that they do not know
_MATMUL = re.compile(r"\bmma\.sync|\bwgmma\.|\btcgen05\.mma|\bv_mfma_")


@dataclasses.dataclass(frozen=True)
class Built:
    """One compiled launch: registers of a thread, spilled loads and stores, bytes of shared memory, tensor cores."""

    function: str
    regs: int
    spills: int
    shared_bytes: int
    tensor_cores: bool


def compile_launch(code: Any, launch: Launch, arch: Arch) -> Any:
    """Triton's compiled kernel of one launch; `code` is the module (or namespace) that holds its function."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(code, launch.function)
    constants = {name: value for name, value in launch.constants.items() if name in function.arg_names}
    signature = {name: launch.arguments.get(name, "constexpr") for name in function.arg_names}
    # Ahead of time nothing looks at the arguments: say that pointers and strides are multiples of 16, as they are,
    # or loads are narrow and there is no asynchronous copy.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(function.arg_names)
        if name in launch.arguments and name not in launch.unaligned and launch.arguments[name] != "fp32"
    }
    source = ASTSource(function, signature, constants, aligned)
    target = GPUTarget(arch.backend, arch.capability, arch.warp)
    # Fused multiply-adds are said out loud: what Triton does unasked differs by version.
    options = {"num_warps": launch.warps, "num_stages": launch.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=options)


def build(kernel: Kernel, shapes: Shapes, tile: Tile, arch: Arch) -> tuple[Built, ...]:
    """Compile all launches of a kernel and say what they use."""
    code = kernel.code
    return tuple(inspect(compile_launch(code, launch, arch), launch) for launch in kernel.plan(shapes, tile))


@functools.cache
def refused(arch: Arch) -> str | None:
    """Why Triton cannot compile for an architecture, or None.

    A process of its own tries: LLVM ends the one that asks for an architecture that it does not know.
    """
    code = "import sys; from specpass.kernels.aot import probe; probe(sys.argv[1])"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-c", code, json.dumps(dataclasses.asdict(arch))]
    run = subprocess.run(
        command, env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True
    )
    if run.returncode == 0:
        return None
    lines = run.stderr.splitlines() or [f"exit status {run.returncode}"]
    said = next(filter(_FATAL.search, lines), lines[-1]).strip()
    return f"Triton {store.triton_version()} does not compile for {arch.name} ({said[:200]})"


def probe(arch: str) -> None:
    """Compile a small kernel with tensor-core dots; raises, or ends the process, where Triton cannot.

    Args: arch: an Arch's fields, as JSON.
    """
    from specpass.kernels.registry import REGISTRY

    kernel, known = REGISTRY["decode"], Arch(**json.loads(arch))
    shapes = Shapes("bfloat16", 1, 1, 1, 64, 64, budget=256)
    build(kernel, shapes, kernel.default_tile(shapes, known), known)


def inspect(compiled: Any, launch: Launch) -> Built:
    """Registers, spills, shared memory and tensor-core use of a compiled launch."""
    if "cubin" in compiled.asm:
        regs, spills = _read_cubin(compiled.asm["cubin"])
        text = compiled.asm["ptx"]
    else:
        text = compiled.asm["amdgcn"]
        regs, spills = (_number(_CDNA[name], text) for name in ("regs", "spills"))
    return Built(launch.function, regs, spills, int(compiled.metadata.shared), bool(_MATMUL.search(text)))


def _number(pattern: re.Pattern[str], text: str) -> int:
    found = pattern.search(text)
    if found is None:
        raise RuntimeError(f"the compiler's output does not say {pattern.pattern}")
    return int(found.group(1))


@functools.cache
def _tool(name: str) -> str:
    import triton.backends.nvidia as nvidia

    return str(Path(nvidia.__file__ or "").parent / "bin" / name)


def _read_cubin(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and local loads and stores: the stack alone does not tell spills from arrays."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        found = _USAGE.search(_run("cuobjdump", "-res-usage", file.name))
        if found is None:
            raise RuntimeError("cuobjdump said nothing about registers")
        regs, stack = int(found.group(1)), int(found.group(2))
        if stack == 0:
            return regs, 0
        return regs, len(re.findall(r"\b(?:LDL|STL)\b", _run("nvdisasm", "-c", file.name)))


def _run(tool: str, *args: str) -> str:
    return subprocess.run([_tool(tool), *args], capture_output=True, text=True, check=True).stdout
