"""What a pass is: a frozen dataclass with a name, a stage that it leaves the graph in, and a contract."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

from torch import Tensor, fx

from specpass.errors import SpecpassError
from specpass.methods.base import Method


class Refusal(Exception):
    """A pass met something that it does not understand; the model runs exactly and the report says why."""

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(f"{module}: {reason}" if module else reason)
        self.reason, self.module = reason, module


@dataclasses.dataclass
class Site:
    """One attention site of the target.

    `query` [B, H, T, D], `key` [B, K, T, D], `value` [B, K, T, Dv] as attention reads them, `cache` the fill or
    append_kv node, `attention` the attention node, `mask` its mask's class, `scale` the softmax scale, `softcap` and
    `sinks` [H] what else is done to its logits.
    """

    layer: int
    module: str
    query: fx.Node
    key: fx.Node
    value: fx.Node
    cache: fx.Node
    attention: fx.Node
    scale: float
    mask: str
    softcap: float = 0.0
    sinks: fx.Node | None = None
    budget: int = 0
    positions: fx.Node | None = None
    scores: fx.Node | None = None

    @property
    def changes(self) -> tuple[Any, ...]:
        """Last arguments of an attention operator; none where nothing is done to the logits."""
        return (self.softcap, self.sinks) if self.softcap or self.sinks is not None else ()

    @property
    def kv_heads(self) -> int:
        return int(self.key.meta["val"].shape[1])


@dataclasses.dataclass
class State:
    """What passes hand to each other besides the graph."""

    kind: str  # "prefill", "short" (a prompt that fits the budget), "decode", "append"
    method: Method
    draft: Any = None  # specpass.capture.DraftGraphs or None
    lookahead: int = 0
    eos_ids: tuple[int, ...] = ()
    sites: list[Site] = dataclasses.field(default_factory=list)
    inputs: dict[str, fx.Node] = dataclasses.field(default_factory=dict)  # input_ids, attention_mask, position_ids
    weights: dict[fx.Node, Tensor] = dataclasses.field(default_factory=dict)  # the target's, by placeholder
    lengths: fx.Node | None = None  # [B] prompt lengths without padding
    order: fx.Node | None = None  # [B, S] packing order, None without a padding mask
    anchor: fx.Node | None = None  # the target's first own node: what is inserted ahead of the target stands before it
    lookahead_ids: fx.Node | None = None
    prompt_scores: fx.Node | None = None  # [B, S] the draft's attention to each prompt token
    prompt_positions: fx.Node | None = None  # [B, C] prompt tokens that the target reads; None where it reads all
    lifted: dict[str, Any] = dataclasses.field(default_factory=dict)  # placeholder -> draft tensor
    notes: list[str] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(frozen=True)
class Pass:
    """Valid graph in, valid graph out. `kinds` says which graphs it runs on."""

    name: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    kinds: ClassVar[tuple[str, ...]] = ("prefill", "short", "decode", "append")

    def run(self, gm: fx.GraphModule, state: State) -> None:
        raise SpecpassError(f"pass {type(self).__name__} does not say what it does")
