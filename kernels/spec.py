"""One kernel as one object: what the dispatcher, the tuner, the ahead-of-time report, the emitter and the bench read.

A folder under specpass.kernels holds a kernel: `jit.py` its Triton functions, `reference.py` the same in plain aten,
`spec.py` a tuple KERNELS of Kernel objects. Nothing but jit.py imports Triton.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from specpass.kernels import store
from specpass.kernels.archs import ARCHS, Arch, device_arch
from specpass.kernels.launch import Launch
from specpass.kernels.shapes import DTYPES, Shapes
from specpass.kernels.tiles import Tile, precision_for

if TYPE_CHECKING:
    from specpass.kernels.cost import Cost

FOLDER = Path(__file__).parent
SHARED = tuple(
    FOLDER / name for name in ("launch.py", "logits.py", "shapes.py", "spec.py")
)  # how any kernel is launched
Operands = Mapping[str, Any]  # an operator's operands by the names of its schema, real, fake or without data


class Kernel(abc.ABC):
    """One kernel of one operator; a subclass without state, of which one instance stands in KERNELS.

    name: of the kernel. operator: of the specpass operator that it serves. reference: the operator in plain aten.
    work: what a KV head's work grows with, "columns" of the prompt or "slots" of the cache.
    variants: fields of Shapes that sites set besides sizes, for the bench to try.
    advances: operands that a call leaves further on, so that repeating it needs them put back.
    """

    name: ClassVar[str]
    operator: ClassVar[str]
    reference: ClassVar[Callable[..., Any]]
    work: ClassVar[str] = "slots"
    variants: ClassVar[tuple[dict[str, Any], ...]] = ()
    advances: ClassVar[tuple[str, ...]] = ()

    # What it serves.

    def applies(self, operands: Operands) -> bool:
        """Whether it is this kernel of its operator that such a call means."""
        return True

    def refuse_layout(self, operands: Operands) -> str | None:
        """Why tensors that lie in memory like these are not served, or None."""
        return None

    def refuse(self, shapes: Shapes) -> str | None:
        """Why these shapes are not served, or None."""
        if shapes.dtype not in DTYPES:
            return f"dtype {shapes.dtype}"
        for name, dim in (("head dimension", shapes.dim), ("value dimension", shapes.value_dim)):
            if dim > 256 or dim % 8:
                return f"{name} {dim}: at most 256 and a multiple of 8"
        return None

    @abc.abstractmethod
    def shapes_of(self, operands: Operands) -> Shapes:
        """What the kernel is specialised for at this call; sizes that are symbols are 0."""

    # How it is cut.

    @abc.abstractmethod
    def table(self, shapes: Shapes, arch: Arch) -> Tile:
        """The tile where the store has none: it compiles without spills and fits shared memory on every arch."""

    def choices(self, shapes: Shapes, arch: Arch) -> Iterable[Tile]:
        """Further tiles that are worth a try; what cannot fit is the cost model's to drop."""
        return ()

    @property
    @abc.abstractmethod
    def cost(self) -> Cost:
        """Closed forms of what a call moves, computes and holds."""

    @property
    def least(self) -> Cost:
        """Of what any kernel with the same result must move and compute: the floor that times are held to."""
        return self.cost

    def rule_out(self, shapes: Shapes, tile: Tile, arch: Arch) -> str | None:
        """Why this tile is hopeless, beyond what holds for every kernel, or None."""
        return None

    # How it runs.

    @abc.abstractmethod
    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        """Its launches, in order, as data."""

    @abc.abstractmethod
    def run(self, operands: Operands, shapes: Shapes, tile: Tile, plan: tuple[Launch, ...]) -> Any:
        """What the operator returns, by the launches of the plan."""

    def launch(self, operands: Operands, tile: Tile | None = None) -> Any:
        """Run the kernel; `tile` overrides what the store or the table says."""
        shapes = self.shapes_of(operands)
        tile = tile or find_tile(self, shapes, device_of(operands))
        return self.run(operands, shapes, tile, planned(self, shapes, tile))

    # How it is tested.

    @abc.abstractmethod
    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        """Fresh random operands."""

    @abc.abstractmethod
    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        """Largest error of a result against float64, as a share of what is allowed: at most 1 is right.

        `operands` are those of `make` as the call left them.
        """

    # The same for all.

    def default_tile(self, shapes: Shapes, arch: Arch) -> Tile:
        """`table`, with the precision that the architecture wants."""
        return dataclasses.replace(self.table(shapes, arch), precision=precision_for(shapes, arch))

    def candidate_tiles(self, shapes: Shapes, arch: Arch) -> Iterator[Tile]:
        """Every tile that the tuner considers, the default first."""
        default = self.default_tile(shapes, arch)
        yield default
        for choice in self.choices(shapes, arch):
            tile = dataclasses.replace(choice, precision=default.precision)
            if tile != default:
                yield tile

    @property
    def folder(self) -> Path:
        return Path(sys.modules[type(self).__module__].__file__ or "").parent

    @property
    def code(self) -> ModuleType:
        """The module of its jit functions; imports Triton."""
        return importlib.import_module(f"{type(self).__module__.rpartition('.')[0]}.jit")

    @property
    def sources(self) -> tuple[Path, ...]:
        """The files that decide what runs."""
        return (*sorted(self.folder.glob("*.py")), *SHARED)

    @property
    def fingerprint(self) -> str:
        """Changes with the kernel's source and with how it is launched."""
        return digest(self.sources)


@functools.cache
def digest(files: tuple[Path, ...]) -> str:
    """Hash of files' contents, read once a process."""
    return hashlib.sha256(b"\0".join(file.read_bytes() for file in files)).hexdigest()[:16]


@functools.lru_cache(maxsize=1024)
def planned(kernel: Kernel, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
    """The kernel's plan, made once."""
    return kernel.plan(shapes, tile)


def device_of(operands: Operands) -> torch.device:
    """Of the first tensor."""
    return next(operand.device for operand in operands.values() if isinstance(operand, torch.Tensor))


def find_tile(kernel: Kernel, shapes: Shapes, device: torch.device) -> Tile:
    """The tuned tile for the device's architecture, or the table's for this very device."""
    return _find_tile(kernel, shapes, device_arch(device.index or 0) if device.type == "cuda" else None)


@functools.lru_cache(maxsize=1024)
def _find_tile(kernel: Kernel, shapes: Shapes, arch: Arch | None) -> Tile:
    tuned = None if arch is None else store.lookup(kernel, shapes, arch.kind)
    return tuned or kernel.default_tile(shapes, arch or ARCHS["sm_90"])
