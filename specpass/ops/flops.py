"""Tell torch.utils.flop_counter the operators' FLOPs: it sees only whole operators.

A module of its own, imported where models are compiled: torch's counter imports Triton where that is installed.
"""

from __future__ import annotations

from torch.utils.flop_counter import flop_registry, register_flop_formula

from specpass.dialect import OPERATORS
from specpass.ops import IMPLEMENTATIONS


def register() -> None:
    """Once a process."""
    for name, implementation in IMPLEMENTATIONS.items():
        packet = OPERATORS[name].packet
        if implementation.flops is not None and packet not in flop_registry:
            register_flop_formula(packet)(implementation.flops)


register()
