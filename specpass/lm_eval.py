"""`python -m specpass.lm_eval`: lm-evaluation-harness with pruned models, as `--model specpass`.

    python -m specpass.lm_eval --model specpass --tasks TASK \\
        --model_args target=qwen2.5-coder-1.5b,draft=qwen2.5-coder-0.5b,method=speckv,budget=256

The harness finds models of its own by name and asks no other package for more, so that this module registers one and
then is the harness's command line, with all of its options.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import specpass
from specpass.cli.options import choose, load_pair
from specpass.errors import HarnessMissingError, UnsupportedCallError
from specpass.methods.base import Method

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise HarnessMissingError(
        f"lm-evaluation-harness cannot be imported ({error}): pip install 'specpass[lm_eval]'", name="lm_eval"
    ) from error

Request = tuple[Any, list[int], list[int]]  # texts (the harness's key), context and continuation as token ids
Scored = tuple[float, bool]  # log-likelihood of a continuation, and whether greedy decoding says it


@register_model("specpass")
class PrunedLM(HFLM):
    """A target that is pruned wherever a task has a prompt.

    Args:
        target, draft: as the command line takes them: a name, hub id, folder or GGUF file.
        method: by name; "full" is the uncompiled model, to compare with.
        budget: KV slots, a ratio of the prompt, or "auto".
        dtype, lowering, speculate, revision, trust_remote_code: as on the command line.
        device: "cpu" or "cuda"; None: CUDA where there is any.
        batch_size, max_batch_size, max_length, add_bos_token, prefix_token_id, truncation: the harness's own.
        options: fields of the method, such as window=16.

    Raises: what the command line raises for a wrong name or option.
    """

    def __init__(
        self,
        target: str,
        draft: str | None = None,
        method: str = "speckv",
        budget: str | int | float = "1024",
        *,
        dtype: str = "auto",
        lowering: str = "inductor",
        speculate: int = 0,
        revision: str | None = None,
        trust_remote_code: bool = False,
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int = 64,
        max_length: int | None = None,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        truncation: bool = False,
        **options: Any,
    ) -> None:
        fields = [f"{name}={value}" for name, value in options.items()]
        choice = choose(
            target, draft, method, str(budget), None, None, fields, dtype, lowering, revision, trust_remote_code
        )
        choice = dataclasses.replace(choice, speculate=speculate)
        model, self.draft, tokenizer = load_pair(choice, device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.choice = choice
        super().__init__(
            pretrained=model,
            tokenizer=tokenizer,
            batch_size=batch_size,
            max_batch_size=max_batch_size,
            max_length=max_length,
            add_bos_token=add_bos_token,
            prefix_token_id=prefix_token_id,
            truncation=truncation,
        )

    def loglikelihood_rolling(self, requests: Any, disable_tqdm: bool = False) -> list[float]:
        """Raises: UnsupportedCallError: a text is scored from its first token on, and there is no prompt to prune."""
        if self.choice.method is None:
            return super().loglikelihood_rolling(requests, disable_tqdm)
        raise UnsupportedCallError(
            f"loglikelihood_rolling with method={self.choice.method.name}: every token of the text is scored, so that "
            "none is a prompt and nothing would be pruned. Leave the task out, or take method=full."
        )

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, **options: Any
    ) -> list[Scored]:
        """The context is a prompt, read and pruned once for all of its continuations; each is then told and scored."""
        if self.choice.method is None:
            return super()._loglikelihood_tokens(requests, disable_tqdm, **options)
        found: list[Scored] = [(0.0, False)] * len(requests)
        order = sorted(range(len(requests)), key=lambda index: self._context(requests[index]))
        for context, group in itertools.groupby(order, key=lambda index: self._context(requests[index])):
            same = list(group)
            scored = self._score(self.choice.method, context, [requests[index][2] for index in same])
            for index, result in zip(same, scored, strict=True):
                found[index] = result
                if requests[index][0] is not None:
                    self.cache_hook.add_partial("loglikelihood", requests[index][0], result)
        return found

    def _context(self, request: Request) -> list[int]:
        """A request's context, cut on the left where model and continuation leave no room for all of it."""
        _, context, continuation = request
        return context[-max(1, self.max_length - len(continuation) + 1) :]

    @torch.no_grad()
    def _score(
        self, method: Method, context: Sequence[int], continuations: Sequence[Sequence[int]]
    ) -> Iterator[Scored]:
        cache = specpass.BudgetCache(self.model.config, method, prompt_length=len(context))
        first = self.model(input_ids=self._ids(context), past_key_values=cache, logits_to_keep=1).logits[:, -1:]
        for tokens in continuations:
            logits = first
            if len(tokens) > 1:  # each goes on from the prompt as it was left
                told = self.model(input_ids=self._ids(tokens[:-1]), past_key_values=copy.deepcopy(cache)).logits
                logits = torch.cat([first, told], 1)
            ids = self._ids(tokens)
            likely = F.log_softmax(logits.float(), -1).gather(2, ids[..., None])
            yield float(likely.sum()), bool((logits.argmax(-1) == ids).all())

    def _ids(self, tokens: Sequence[int]) -> Tensor:
        return torch.tensor([list(tokens)], device=self.device)

    def get_model_info(self) -> dict[str, Any]:
        """The harness's, and what pruned the model: it stands in result files."""
        return {**super().get_model_info(), "target": self.choice.target, "specpass": self.choice.label}


if __name__ == "__main__":
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
