"""What `specpass tune` tunes: the kernels that a method launches, in the shapes of a target's and its draft's config.

Shapes come from tensors without data, as the launcher makes them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from specpass.methods.base import Method

if TYPE_CHECKING:
    import torch

    from specpass.kernels.tuner import Job


@dataclasses.dataclass(frozen=True)
class Layer:
    """Sizes of one attention layer: batch B, query heads H, KV heads K, head dimension D."""

    batch: int
    heads: int
    kv_heads: int
    dim: int
    dtype: str

    @classmethod
    def of(cls, config: Any, batch: int, dtype: str) -> Layer:
        """From a Hugging Face config."""
        text = config.get_text_config(decoder=True)
        heads = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        return cls(batch, heads, kv_heads, getattr(text, "head_dim", None) or text.hidden_size // heads, dtype)

    def queries(self, count: int) -> torch.Tensor:
        """[B, H, count, D]"""
        return self._empty(self.heads, count)

    def keys(self, count: int) -> torch.Tensor:
        """[B, K, count, D]"""
        return self._empty(self.kv_heads, count)

    def _empty(self, heads: int, count: int) -> torch.Tensor:
        import torch

        return torch.empty(self.batch, heads, count, self.dim, dtype=getattr(torch, self.dtype), device="meta")


def target_jobs(
    layer: Layer, layers: int, method: Method, arch: str, prompt: int, lookahead: int, room: int
) -> list[Job]:
    """The target's own: importance where the method scores, gather and decode attention of each budget."""
    from specpass.kernels import launch
    from specpass.kernels.tuner import Job

    read = prompt if method.prompt is None else min(prompt, int(method.prompt.budget))
    columns = read + (lookahead if method.appends else 0)
    jobs = []
    if method.scored:
        rows = method.window + columns - read
        scored = launch.score_shapes(layer.queries(rows), layer.keys(columns), method.window, method.reduce)
        jobs += [Job("importance", scored, arch), Job("importance_given_lse", scored, arch)]
    for budget in sorted(set(method.layer_budgets(layers))):
        slots = layer.keys(budget + room)
        decode = launch.decode_shapes(layer.queries(1), slots, slots)
        jobs += [
            Job("gather", launch.gather_shapes(layer.keys(columns), layer.keys(columns), budget, room), arch),
            Job("decode", decode, arch),
            Job("decode_append", decode, arch),
        ]
    return jobs


def draft_jobs(layer: Layer, method: Method, arch: str, prompt: int, lookahead: int) -> list[Job]:
    """The draft's: attention of its steps over the whole prompt, and the scores of prompt tokens (SpecPC)."""
    from specpass.kernels import launch
    from specpass.kernels.tuner import Job

    if not method.drafts:
        return []
    slots, jobs = layer.keys(prompt + lookahead), []
    if lookahead > 1:
        jobs.append(Job("decode_append", launch.decode_shapes(layer.queries(1), slots, slots), arch))
    how = method.prompt
    if how is not None:
        reduce = "max" if how.reduce == "max" else "sum"
        window = launch.score_shapes(layer.queries(how.window), layer.keys(prompt), 0, reduce, weighted=True)
        jobs += [Job("importance", window, arch), Job("importance_given_lse", window, arch)]
        if lookahead > 1:
            jobs.append(Job("importance", launch.score_shapes(layer.queries(1), slots, 0, reduce), arch))
    return jobs
