"""What a pass is: a frozen dataclass with a name, the stage that it belongs to, and a contract that is checked."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, ClassVar, Literal, get_args

from torch import fx

from specpass.errors import SpecpassError
from specpass.rewrite.facts import Facts

if TYPE_CHECKING:
    from specpass.methods.base import Method

# What a graph does: reads a prompt and prunes it, reads one that fits the budget, writes one token, or several.
Kind = Literal["prefill", "short", "decode", "append"]
PROMPTS: tuple[Kind, ...] = ("prefill", "short")
STEPS: tuple[Kind, ...] = ("decode", "append")


class Refusal(Exception):
    """A pass met something that it does not understand; the model runs exactly and the report says why."""

    def __init__(self, reason: str, module: str = "") -> None:
        super().__init__(f"{module}: {reason}" if module else reason)
        self.reason, self.module = reason, module


class Unspliced(Refusal):
    """A refusal of a graph, and not of the model, some of whose attention is understood: around its own forward that
    part can be pruned (the second way), though nothing can be put in front of it, or a neighbour has to stay exact."""


@dataclasses.dataclass(frozen=True)
class Request:
    """What is asked of a graph; the same for all passes.

    Args:
        method: None where nothing is pruned: a draft's own graphs, an exact export.
        lookahead: L tokens that stand behind the prompt; 0 without a lookahead.
        eos_ids: of the draft: rows behind a sequence's end do not score.
        goes_on: the draft's caches are wanted too, from which it goes on behind its lookahead (speculate) or the answer
            (evict="lookahead").
        verify: the logits behind the lookahead, and its keys and values, are wanted too (verified lookahead).
        model: whose graph it is.
    """

    kind: Kind
    method: Method | None = None
    lookahead: int = 0
    eos_ids: tuple[int, ...] = ()
    verify: bool = False
    goes_on: bool = False
    model: Literal["target", "draft"] = "target"

    @property
    def pruning(self) -> Method:
        """The method of a request that prunes."""
        if self.method is None:
            raise SpecpassError(f"this {self.kind} graph is not pruned, so no method says how: a bug of specpass")
        return self.method

    @property
    def compresses(self) -> bool:
        """Whether the target reads only a part of the prompt (SpecPC)."""
        return self.method is not None and self.method.prompt is not None


@dataclasses.dataclass(frozen=True)
class Pass:
    """Valid graph in, valid graph out.

    Attributes:
        name: a verb and what it does it to; `skip_passes` and dumps know the pass by it.
        stage: what the graph is once the stage's last pass has run: TRACED, DRAFTED, PRUNED or LOWERED.
        kinds: graphs that it runs on.
        requires: facts that it reads; those that it reads only where they are known are not named.
        provides: facts that are known once it has run.
    """

    name: ClassVar[str] = ""
    stage: ClassVar[str] = ""
    kinds: ClassVar[tuple[Kind, ...]] = get_args(Kind)
    requires: ClassVar[tuple[type, ...]] = ()
    provides: ClassVar[tuple[type, ...]] = ()

    def applies(self, request: Request) -> bool:
        """Whether there is something to do for a request of one of `kinds`."""
        return True

    def run(self, gm: fx.GraphModule, request: Request, facts: Facts) -> None:
        """Rewrite `gm` in place and add to `facts`.

        Raises: Refusal: something is not understood; the graph is thrown away.
        """
        raise NotImplementedError(type(self).__name__)
