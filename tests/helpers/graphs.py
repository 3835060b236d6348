"""Traced graphs of tiny models, and what passes make of them: where the tests of a pass start.

`Traced.before(name)` is a fresh copy of a traced graph that the passes in front of `name` have rewritten; traces.py has
the graphs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from support import padded
from tiny import prompt
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import specpass
from specpass.graph.edit import Editor, copy_module
from specpass.graph.operands import add_result
from specpass.passes.facts import Drafted
from specpass.passes.pipeline import PASSES
from specpass.rewrite import Facts, Kind, Pass, Pipeline, Request
from specpass.rewrite.verify import StageError

C, W, L = 24, 8, 4
SNAPKV, SPECKV = specpass.SnapKV(budget=C, window=W), specpass.SpecKV(budget=C, window=W, lookahead=L)
SPECPC = specpass.SpecPC(budget=C, window=W, lookahead=3, kernel=6, neighbours=5)

LENGTHS = (60, 43)
IDS, MASK = padded([prompt(length, seed=row + 1) for row, length in enumerate(LENGTHS)])
HANDLE = torch.zeros((), dtype=torch.int64)
KV_HEADS, WIDTH, ROOM = 2, 16, 64  # of tiny models; N
PARTS = ("key_buffer", "value_buffer", "lengths", "positions")  # of a layer of the cache


@dataclasses.dataclass
class State:
    """A graph between two passes. `results`: what it returns, by name; `given`: its model's real tensors, in order."""

    gm: fx.GraphModule
    request: Request
    facts: Facts
    results: list[str]
    given: Sequence[Tensor]

    def run(self, *inputs: Any) -> dict[str, Any]:
        """The graph interpreted on real inputs; the model's tensors, and an inserted draft's, follow by themselves."""
        drafted = self.facts.get(Drafted)
        lifted = () if drafted is None else drafted.lifted.values()
        with torch.no_grad():
            out = fx.Interpreter(self.gm).run(*inputs, *self.given, *lifted)
        results = [out] if isinstance(out, Tensor) else out
        return dict(zip(self.results, results, strict=True))

    def apply(self, *passes: Pass) -> State:
        """Run those of these passes that apply. Returns itself."""
        for item in passes:
            if self.request.kind in item.kinds and item.applies(self.request):
                alone(item, self)
        return self

    def returning(self, **nodes: fx.Node) -> State:
        """Let the graph return these nodes too. Returns itself."""
        for name, node in nodes.items():
            add_result(self.gm.graph, node)
            self.results.append(name)
        return self


@dataclasses.dataclass(frozen=True)
class Traced:
    """A traced graph, of which copies are made. `facts(placeholders)` are known of a copy before any pass."""

    gm: fx.GraphModule
    request: Request
    facts: Callable[[list[fx.Node]], Facts]
    results: tuple[str, ...]
    given: tuple[Tensor, ...]
    passes: tuple[Pass, ...] = PASSES

    def fresh(self) -> State:
        """A copy that no pass has seen."""
        gm = copy_module(self.gm)
        facts = self.facts(gm.graph.find_nodes(op="placeholder"))
        return State(gm, self.request, facts, list(self.results), self.given)

    def before(self, name: str) -> State:
        """A copy as the passes in front of `name` leave it."""
        return self.fresh().apply(*self.passes[: self._index(name)])

    def after(self, name: str) -> State:
        """A copy as the pass `name` leaves it."""
        return self.fresh().apply(*self.passes[: self._index(name) + 1])

    def _index(self, name: str) -> int:
        return [item.name for item in self.passes].index(name)


def alone(item: Pass, state: State, *, full_verify: bool = False) -> None:
    """One pass through a pipeline of its own; what its stage must hold in the end, other passes may have to bring."""

    class Rest(Pass):
        name = "the rest of the stage"

    pipeline = Pipeline((item, Rest()), entry=item.stage, skip=(Rest.name,), full_verify=full_verify)
    pipeline.run(state.gm, state.request, state.facts)


def check_contract(item: Pass, make: Callable[[], State], *also: type) -> State:
    """The pass runs with the facts that it `requires` and no others, not without one of them, and keeps its promises.

    Args: make: a state in front of the pass. also: facts that it reads only where they are known.
    Returns: the state behind the pass.
    """
    for missing in item.requires:
        state = make()
        rest = [state.facts[kind] for kind in item.requires if kind is not missing]
        with pytest.raises(StageError, match=f"{item.name} needs {missing.__name__}, which no pass before it has said"):
            Pipeline((item,), entry=item.stage).run(state.gm, state.request, Facts(*rest))
    state = make()
    state.facts = Facts(*(state.facts[kind] for kind in (*item.requires, *also)))
    alone(item, state, full_verify=True)
    assert all(kind in state.facts for kind in item.provides)
    return state


def assert_same(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float = 1e-5) -> None:
    """The same results under the same names."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(
            ours[name], value, atol=tolerance, rtol=tolerance, msg=lambda text, n=name: f"{n}: {text}"
        )


def stored(*used: int, slots: int = 40, layers: int = 1) -> list[Tensor]:
    """Caches of a step, a row's first `used` slots in use: keys, values [B, K * P, D], lengths [B, K] of each layer."""
    generator = torch.Generator().manual_seed(3)
    parts: list[Tensor] = []
    for _ in range(layers):
        parts += [torch.randn(len(used), KV_HEADS * slots, WIDTH, generator=generator) for _ in range(2)]
        parts.append(torch.tensor(used)[:, None].repeat(1, KV_HEADS))
    return parts


def by_head(storage: Tensor) -> Tensor:
    """Storage [B, K * P, D] as [B, K, P, D]."""
    return storage.unflatten(1, (KV_HEADS, -1))


def small_graph(function: Callable[..., Any], *inputs: Any, kind: Kind = "prefill", device: str = "cpu") -> State:
    """A graph that is no model's: `function` of tensors like `inputs`, which it may be run on."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        fakes = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in inputs]
        gm = make_fx(function, pre_dispatch=True)(*fakes)
    return State(gm, Request(kind), Facts(), [], ())


def insert(state: State, target: Any, *args: Any, before: fx.Node) -> fx.Node:
    """A call more, where a model might have one."""
    return Editor(state.gm).call(target, *args, before=before, like=before)
