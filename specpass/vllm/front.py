"""The step in front of the engine: a prompt's token ids become fewer, in one thread, first come first served."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from specpass.backend.shorten import PromptCompressor
from specpass.methods.registry import FULL
from specpass.vllm.asked import CURRENT, XARG, Asked

BEAMS = "beam search"
BEAM = re.compile(r"-beam-\d+$")  # of the requests that vLLM makes of one with beam search


class Front:
    """Args: least: prompts of fewer tokens are left alone."""

    def __init__(self, compressor: PromptCompressor, least: int) -> None:
        self.compressor, self.least = compressor, least
        self.thread = ThreadPoolExecutor(1, "specpass")

    async def shorten(self, prompt: Any, params: Any, request_id: str) -> Any:
        """The engine's input with fewer token ids, or the same object.

        A client that hangs up before its turn comes costs nothing: its place in the thread's queue is given up.

        Raises: SpecpassError: what the request chose is wrong, or the draft cannot read so much.
        """
        current = CURRENT.get()
        asked = (current or Asked()).but(getattr(params, "extra_args", None) or {}, XARG)
        tally = current or asked
        ids = prompt.get("prompt_token_ids") if isinstance(prompt, Mapping) else None
        reason = why_whole(prompt, params, request_id)
        if ids is None or reason or asked.method == FULL or len(ids) < self.least:
            if reason != BEAMS or not tally.read:  # each of its steps is a request of its own
                tally.read += len(ids or ())
            tally.whole = tally.whole or reason
            return prompt
        loop = asyncio.get_running_loop()
        kept = (await loop.run_in_executor(self.thread, self.compressor, ids, asked.budget)).ids
        tally.read += len(kept)
        if len(kept) == len(ids):
            return prompt
        return {name: value for name, value in prompt.items() if name != "prompt_token_offsets"} | {
            "prompt_token_ids": kept
        }


def why_whole(prompt: Any, params: Any, request_id: str) -> str:
    """Why a prompt cannot be shortened; "" where it can."""
    kind = prompt.get("type", "token") if isinstance(prompt, Mapping) else type(prompt).__name__
    if kind != "token":
        return f"a prompt of {kind}, not of tokens alone"
    if getattr(params, "prompt_logprobs", None) is not None:
        return "log-probabilities of its tokens are asked for"
    if getattr(params, "detokenize", True) is False and BEAM.search(request_id):
        return BEAMS
    return ""
