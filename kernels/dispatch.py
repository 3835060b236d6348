"""One table: for each operator, a generated kernel or aten, and why. Operators and the lowering both ask it.

What stays with torch's own operators, with the figures behind it (T columns, head dimension D, 16-bit K and V):
- select: a stable sort is what promises ties to the lower position. On a CPU select takes 1.2 % of importance's time
  (2.2 % where the log-sum-exp is given) at 8k, 32k and 128k columns; torch.topk and two others are timed beside it in
  bench/results/select.json. On a GPU a radix sort moves 96 bytes a column where attention and importance move
  6 * D + 4: a kernel that read the scores once and nothing else would save 11 % of these bytes at D = 128, in a
  prefill that is bound by FLOPs, not bytes. Not measured on a GPU.
- prefill attention: torch's flash attention; compute-bound, and nothing here is particular to a budget.
- append of several tokens: a second turn, once. A single token is written in attention's own launch (`append_attend`):
  aten's append is five launches, and at C = 1024 (8 KV heads, D = 128, H100 bandwidth) attention's bytes take 1.6 us.

Operators that the lowering makes of two (`prefill_attention_lse`, `append_attend`) are asked for by `returns_lse` and
`choose`; not measured on a GPU.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
from typing import Any

from torch import Tensor

from specpass.kernels import reference
from specpass.kernels.archs import device_arch
from specpass.kernels.shapes import DTYPES, Shapes, refuse

ATEN_OPERATORS = {
    "select": "a stable sort promises ties to the lower position, and reads 4 bytes a column",
    "prefill_attention": "torch's flash attention",
    "prefill_attention_lse": "torch's flash attention, whose log-sum-exp saves importance its first pass over K",
    "append_kv": "several tokens at once; one alone is written by the kernel that attends to it",
}
KERNELS = {"importance": "importance", "gather_kv": "gather", "attend": "decode", "append_attend": "decode_append"}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one operator runs at one site: the kernel's name, or None for aten; `reason` says why."""

    operator: str
    kernel: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {f'kernel {self.kernel}' if self.kernel else 'aten'} ({self.reason})"


def choose(operator: str, args: tuple[Any, ...]) -> Choice:
    """The table's answer for an operator with these tensors (real or fake ones)."""
    first = args[0]
    if first.device.type != "cuda":
        return Choice(operator, None, f"{first.device.type} tensors")
    if operator == "prefill_attention" and args[4:5] not in ((), (0.0,)):
        return Choice(operator, None, "flash attention knows no soft cap: products of 256 query rows at a time")
    if operator in ATEN_OPERATORS:
        return Choice(operator, None, ATEN_OPERATORS[operator])
    if operator in ("attend", "append_attend"):
        query, storage = (args[0], args[1:3]) if operator == "attend" else (args[3], args[:2])
        if query.shape[2] != 1:
            return Choice(operator, None, "several new queries at once")
        if not all(_dense(states) for states in storage):
            return Choice(operator, None, "the cache's storage is not dense")
    kernel = (
        "importance_given_lse" if operator == "importance" and args[8:9] not in ((), (None,)) else KERNELS[operator]
    )
    return _choose(operator, kernel, _facts(operator, args), first.device.index or 0)


def returns_lse(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether aten's flash attention serves these tensors: what it returns besides is then worth asking for."""
    dtype, dim = str(query.dtype)[6:], query.shape[3]
    if value.shape[3] != dim or dtype not in DTYPES or any(states.stride(3) != 1 for states in (query, key, value)):
        return False
    if query.device.type == "cpu":
        return True
    arch = device_arch(query.device.index or 0) if query.device.type == "cuda" else "none"
    flash = arch is None or (arch.startswith("sm_") and int(arch[3:]) >= 80)  # None: a faked device
    return flash and dtype != "float32" and dim % 8 == 0 and dim <= 256


def _dense(states: Tensor) -> bool:
    # A symbolic batch says nothing about strides that are constants, and must not be guarded on.
    return (
        states.stride(-1) == 1
        and states.stride(-2) == states.shape[-1]
        and (states.dim() == 3 or states.stride(1) == states.shape[2] * states.shape[3])
    )


def _facts(operator: str, args: tuple[Any, ...]) -> Shapes:
    """The sizes that decide, as constants; batch and prompt length may be symbols, and decide nothing."""
    if operator == "importance":
        query, key = args[:2]
        rows = query.shape[2] if isinstance(query.shape[2], int) else 1
        return Shapes(str(key.dtype)[6:], 0, 0, query.shape[1] // key.shape[1], key.shape[3], key.shape[3], rows=rows)
    if operator == "gather_kv":
        key, value = args[:2]
        return Shapes(str(key.dtype)[6:], 0, 0, 1, key.shape[3], value.shape[3])
    if operator == "append_attend":
        query, keys, values = args[3:6]  # the new token's: [B, K, 1, D]
    else:
        query, keys, values = args[:3]
    return Shapes(str(keys.dtype)[6:], 0, 0, query.shape[1] // keys.shape[1], keys.shape[3], values.shape[3])


def triton_installed() -> bool:
    """Whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


@functools.lru_cache(maxsize=256)
def _choose(operator: str, kernel: str, facts: Shapes, device: int) -> Choice:
    if not triton_installed():
        return Choice(operator, None, "Triton is not installed: pip install triton")
    arch = device_arch(device)
    if arch is not None and arch.startswith("sm_") and int(arch[3:]) < 80:
        return Choice(operator, None, f"{arch} is older than sm_80")
    refused = refuse(kernel, facts)
    if refused is not None:
        return Choice(operator, None, refused)
    return Choice(operator, kernel, "shapes are supported")


def importance(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    lengths: Tensor,
    window: int,
    scale: float,
    reduce: str,
    weights: Tensor | None = None,
    lse: Tensor | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """reference.importance, by its kernel where the table says so."""
    args = (query, key, rows, lengths, window, scale, reduce, weights, lse, softcap, sinks)
    if choose("importance", args).kernel is None:
        return reference.importance(*args)
    from specpass.kernels import launch

    return launch.importance(*args)


def gather_kv(key: Tensor, value: Tensor, positions: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """reference.gather_kv, by its kernel where the table says so."""
    if choose("gather_kv", (key, value)).kernel is None:
        return reference.gather_kv(key, value, positions, room)
    from specpass.kernels import launch

    return launch.gather_kv(key, value, positions, room)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """reference.attend, by its kernel where the table says so."""
    args = (query, keys, values, lengths, scale, softcap, sinks)
    if choose("attend", args).kernel is None:
        return reference.attend(*args)
    from specpass.kernels import launch

    return launch.attend(*args)


def append_attend(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """reference.append_attend, by its kernel where the table says so."""
    args = (keys, values, lengths, query, key, value, scale, softcap, sinks)
    if choose("append_attend", args).kernel is None:
        return reference.append_attend(*args)
    from specpass.kernels import launch

    keys, values = (states.unflatten(1, (key.shape[1], -1)) for states in (keys, values))
    return launch.attend(query, keys, values, lengths, scale, softcap, sinks, new=(key, value))
