"""The methods of the quality benchmark: what each is, at which budgets it runs, and in which order."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from specpass.errors import BenchmarkError

WINDOW, LOOKAHEAD = 32, 32
FULL, DRAFT, ORACLE = "full", "draft", "specpass_oracle"
# method -> (budgets, the first being the one of longer prompts; None: no budget). KV slots of each KV head and layer;
# prompt tokens for SpecPC. In order of importance: a run that is cut off has the first ones.
GRID: dict[str, tuple[int | None, ...]] = {
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
}
PROMPT_BUDGET = 1024  # SpecKV-PC: prompt tokens that the target reads


@dataclass(frozen=True)
class Variant:
    """A method at one budget."""

    method: str
    budget: int | None

    @property
    def label(self) -> str:
        return self.method if self.budget is None else f"{self.method} {self.budget}"

    @property
    def is_peer(self) -> bool:
        return self.method.startswith("kvpress_")

    def specpass_method(self) -> Any:
        """The specpass.Method; an oracle is SpecKV, told the answer."""
        import specpass

        budget = self.budget
        assert budget is not None
        if self.method == "specpass_streamingllm":
            return specpass.StreamingLLM(budget=budget)
        if self.method == "specpass_snapkv":
            return specpass.SnapKV(budget=budget, window=WINDOW)
        if self.method == "specpass_pyramidkv":
            return specpass.PyramidKV(budget=budget, window=WINDOW)
        if self.method == "specpass_specpc":
            return specpass.SpecPC(budget=budget)
        if self.method == "specpass_speckvpc":
            return specpass.SpecKVPC(budget=budget, window=WINDOW, lookahead=LOOKAHEAD, prompt_budget=PROMPT_BUDGET)
        return specpass.SpecKV(budget=budget, window=WINDOW, lookahead=LOOKAHEAD)

    def work(self, length: int, new_tokens: int, draft_share: float) -> float:
        """About what a prompt costs, in tokens that the target reads.

        Args: draft_share: the draft's parameters over the target's.
        """
        step = 30.0  # a decode step reads the weights; a prefill does as many FLOPs in so many tokens on a CPU
        drafted = draft_share * (length + step * LOOKAHEAD / 2)
        read = {DRAFT: 0, "specpass_specpc": self.budget, "specpass_speckvpc": PROMPT_BUDGET}.get(self.method, length)
        total = min(read or 0, length) + step * new_tokens / 2 * (draft_share if self.method == DRAFT else 1)
        if self.method == "kvpress_kvzip":
            total += 2 * length
        drafts = self.method in (DRAFT, "specpass_speckv", "specpass_specpc", "specpass_speckvpc")
        return total + (drafted if drafts else 0)


def variants(methods: Iterable[str], budgets: Sequence[int]) -> list[Variant]:
    """The grid's variants of these methods: all at the first of `budgets` (numbers in GRID's lists), then at the next.

    Raises: BenchmarkError: an unknown method, naming the known ones.
    """
    chosen = list(methods)
    for name in chosen:
        if name not in GRID:
            raise BenchmarkError(f"{name!r} is not a method of this benchmark. Known: {', '.join(GRID)}.")
    rounds = [
        [Variant(name, GRID[name][min(index, len(GRID[name]) - 1)]) for name in GRID if name in chosen]
        for index in budgets
    ]
    return list(dict.fromkeys(variant for found in rounds for variant in found))
