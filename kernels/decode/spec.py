"""The kernels of `attend` and `append_attend`: one new query, whose K/V is in its slot already or is written there."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor

from specpass.bits import GROUP
from specpass.kernels.archs import KIB, Arch
from specpass.kernels.decode import case
from specpass.kernels.decode.plan import code_launches, cut, launches
from specpass.kernels.decode.reference import append_attend, append_attend_lse, attend
from specpass.kernels.launch import Launch, start
from specpass.kernels.shapes import Shapes, block_of, constant, dtype_of, power_of_two
from specpass.kernels.spec import Kernel, Operands
from specpass.kernels.tiles import Tile

if TYPE_CHECKING:
    from specpass.kernels.cost import Cost


class Decode(Kernel):
    """`attend` of one query: keys [B, K, P, D], values [B, K, P, Dv]."""

    name = "decode"
    operator = "attend"
    reference: ClassVar[Callable[..., Any]] = staticmethod(attend)
    variants: ClassVar[tuple[dict[str, Any], ...]] = ({"softcap": 30.0}, {"sinks": True}, {"ragged": True})
    write = False  # the new token's K/V goes into its slot in the same launch
    returns_lse = False  # of the new token's row, besides

    def refuse_layout(self, operands: Operands) -> str | None:
        if operands["query"].shape[2] != 1:
            return "several new queries at once"
        if operands.get("sliding") or operands.get("chunk"):
            return "a layer that reads a part of its slots"
        if operands.get("bias") is not None:
            return "a bias of the keys (ALiBi)"
        if not all(_dense(operands[name]) for name in ("keys", "values")):
            return "the cache's storage is not dense"
        return None

    def applies(self, operands: Operands) -> bool:
        return operands.get("quantized") is None

    def refuse(self, shapes: Shapes) -> str | None:
        refused = super().refuse(shapes)
        if refused is None and shapes.group > 16:
            return f"group of {shapes.group} query heads: at most 16"
        return refused

    def storage(self, operands: Operands) -> tuple[Any, Any]:
        """KV heads, and the slots of each; of those with budgets of their own, what their row has."""
        keys = operands["keys"]
        return (keys.shape[1], keys.shape[2]) if keys.dim() == 4 else (operands["lengths"].shape[1], keys.shape[1])

    def shapes_of(self, operands: Operands) -> Shapes:
        """P counts as the budget, and is rounded up, by an eighth at most: a draft's differs from prompt to prompt."""
        query, keys, values = (operands[name] for name in ("query", "keys", "values"))
        kv_heads, size = self.storage(operands)
        ragged = operands.get("offsets") is not None
        slots = constant(size)
        if ragged:  # in the mean
            slots //= kv_heads * operands.get("layers", 1)
        step = max(64, power_of_two(slots) // 16)
        return Shapes(
            dtype_of(keys),
            constant(keys.shape[0]),
            kv_heads,
            query.shape[1] // kv_heads,
            keys.shape[-1],
            values.shape[-1],
            budget=-(-slots // step) * step,
            softcap=operands.get("softcap", 0.0),
            sinks=operands.get("sinks") is not None,
            ragged=ragged,
        )

    def table(self, shapes: Shapes, arch: Arch) -> Tile:
        wide = block_of(max(shapes.dim, shapes.value_dim)) * shapes.itemsize // 2
        small = arch.shared <= 64 * KIB
        block_n = 64 if wide <= 128 and not small else 32
        if wide > 256:
            block_n = 16
        # Three stages of two programs of a processor, which splits_for counts on, take 140 KiB, AMD's more.
        # Where there are more programs than that, two stages let more of them in: on an H200 at B = 64 67 us, not 76.
        # In float32 a third one does not fit the registers.
        roomy, splits = arch.shared > 140 * KIB and arch.backend == "cuda", splits_for(shapes, arch, block_n)
        warps, stages = (
            8 if wide > 256 else 4,
            3 if roomy and shapes.itemsize == 2 and wide <= 256 and splits > 1 else 2,
        )
        return Tile(block_n, splits=splits, warps=warps, stages=stages)

    def choices(self, shapes: Shapes, arch: Arch) -> Iterable[Tile]:
        most = splits_for(shapes, arch, 16)
        counts = sorted({max(1, most // part) for part in (1, 2, 4)})
        sizes = itertools.product((16, 32, 64, 128), counts, (2, 4, 8), (2, 3, 4))
        return (Tile(n, splits=splits, warps=warps, stages=stages) for n, splits, warps, stages in sizes)

    @property
    def cost(self) -> Cost:
        from specpass.kernels.decode.cost import DECODE

        return DECODE

    def rule_out(self, shapes: Shapes, tile: Tile, arch: Arch) -> str | None:
        if tile.block_n * block_of(shapes.dim) * shapes.itemsize < 32 * tile.warps * arch.warp:
            return "loads: less than two of 16 bytes a thread"
        return None

    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        return launches(shapes, tile, self.write, self.returns_lse)

    def run(self, operands: Operands, shapes: Shapes, tile: Tile, plan: tuple[Launch, ...]) -> Any:
        """[B, H, 1, Dv]; where it returns that too, the log-sum-exp [B, H, 1] float32."""
        keys, values, lengths, sinks = (operands.get(name) for name in ("keys", "values", "lengths", "sinks"))
        query = operands["query"].contiguous()
        new = (operands[name].contiguous() for name in ("key", "value")) if self.write else (query, query)
        out = query.new_empty(*query.shape[:3], shapes.value_dim)
        (splits, steps), partial, lse = cut(shapes, tile), out, out
        if len(plan) > 1:
            partial = out.new_empty(shapes.heads, splits, shapes.group, shapes.value_dim, dtype=torch.float32)
            lse = out.new_empty(shapes.heads, splits, shapes.group, dtype=torch.float32)
        offsets = operands.get("offsets") if shapes.ragged else lengths  # read by nobody else
        read = (query, keys, values, lengths, offsets, *new, lse if sinks is None else sinks.float())
        sizes = (self.storage(operands)[1], steps, operands["scale"])
        start(self.code, plan[0], (shapes.heads, splits), *read, out, partial, lse, *sizes)
        natural = out.new_empty(out.shape[:3], dtype=torch.float32) if self.returns_lse else lse
        if len(plan) > 1:
            start(self.code, plan[1], (shapes.heads, shapes.group), partial, lse, lengths, out, natural, splits)
        return (out, natural) if self.returns_lse else out

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        return case.make(shapes, device, seed)

    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        return case.error(operands, found, shapes)


class DecodeAppend(Decode):
    """`append_attend`: keys [B, K * P, D], values [B, K * P, Dv], which the new token's are written to."""

    name = "decode_append"
    operator = "append_attend"
    reference: ClassVar[Callable[..., Any]] = staticmethod(append_attend)
    write = True
    advances = ("lengths",)

    def storage(self, operands: Operands) -> tuple[Any, Any]:
        kv_heads, slots = operands["key"].shape[1], operands["keys"].shape[1]
        return kv_heads, slots if operands.get("offsets") is not None else slots // kv_heads

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        return case.make_append(shapes, device, seed)


class DecodeAppendLse(DecodeAppend):
    """`append_attend_lse`: what scores the new token's row besides then reads K once."""

    name = "decode_append_lse"
    operator = "append_attend_lse"
    reference = staticmethod(append_attend_lse)
    variants = ()
    returns_lse = True

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        operands = case.make_append(shapes, device, seed)
        return {name: operand for name, operand in operands.items() if name not in ("softcap", "sinks")}

    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        return case.error_lse(operands, found, shapes)


class DecodeCodes(Decode):
    """`attend` of one query over a prompt in 8 or 4 bits, and keys [B, K, N, D], values [B, K, N, Dv] behind it."""

    name = "decode_codes"
    variants = ({"bits": 4}, {"softcap": 30.0}, {"sinks": True})

    def applies(self, operands: Operands) -> bool:
        return operands.get("quantized") is not None

    def refuse_layout(self, operands: Operands) -> str | None:
        if operands["bits"] == 2:
            return "2 bits: outliers and the low rank are read in aten"
        return super().refuse_layout(operands)

    def shapes_of(self, operands: Operands) -> Shapes:
        shapes = super().shapes_of(operands)
        slots = constant(operands["quantized"][0].shape[2]) * GROUP + shapes.budget
        return dataclasses.replace(shapes, budget=slots, bits=operands["bits"])

    def table(self, shapes: Shapes, arch: Arch) -> Tile:
        tile = super().table(shapes, arch)
        return dataclasses.replace(tile, stages=2)

    def choices(self, shapes: Shapes, arch: Arch) -> Iterable[Tile]:
        return (tile for tile in super().choices(shapes, arch) if tile.block_n <= GROUP)

    @property
    def cost(self) -> Cost:
        from specpass.kernels.decode.cost import CODES

        return CODES

    def plan(self, shapes: Shapes, tile: Tile) -> tuple[Launch, ...]:
        return code_launches(shapes, tile)

    def run(self, operands: Operands, shapes: Shapes, tile: Tile, plan: tuple[Launch, ...]) -> Tensor:
        """[B, H, 1, Dv]."""
        keys, values, lengths, sinks = (operands.get(name) for name in ("keys", "values", "lengths", "sinks"))
        assert keys is not None
        codes, counts, _ = operands["quantized"]
        query = operands["query"].contiguous()
        out = query.new_empty(*query.shape[:3], shapes.value_dim)
        (splits, steps), partial, lse = cut(shapes, tile), out, out
        if len(plan) > 1:
            partial = out.new_empty(shapes.heads, splits, shapes.group, shapes.value_dim, dtype=torch.float32)
            lse = out.new_empty(shapes.heads, splits, shapes.group, dtype=torch.float32)
        read = (query, codes, codes.view(keys.dtype), counts, keys, values, lengths)
        sizes = (keys.shape[2], codes.shape[2], steps, operands["scale"])
        own = lse if sinks is None else sinks.float()
        start(self.code, plan[0], (shapes.heads, splits), *read, own, out, partial, lse, *sizes)
        if len(plan) > 1:
            start(self.code, plan[1], (shapes.heads, shapes.group), partial, lse, lengths, out, lse, splits)
        return out

    def make(self, shapes: Shapes, device: str, seed: int) -> dict[str, Any]:
        return case.make_codes(shapes, device, seed)

    def error(self, operands: Operands, found: Any, shapes: Shapes) -> float:
        return case.error_codes(operands, found, shapes)


def splits_for(shapes: Shapes, arch: Arch, block_n: int) -> int:
    """Splits of a KV head's slots: two programs for each processor, no split shorter than one step, at most 64."""
    wanted = -(-2 * arch.units // shapes.heads)
    return max(1, min(wanted, -(-shapes.slots // block_n), 64))


def _dense(states: Tensor) -> bool:
    # A symbolic batch says nothing about strides that are constants, and must not be guarded on.
    return (
        states.stride(-1) == 1
        and states.stride(-2) == states.shape[-1]
        and (states.dim() == 3 or states.stride(1) == states.shape[2] * states.shape[3])
    )


KERNELS = (Decode(), DecodeAppend(), DecodeAppendLse(), DecodeCodes())
