"""What the operators of specpass.dialect compute: importing this package binds them.

An operator's file holds its reference in plain aten, its ONNX form where that is another, and its FLOPs.
"""

from specpass.ops import attention, cache, draft, prompt, rows, select
from specpass.ops.bind import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "attention", "cache", "draft", "prompt", "rows", "select"]
