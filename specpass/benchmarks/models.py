"""The pair of models, loaded when first asked for, and greedy answers from them."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from specpass.benchmarks.methods import LOOKAHEAD
from specpass.benchmarks.quality.variants import DRAFT, FULL, ORACLE, Variant
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.errors import BenchmarkError


@dataclass
class Pair:
    """Target and draft by name; `lowering` as in specpass.compile; `trust`: code that they bring along may run."""

    target_name: str
    draft_name: str
    dtype: str = "bfloat16"
    device: str = "cpu"
    lowering: str = "inductor"
    trust: bool = False
    loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def _load(self, name: str) -> Any:
        from specpass import hub

        if name not in self.loaded:
            model, tokenizer = hub.load(name, self.dtype, trust_remote_code=self.trust)
            self.loaded[name] = model.requires_grad_(False).to(self.device), tokenizer
        return self.loaded[name]

    @property
    def target(self) -> Any:
        return self._load(self.target_name)[0]

    @property
    def draft(self) -> Any:
        return self._load(self.draft_name)[0]

    @functools.cached_property
    def tokenizer(self) -> Any:
        return load_tokenizer(self.target_name, self.trust)

    @functools.cached_property
    def draft_share(self) -> float:
        """The draft's parameters over the target's, by their files' sizes: nothing is loaded."""
        draft, target = (weight_bytes(name) for name in (self.draft_name, self.target_name))
        return draft / target


def load_tokenizer(name: str, trust_remote_code: bool = False) -> Any:
    from specpass import hub

    return hub.load_tokenizer(name, trust_remote_code=trust_remote_code)


def weight_bytes(name: str) -> int:
    """Bytes of a model folder's weight files."""
    from specpass import hub

    return sum(path.stat().st_size for path in Path(hub.model_path(name)).glob("*.safetensors")) or 1


def label(name: str) -> str:
    """How a result file names a model: a folder or file by its last part, so that no machine's paths are in it."""
    return Path(name).name if Path(name).exists() else name


@dataclass(frozen=True)
class Answer:
    """What one variant wrote for one prompt.

    `seconds` from the prompt to the last token, compilation included; `kept` slots per KV head and layer, where a peer
    counted them.
    """

    variant: Variant
    prompt: Prompt
    tokens: list[int]
    seconds: float
    kept: float | None = None


def generate(model: Any, prompt: Prompt, new_tokens: int, pad: int, **given: Any) -> list[int]:
    """New token ids, greedy, without the penalties that a model's own settings may hold."""
    import torch

    ids = torch.tensor([prompt.ids], device=model.device)
    with torch.no_grad():
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            do_sample=False,
            temperature=None,
            top_p=None,
            top_k=None,
            repetition_penalty=1.0,
            pad_token_id=pad,
            **given,
        )
    return out[0, ids.shape[1] :].tolist()


def answers(pair: Pair, variant: Variant, work: Iterable[tuple[Prompt, int]], full: Any) -> Iterator[Answer]:
    """Answers to (prompt, new tokens) pairs, one by one; one compilation serves them all.

    Args: full: prompt -> tokens of the answer with full KV, which the oracle is told.

    Raises: BenchmarkError: the model would run unpruned.
    """
    import specpass

    pad = pair.tokenizer.pad_token_id or 0
    plain = {FULL: "target", DRAFT: "draft"}.get(variant.method)
    if plain:
        for prompt, new_tokens in work:
            start = time.perf_counter()
            tokens = generate(getattr(pair, plain), prompt, new_tokens, pad)
            yield Answer(variant, prompt, tokens, time.perf_counter() - start)
        return
    method = variant.specpass_method()
    draft = pair.draft if method.needs_draft else None
    model = specpass.compile(pair.target, draft=draft, method=method, lowering=pair.lowering)
    try:
        for prompt, new_tokens in work:
            start, given = time.perf_counter(), {}
            if prompt.agnostic:
                given["past_key_values"] = read_context(model, method, prompt, new_tokens)
            if variant.method == ORACLE:
                rows = told(full(prompt), model.generation_config.eos_token_id, pad)
                given["past_key_values"] = specpass.BudgetCache(
                    model.config, method, max_new_tokens=new_tokens, lookahead_ids=rows
                )
            tokens = generate(model, prompt, new_tokens, pad, **given)
            refusals = list(specpass.report(model).refusals)
            if refusals:
                raise BenchmarkError(f"{pair.target_name} would run unpruned ({refusals[0]}): choose another --target.")
            yield Answer(variant, prompt, tokens, time.perf_counter() - start)
    finally:
        specpass.restore(model)


def read_context(model: Any, method: Any, prompt: Prompt, new_tokens: int) -> Any:
    """A cache of the prompt's context alone, pruned before anything is asked."""
    import torch

    import specpass

    ids = torch.tensor([prompt.ids[: prompt.seen]], device=model.device)
    behind = len(prompt.ids) - prompt.seen + new_tokens
    cache = specpass.BudgetCache(model.config, method, max_new_tokens=behind, prompt_length=prompt.seen)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=torch.ones_like(ids), past_key_values=cache, logits_to_keep=1)
    return cache


def told(answer: list[int], eos: Any, pad: int) -> list[list[int]]:
    """An answer as lookahead ids [1, L]: cut, or ended and padded."""
    if len(answer) >= LOOKAHEAD:
        return [answer[:LOOKAHEAD]]
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    if ends and not set(answer) & set(ends):
        answer = [*answer, ends[0]]
    return [answer + [pad] * (LOOKAHEAD - len(answer))]
