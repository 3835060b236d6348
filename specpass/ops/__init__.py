"""What the operators of specpass.dialect compute: importing this package binds them.

An operator's file holds its reference in plain aten, its ONNX form where that is another, and its FLOPs.
"""

from specpass.files import tiles_dir, write_file
from specpass.kernels import store
from specpass.ops import attention, cache, draft, prompt, rows, select
from specpass.ops.bind import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS", "attention", "cache", "draft", "prompt", "rows", "select"]

store.use(folder=tiles_dir, write=write_file)
