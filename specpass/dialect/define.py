"""How an operator of specpass is declared: a schema, a fake kernel, and a view that names its operands.

    class CountKept(Operator, schema="count_kept(Tensor positions) -> Tensor"):
        \"\"\"[B] int64: used slots of positions [B, C].\"\"\"

        positions: fx.Node

        @staticmethod
        def fake(positions): return positions.new_empty(positions.shape[0])

What it computes is bound elsewhere (specpass.ops): passes name operators and read their operands, and need no more.
Operators stay opaque between passes so that passes can find them; none takes a module or a Python object.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from specpass.graph.operands import Operands, operand_names

NAMESPACE = "specpass"
SPEC = torch.ops.specpass
library = torch.library.Library(NAMESPACE, "DEF")
OPERATORS: dict[str, type[Operator]] = {}


class Operator(Operands):
    """A declared operator. Its class is the view of its calls; `packet` is what graphs call.

    Raises: TypeError: the annotated operands are not those of the schema.
    """

    schema: ClassVar[str]
    name: ClassVar[str]
    packet: ClassVar[Any]

    def __init_subclass__(cls, schema: str) -> None:
        cls.schema, cls.name = schema, schema.split("(")[0]
        if cls.name in OPERATORS:
            raise TypeError(f"{cls.__name__}: the operator {cls.name} is declared twice")
        library.define(schema)
        torch.library.register_fake(f"{NAMESPACE}::{cls.name}", cls.fake, lib=library)
        cls.packet = getattr(SPEC, cls.name)
        super().__init_subclass__(packets=[cls.packet])
        missing = operand_names(cls.packet) - cls.names
        if missing:
            raise TypeError(f"{cls.__name__}: the schema's operands {sorted(missing)} are not declared")
        OPERATORS[cls.name] = cls

    @staticmethod
    def fake(*args: Any) -> Any:
        """Results of the right shapes and dtypes, from fake tensors."""
        raise NotImplementedError
