"""Every kernel by name: those of the folders beside this file, and those that others register."""

from __future__ import annotations

import importlib
import pkgutil

from specpass.kernels.spec import FOLDER, Kernel

REGISTRY: dict[str, Kernel] = {}
_BY_OPERATOR: dict[str, tuple[Kernel, ...]] = {}


def register(kernel: Kernel) -> None:
    """Let the dispatcher, the tuner and the bench know a kernel. The operator's last one is asked first.

    Raises: ValueError: another kernel has its name.
    """
    if kernel.name in REGISTRY:
        raise ValueError(f"{type(kernel).__name__}: a kernel named {kernel.name!r} is registered already.")
    REGISTRY[kernel.name] = kernel
    _BY_OPERATOR[kernel.operator] = (kernel, *kernels_of(kernel.operator))


def unregister(kernel: Kernel) -> None:
    """Forget a kernel that `register` was given."""
    del REGISTRY[kernel.name]
    _BY_OPERATOR[kernel.operator] = tuple(other for other in kernels_of(kernel.operator) if other is not kernel)


def kernels_of(operator: str) -> tuple[Kernel, ...]:
    """An operator's kernels, in the order in which they are asked; empty where it has none."""
    return _BY_OPERATOR.get(operator, ())


def operators() -> tuple[str, ...]:
    """Operators that have a kernel."""
    return tuple(operator for operator, kernels in _BY_OPERATOR.items() if kernels)


def _scan() -> None:
    for found in pkgutil.iter_modules([str(FOLDER)]):
        if found.ispkg and (FOLDER / found.name / "spec.py").exists():
            for kernel in importlib.import_module(f"specpass.kernels.{found.name}.spec").KERNELS:
                register(kernel)


_scan()
