"""What is kept of a prompt: one method a file, which `registry` finds; what they share is in base.py."""

from __future__ import annotations

from typing import Any


def __getattr__(name: str) -> Any:
    """specpass.methods.SnapKV, wherever its file is."""
    if name.startswith("_"):
        raise AttributeError(name)
    from specpass.methods.registry import built_in

    found = built_in().get(name)
    if found is None:
        raise AttributeError(f"module 'specpass.methods' has no attribute {name!r}")
    return found
