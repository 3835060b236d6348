"""The operators that graphs hold between passes: declared here, implemented in specpass.ops.

Each file but `define` is a topic, found by looking, and has its namesake in specpass.ops.
"""

import importlib
import pkgutil

from specpass.dialect.define import NAMESPACE, OPERATORS, SPEC, Operator

__all__ = ["NAMESPACE", "OPERATORS", "SPEC", "TOPICS", "Operator"]

TOPICS = tuple(found.name for found in pkgutil.iter_modules(__path__) if found.name != "define")

for topic in TOPICS:
    importlib.import_module(f"{__name__}.{topic}")
