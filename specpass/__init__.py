"""specpass: a torch.compile pass pipeline that makes long prompts cheap with a small draft model."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from specpass._version import __version__ as __version__

if TYPE_CHECKING:
    from specpass.backend.compile import Backend as Backend
    from specpass.backend.doors import compile as compile
    from specpass.backend.doors import restore as restore
    from specpass.backend.prefix import read as read
    from specpass.backend.shorten import PromptCompressor as PromptCompressor
    from specpass.cache.budget import BudgetCache as BudgetCache
    from specpass.cache.prefix import Prefix as Prefix
    from specpass.export.api import export_onnx as export_onnx
    from specpass.methods.base import Method as Method
    from specpass.methods.pyramidkv import PyramidKV as PyramidKV
    from specpass.methods.snapkv import SnapKV as SnapKV
    from specpass.methods.speckv import SpecKV as SpecKV
    from specpass.methods.speckvpc import SpecKVPC as SpecKVPC
    from specpass.methods.specpc import SpecPC as SpecPC
    from specpass.methods.streamingllm import StreamingLLM as StreamingLLM
    from specpass.observe.display import progress as progress
    from specpass.reports.report import report as report

# Names are looked up on first use, so that `import specpass` does not import torch. Methods are not listed: the
# registry finds them.
_HOME = {
    "compile": "specpass.backend.doors",
    "restore": "specpass.backend.doors",
    "Backend": "specpass.backend.compile",
    "BudgetCache": "specpass.cache",
    "Prefix": "specpass.cache.prefix",
    "read": "specpass.backend.prefix",
    "PromptCompressor": "specpass.backend.shorten",
    "Method": "specpass.methods.base",
    "export_onnx": "specpass.export.api",
    "progress": "specpass.observe.display",
    "report": "specpass.reports.report",
}


def _names() -> list[str]:
    from specpass.methods.registry import built_in

    return [*_HOME, *built_in(), "__version__"]


if not TYPE_CHECKING:  # a checker would take any name for one of these

    def __getattr__(name: str) -> Any:
        from specpass.methods.registry import built_in

        if name == "__all__":
            return _names()
        if name in _HOME:
            value = getattr(importlib.import_module(_HOME[name]), name)
        elif name in (methods := built_in()):
            value = methods[name]
        else:
            raise AttributeError(f"module 'specpass' has no attribute {name!r}")
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted(_names())
