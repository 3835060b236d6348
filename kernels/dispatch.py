"""One table: for each operator, a generated kernel or aten, and why. Operators and the lowering both ask it.

Kernels say themselves what they serve (spec.py). What stays with torch's own operators, with the figures behind it
(T columns, head dimension D, 16-bit K and V):
- select: a stable sort is what promises ties to the lower position. On a CPU select takes 1.2 % of importance's time
  (2.2 % where the log-sum-exp is given) at 8k, 32k and 128k columns; torch.topk and two others are timed beside it in
  bench/results/select.json. On an H200 it takes 152 us at 32k columns and 215 us at 128k (gpu_kernels.json there), 1 %
  of a layer's prefill attention at 32k.
- prefill attention on a GPU: torch's cuDNN or flash attention; compute-bound, and nothing here is particular to a
  budget. On an H200 cuDNN's takes 0.89 ms at 8k and 14.8 ms at 32k where flash takes 1.71 and 25.3 (same file): more
  than the 0.04 and 0.14 ms that flash's log-sum-exp saves importance, so from sm_90 on it is not asked for
  (`shares_lse`).
- sparse prefill of a prompt that is short enough to be read whole: the same, by `prefill_attention`.
- append of several tokens on a GPU: a second turn, once. A single token is written in attention's own launch
  (`append_attend`): aten's append is five launches, and at C = 1024 (8 KV heads, D = 128, H100 bandwidth) attention's
  bytes take 1.6 us.

On a CPU that multiplies bfloat16 (AMX, or AVX-512's dot products), where there is a compiler, prefill attention and
importance are cpu/prefill.cpp's and cpu/importance.cpp's (CPU_KERNELS): they take less than half and a fifth of the
time of torch's operators (bench/results/prefill_attention.json).

Operators that the lowering makes of two are asked for by `shares_lse` (`prefill_attention_lse`) and `choose`. On an
H200 at 655,360 slots `append_attend` takes 88 us where append and decode take 104, and `append_attend_lse` 91 (same
file).
"""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor

from specpass.kernels.aot import refused
from specpass.kernels.archs import ARCHS, Arch, device_arch
from specpass.kernels.cpu import decode, importance, prefill
from specpass.kernels.registry import REGISTRY, kernels_of
from specpass.kernels.shapes import DTYPES, dtype_of
from specpass.kernels.spec import Operands, device_of

ATEN_OPERATORS = {
    "select": "a stable sort promises ties to the lower position, and reads 4 bytes a column",
    "prefill_attention": "torch's flash attention",
    "prefill_attention_lse": "torch's flash attention, whose log-sum-exp saves importance its first pass over K",
    "append_kv": "several tokens at once, or behind a quantised prompt; else one is written by the kernel that attends",
    "attend_cascade": "a prompt's slots are read once for all of its sequences, each one's own beside them",
}


_STATES = ("query", "key", "value")
CPU_KERNELS: dict[str, tuple[str, Callable[..., str | None], tuple[str, ...]]] = {  # name, what it refuses, its tensors
    "prefill_attention": ("prefill_tiles", prefill.refuse, _STATES),
    "prefill_attention_lse": ("prefill_tiles", prefill.refuse, _STATES),
    "prefill_attention_sparse": ("prefill_tiles", prefill.refuse, _STATES),
    "importance": ("importance_tiles", importance.refuse, ("query", "key")),
}


@dataclasses.dataclass(frozen=True)
class Choice:
    """How one operator runs at one site: the kernel's name, or None for aten; `reason` says why."""

    operator: str
    kernel: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.operator}: {f'kernel {self.kernel}' if self.kernel else 'aten'} ({self.reason})"


def choose(operator: str, operands: Operands) -> Choice:
    """The table's answer for an operator with these operands: all of its schema's, tensors real or fake."""
    device = device_of(operands)
    if device.type == "cpu" and operator in CPU_KERNELS:
        return _choose_on_cpu(operator, operands)
    if device.type == "cpu" and operator in ("append_attend", "append_attend_lse"):
        return Choice(operator, *decode.served(operands))
    if device.type != "cuda":
        return Choice(operator, None, f"{device.type} tensors")
    reason = None
    for kernel in kernels_of(operator):
        if kernel.applies(operands):
            refused = (
                kernel.refuse_layout(operands)
                or _refuse_device(device.index or 0)
                or kernel.refuse(kernel.shapes_of(operands))
            )
            if refused is None:
                return Choice(operator, kernel.name, "shapes are supported")
            reason = reason or refused
    return Choice(operator, None, reason or _aten_reason(operator, operands))


def _choose_on_cpu(operator: str, operands: Operands) -> Choice:
    changed = any(operands.get(name) for name in ("softcap", "chunk"))
    if changed or operands.get("bias") is not None or (operator == "importance" and operands.get("sinks") is not None):
        return Choice(operator, None, _aten_reason(operator, operands))
    name, refuse, tensors = CPU_KERNELS[operator]
    refused = refuse(*(operands[tensor] for tensor in tensors), operands["scale"])
    return Choice(operator, None if refused else name, refused or "bfloat16 on a CPU with AMX or AVX-512")


def _refuse_device(index: int) -> str | None:
    if not triton_installed():
        return "Triton is not installed: pip install triton"
    arch = device_arch(index)
    return None if arch is None else refuse_arch(arch)


def refuse_arch(arch: Arch) -> str | None:
    """Why no kernel is compiled for an architecture, or None."""
    if arch.name in ARCHS:
        return None
    return f"{arch.name} is older than sm_80" if arch.too_old else refused(arch)


def _aten_reason(operator: str, operands: Operands) -> str:
    if operator == "prefill_attention" and operands["softcap"]:
        return "flash attention knows no soft cap: products of 256 query rows at a time"
    flash = operator == "prefill_attention" and returns_lse(*(operands[name] for name in ("query", "key", "value")))
    if flash and operands["sliding"] and operands.get("bias") is None:
        return "torch's flash attention, with a window"
    if operator == "prefill_attention" and (operands["sliding"] or operands["chunk"]):
        return "flash attention of 256 query rows at a time, over what they read"
    if operator == "prefill_attention" and operands.get("bias") is not None:
        return "flash attention knows no bias of the keys (ALiBi): 256 query rows at a time"
    return ATEN_OPERATORS.get(operator, "no kernel serves it")


@functools.cache
def triton_installed() -> bool:
    """Whether Triton can be imported, without importing it."""
    return importlib.util.find_spec("triton") is not None


def kernel_or(operator: str, reference: Callable[..., Any]) -> Callable[..., Any]:
    """`reference`, by a kernel of the operator where the table says so. Its parameters are the schema's operands."""
    parameters = inspect.signature(reference).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}

    @functools.wraps(reference)
    def run(*args: Any, **kwargs: Any) -> Any:
        if not kernels_of(operator):
            return reference(*args, **kwargs)
        operands = {**defaults, **dict(zip(defaults, args, strict=False)), **kwargs}
        kernel = choose(operator, operands).kernel
        if kernel is None or kernel not in REGISTRY:  # aten, or a CPU's own, which the implementation itself calls
            return reference(*args, **kwargs)
        return REGISTRY[kernel].launch(operands)

    return run


def returns_lse(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether aten's flash attention serves these tensors: what it returns besides is then worth asking for."""
    dtype, dim = dtype_of(query), query.shape[3]
    if value.shape[3] != dim or dtype not in DTYPES or any(states.stride(3) != 1 for states in (query, key, value)):
        return False
    if query.device.type != "cuda":
        return query.device.type == "cpu"
    arch = device_arch(query.device.index or 0)
    flash = arch is None or (arch.backend == "cuda" and not arch.too_old)  # None: a faked device
    return flash and dtype != "float32" and dim % 8 == 0 and dim <= 256


def shares_lse(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether importance should be given attention's log-sum-exp: flash attention's costs nothing.

    From sm_90 on torch attends by cuDNN, which hands none over and is faster by more than importance's first pass.
    """
    if not returns_lse(query, key, value):
        return False
    arch = device_arch(query.device.index or 0) if query.device.type == "cuda" else None
    return arch is None or int(arch.capability) < 90
