"""What the tests of exported models share: a tiny pair, one method of each kind, PyTorch's answer."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
from support import compile_eager
from tiny import prompt, tiny
from transformers import PreTrainedModel

import specpass
from specpass import runtime

NEW = 8
BUDGET, WINDOW = 24, 8
PROMPTS = [prompt(70)[0].tolist(), prompt(45, seed=3)[0].tolist(), prompt(12, seed=4)[0].tolist()]  # the last fits C
SMALL = {"kernel": 5, "neighbours": 5}
METHODS: dict[str, Any] = {
    "speckv": specpass.SpecKV(budget=BUDGET, window=WINDOW, lookahead=4),
    "ngram": specpass.SpecKV(budget=BUDGET, window=WINDOW, lookahead="ngram"),
    "snapkv": specpass.SnapKV(budget=BUDGET, window=WINDOW),
    "pyramidkv": specpass.PyramidKV(budget=BUDGET, window=WINDOW),
    "streamingllm": specpass.StreamingLLM(budget=BUDGET),
    "specpc": specpass.SpecPC(budget=BUDGET, window=WINDOW, lookahead=3, **SMALL),
    "speckvpc": specpass.SpecKVPC(  # whose KV heads have budgets of their own: other cases have equal ones
        budget=16,
        window=WINDOW,
        lookahead=3,
        spread="heads",
        prompt_budget=32,
        prompt_window=WINDOW,
        prompt_kernel=5,
        neighbours=5,
    ),
    "none": None,
}


# Python code that makes imports of these fail, as where they are not installed.
BLOCK = """
import sys
class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "transformers", "onnx", "onnxscript", "sympy"):
            raise ImportError(f"{name} is blocked")
sys.meta_path.insert(0, Blocked())
"""


def pair(family: str, **settings: Any) -> tuple[PreTrainedModel, PreTrainedModel]:
    """(target of 2 layers unless told, draft of 1 layer)."""
    return tiny(family, **{"layers": 2, **settings}), tiny(family, **{**settings, "layers": 1}, seed=5)


@dataclasses.dataclass(frozen=True)
class Case:
    """An export, opened, and its models."""

    folder: Path
    model: runtime.Runtime
    target: PreTrainedModel
    draft: PreTrainedModel | None
    method: Any


def make(folder: Path, family: str = "llama", method: str = "speckv", **settings: Any) -> Case:
    how = METHODS[method]
    target, draft = pair(family, **settings)
    small = draft if how is not None and how.needs_draft else None
    specpass.export_onnx(target, small, how, folder)
    return Case(folder, runtime.load(folder, threads=1), target, small, how)


def check_equal_to_torch(case: Case, prompts: list[list[int]] = PROMPTS, new: int = NEW) -> None:
    """Tokens, kept positions, lookahead and tokens read: PyTorch's, prompt by prompt."""
    if case.method is not None:
        compile_eager(case.target, case.method, case.draft)
    for own in prompts:
        # Made without max_new_tokens, so that a lookahead whose length nobody named is the export's.
        cache = None if case.method is None else specpass.BudgetCache(case.target.config, case.method)
        theirs = case.target.generate(
            torch.tensor([own]),
            past_key_values=cache,
            max_new_tokens=new,
            do_sample=False,
            return_dict_in_generate=True,
        )
        assert case.model.generate([own], max_new_tokens=new) == theirs.sequences[:, len(own) :].tolist()
        if case.method is not None:
            check_cache(case.model.state, theirs.past_key_values)


def check_cache(state: Any, cache: Any) -> None:
    assert len(state.positions) == len(cache.layers)
    for ours, layer in zip(state.positions, cache.layers, strict=True):
        for head, other in zip(ours[0], layer.positions[0].numpy(), strict=True):
            np.testing.assert_array_equal(head[head >= 0], other[other >= 0])
            assert (head[(head >= 0).sum() :] == -1).all(), "unused slots come last"
    if cache.lookahead_ids is not None:
        np.testing.assert_array_equal(state.lookahead_ids, cache.lookahead_ids.numpy())
    if cache.prompt_positions is not None:
        read = state.prompt_positions[0], cache.prompt_positions[0].numpy()
        np.testing.assert_array_equal(*(positions[positions >= 0] for positions in read))
