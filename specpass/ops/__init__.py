"""What the operators of specpass.dialect compute: importing this package binds them.

A topic's file holds its operators' references in plain aten, their ONNX forms where those are others, and their FLOPs.
"""

import importlib

from specpass.dialect import TOPICS
from specpass.files import libraries_dir, tiles_dir, write_file
from specpass.kernels import store
from specpass.kernels.cpu import build
from specpass.ops.bind import IMPLEMENTATIONS

__all__ = ["IMPLEMENTATIONS"]

for topic in TOPICS:
    importlib.import_module(f"{__name__}.{topic}")

store.use(folder=tiles_dir, write=write_file)
build.use(folder=libraries_dir)
