"""The methods of the quality benchmark: what each is, at which budgets it runs, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from specpass.benchmarks import methods
from specpass.benchmarks.methods import LOOKAHEAD
from specpass.errors import BenchmarkError
from specpass.methods.base import Method

FULL, DRAFT, ORACLE = "full", "draft", "specpass_oracle"
# method -> (budgets, the first being the one of longer prompts; None: no budget). KV slots of each KV head and layer;
# prompt tokens for SpecPC. In order of importance: a run that is cut off has the first ones.
GRID: dict[str, tuple[int | float | None, ...]] = {
    FULL: (None,),
    DRAFT: (None,),
    "specpass_speckv": (256, 64),
    "specpass_snapkv": (256, 64),
    "kvpress_snapkv": (256, 64),
    "kvpress_adakv_snapkv": (256, 64),
    "kvpress_expected_attention": (256, 64),
    "specpass_specpc": (1024, 512),
    "specpass_streamingllm": (256, 64),
    ORACLE: (256, 64),
    "specpass_speckvpc": (256, 64),
    "specpass_pyramidkv": (256, 64),
    "kvpress_kvzip": (256, 64),
    "kvpress_criticaladakv_snapkv": (256, 64),
    "kvpress_keydiff": (256, 64),
}
PRESETS: dict[str, tuple[int | float | None, ...]] = {
    "specpass_best": (256, 64),
    "specpass_bestpc": (1024, 512),
    "specpass_bestkvpc": (256, 64),
}  # if asked for
BUDGETS = (256, 64)  # of a method that is not in the grid


@dataclass(frozen=True)
class Variant:
    """A method at one budget: slots (prompt tokens for SpecPC), or a ratio of the prompt."""

    method: str
    budget: int | float | None

    @property
    def label(self) -> str:
        return self.method if self.budget is None else f"{self.method} {self.budget}"

    @property
    def is_peer(self) -> bool:
        return self.method.startswith("kvpress_")

    def specpass_method(self) -> Method:
        """The method; an oracle is SpecKV, told the answer.

        Raises: BenchmarkError: it is none of specpass's.
        """
        assert self.budget is not None
        return methods.make("specpass_speckv" if self.method == ORACLE else self.method, self.budget)

    def work(self, length: int, new_tokens: int, draft_share: float) -> float:
        """About what a prompt costs, in tokens that the target reads.

        Args: draft_share: the draft's parameters over the target's.
        """
        step = 30.0  # a decode step reads the weights; a prefill does as many FLOPs in so many tokens on a CPU
        drafted = draft_share * (length + step * LOOKAHEAD / 2)
        if self.method == DRAFT:
            return drafted + step * new_tokens / 2 * draft_share
        total = length + step * new_tokens / 2
        if self.method == "kvpress_kvzip":
            total += 2 * length
        if self.method in (FULL, ORACLE) or self.is_peer:
            return total
        method = self.specpass_method()
        if method.prompt is not None:
            budget = method.prompt.budget
            assert not isinstance(budget, str), "the prompt's is never chosen"
            total -= max(0, length - (budget * length if isinstance(budget, float) else budget))
        return total + (drafted if method.needs_draft else 0)


def known() -> tuple[str, ...]:
    """The grid's methods, and then those that are not in it: new ones, and users' own."""
    return tuple(dict.fromkeys([*GRID, *methods.names()]))


def variants(names: Iterable[str], rounds: Sequence[int], budgets: Sequence[int | float] = ()) -> list[Variant]:
    """Variants of these methods in the grid's order: all at the first of `rounds` (numbers in its lists), then on.

    Args: budgets: in the place of the grid's, whatever `rounds` says.

    Raises: BenchmarkError: an unknown method, naming the known ones; no budget. BudgetError: none of a method's.
    """
    chosen, there = list(names), (*known(), *PRESETS)
    for name in chosen:
        if name not in there:
            raise BenchmarkError(f"{name!r} is not a method of this benchmark. Known: {', '.join(there)}.")
    of = {name: (GRID | PRESETS).get(name, BUDGETS) for name in there if name in chosen}
    if budgets:
        of |= {name: tuple(budgets) for name, own in of.items() if own != (None,)}
        rounds = range(len(budgets))
    every = [Variant(name, own[min(index, len(own) - 1)]) for index in rounds for name, own in of.items()]
    found = list(dict.fromkeys(every))
    for variant in found:
        budget = variant.budget
        if variant.is_peer and (not budget or budget < 0 or (isinstance(budget, float) and budget > 1)):
            raise BenchmarkError(f"budget {budget}: expected a number of slots, or a ratio in (0, 1].")
        if variant.method.startswith(methods.PREFIX):
            variant.specpass_method()
    return found
