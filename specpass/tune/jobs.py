"""What `specpass tune` tunes: the kernels that a method launches, in the shapes of a target's and its draft's config.

Shapes come from operands without data, as the operators meet them.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from specpass.methods.base import Method

if TYPE_CHECKING:
    import torch

    from specpass.kernels.archs import Arch
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

    def importance(
        self, rows: int, columns: int, window: int, reduce: str, weighted: bool = False
    ) -> list[dict[str, Any]]:
        """Operands of `importance`, without the rows' log-sum-exp and with it."""
        operands = {
            "query": self._empty(self.heads, rows),
            "key": self._empty(self.kv_heads, columns),
            "window": window,
            "reduce": reduce,
            "weights": _empty("float32", rows) if weighted else None,
            "softcap": 0.0,
            "sinks": None,
        }
        return [operands | {"lse": lse} for lse in (None, _empty("float32", self.batch, self.heads, rows))]

    def reconstruction(self, rows: int, columns: int, window: int, reduce: str) -> dict[str, Any]:
        """Operands of `reconstruction`."""
        operands = self.importance(rows, columns, window, reduce)[0]
        shared = ("query", "key", "window", "reduce", "softcap", "sinks")
        return {name: operands[name] for name in shared} | {"value": operands["key"]}

    def prefill_attention_sparse(self, columns: int, read: int, window: int, ahead: int) -> dict[str, Any]:
        """Operands of `prefill_attention_sparse`, whose queries read as many columns as last positions."""
        states = self._empty(self.kv_heads, columns)
        return {
            "query": self._empty(self.heads, columns),
            "key": states,
            "value": states,
            "columns": _empty("int64", self.batch, self.kv_heads, read),
            "window": window,
            "ahead": ahead,
            "recent": read,
        }

    def gather_kv(self, columns: int, budget: int, room: int) -> dict[str, Any]:
        """Operands of `gather_kv`."""
        states = self._empty(self.kv_heads, columns)
        positions = _empty("int64", self.batch, self.kv_heads, budget)
        return {"key": states, "value": states, "positions": positions, "room": room}

    def attend(self, slots: int, ragged: bool = False) -> dict[str, Any]:
        """Operands of `attend` for one query; `ragged`: KV heads have budgets of their own, `slots` in the mean."""
        storage = self._empty(self.kv_heads, slots)
        found = {"query": self._empty(self.heads, 1), "keys": storage, "values": storage, "softcap": 0.0, "sinks": None}
        if not ragged:
            return found
        each = _empty("int64", self.batch, self.kv_heads)
        return found | {
            "keys": storage.flatten(1, 2),
            "values": storage.flatten(1, 2),
            "lengths": each,
            "offsets": each,
        }

    def append_attend(self, slots: int, ragged: bool = False) -> dict[str, Any]:
        """Operands of `append_attend`."""
        new, storage = self._empty(self.kv_heads, 1), self._empty(self.kv_heads, slots).flatten(1, 2)
        return self.attend(slots, ragged) | {"keys": storage, "values": storage, "key": new, "value": new}

    def append_attend_lse(self, slots: int) -> dict[str, Any]:
        """Operands of `append_attend_lse`."""
        operands = self.append_attend(slots)
        return {name: operand for name, operand in operands.items() if name not in ("softcap", "sinks")}

    def _empty(self, heads: int, count: int) -> torch.Tensor:
        """[B, heads, count, D]"""
        return _empty(self.dtype, self.batch, heads, count, self.dim)


def _empty(dtype: str, *sizes: int) -> torch.Tensor:
    import torch

    return torch.empty(*sizes, dtype=getattr(torch, dtype), device="meta")


def jobs_of(operator: str, operands: dict[str, Any], arch: Arch) -> list[Job]:
    """One for each kernel of the operator that such a call means."""
    from specpass.kernels.registry import kernels_of
    from specpass.kernels.tuner import Job

    kernels = [kernel for kernel in kernels_of(operator) if kernel.applies(operands)]
    return [Job(kernel, kernel.shapes_of(operands), arch) for kernel in kernels]


def target_jobs(
    layer: Layer, layers: int, method: Method, arch: Arch, prompt: int, lookahead: int, room: int
) -> list[Job]:
    """The target's own: importance where the method scores, attention where it reads a prompt sparsely, gather and
    decode attention of each budget."""
    read = prompt if method.prompt is None else min(prompt, int(method.prompt.budget))
    ahead = lookahead if method.appends else 0
    columns = read + ahead * method.futures
    jobs, scored = [], (method.window + columns - read, columns, method.window, method.reduce)
    if method.scored and (method.rungs or not method.reconstruction):
        for operands in layer.importance(*scored):
            jobs += jobs_of("importance", operands, arch)
    if method.reconstruction and method.futures == 1:  # rows that do not see one another are no kernel's
        jobs += jobs_of("reconstruction", layer.reconstruction(*scored), arch)
    if 0 < 2 * method.sparse_prefill < columns:
        jobs += sparse_jobs(layer, method, arch, columns, ahead)
    followed = ahead if method.verify else 0  # tokens of the lookahead, kept for an answer that follows it
    ragged = method.spread != "uniform"
    for budget in sorted(set(method.layer_budgets(layers))):
        if not ragged:
            jobs += jobs_of("gather_kv", layer.gather_kv(columns, budget + followed, room - followed), arch)
        jobs += jobs_of("attend", layer.attend(budget + room, ragged), arch)
        jobs += jobs_of("append_attend", layer.append_attend(budget + room, ragged), arch)
    return jobs


def sparse_jobs(layer: Layer, method: Method, arch: Arch, columns: int, ahead: int) -> list[Job]:
    """A prompt's attention where it is read sparsely."""
    sizes = (method.sparse_prefill, method.window, ahead)
    return jobs_of("prefill_attention_sparse", layer.prefill_attention_sparse(columns, *sizes), arch)


def draft_jobs(layer: Layer, method: Method, arch: Arch, prompt: int, lookahead: int) -> list[Job]:
    """The draft's: attention of its steps over the whole prompt; scores and attention where it reads that sparsely; the
    scores of prompt tokens (SpecPC)."""
    if not method.needs_draft:
        return []
    slots, jobs = prompt + lookahead, []
    if 0 < 2 * method.sparse_prefill < prompt:
        jobs += sparse_jobs(layer, method, arch, prompt, 0)
        for operands in layer.importance(method.window, prompt, method.window, "max"):
            jobs += jobs_of("importance", operands, arch)
    if lookahead > 1:  # a step for all futures
        steps = dataclasses.replace(layer, batch=layer.batch * method.futures)
        jobs += jobs_of("append_attend", steps.append_attend(slots), arch)
    how = method.prompt
    if how is not None:
        reduce = "max" if how.reduce == "max" else "sum"
        for operands in layer.importance(how.window, prompt, 0, reduce, weighted=True):
            jobs += jobs_of("importance", operands, arch)
        if lookahead > 1:
            jobs += jobs_of("append_attend_lse", layer.append_attend_lse(slots), arch)
            for operands in layer.importance(1, slots, 0, reduce):  # with a cap or sinks, attention's is not theirs
                jobs += jobs_of("importance", operands, arch)
    return jobs
