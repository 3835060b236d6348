"""How an operator of specpass is declared: a schema, a fake kernel, and a view that names its operands.

    class CountKept(Operator, schema="count_kept(Tensor positions) -> Tensor"):
        \"\"\"[B] int64: used slots of positions [B, C].\"\"\"

        positions: fx.Node

        @staticmethod
        def fake(positions): return positions.new_empty(positions.shape[0])

What it computes is bound elsewhere (specpass.ops): passes name operators and read their operands, and need no more.
Operators stay opaque between passes so that passes can find them; none takes a module or a Python object. `since` and
`until` are the stages of a graph that may hold the operator, both ends included.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import fx

from specpass.graph.operands import Operands, operand_names

NAMESPACE = "specpass"
SPEC = torch.ops.specpass
library = torch.library.Library(NAMESPACE, "DEF")
OPERATORS: dict[str, type[Operator]] = {}
ORDER = ("TRACED", "DRAFTED", "PRUNED", "LOWERED")  # the stages of a graph


class Operator(Operands):
    """A declared operator. Its class is the view of its calls; `packet` is what graphs call.

    Raises: TypeError: the annotated operands are not those of the schema.
    """

    schema: ClassVar[str]
    name: ClassVar[str]
    packet: ClassVar[Any]
    since: ClassVar[str]
    until: ClassVar[str]

    def __init_subclass__(cls, schema: str, since: str = ORDER[0], until: str = ORDER[-1]) -> None:
        cls.schema, cls.name, cls.since, cls.until = schema, schema.split("(")[0], since, until
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


def operator_name(node: fx.Node) -> str:
    """`select` of a call of specpass::select."""
    return node.target._schema.name.split("::")[1]
