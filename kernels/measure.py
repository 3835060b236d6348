"""Random inputs for a kernel, its float64 reference, and its time; shared by the tuner and bench/gpu.py."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from specpass.kernels import launch, reference
from specpass.kernels.shapes import Shapes
from specpass.kernels.tiles import Tile

TOLERANCE = {"float32": 2e-5, "float16": 4e-3, "bfloat16": 3e-2}  # of outputs that are rounded to the dtype
SCORE_TOLERANCE = 2e-5  # scores are float32 in every dtype
FLUSH_BYTES = 256 * 2**20  # more than any second-level cache holds


@dataclasses.dataclass
class Case:
    """One kernel's inputs: `args` as its launcher takes them, `lse` for the variant that is given it, `new` K/V."""

    kernel: str
    shapes: Shapes
    args: tuple[Any, ...]
    lse: Tensor | None = None
    new: tuple[Tensor, Tensor] | None = None
    sinks: Tensor | None = None

    @property
    def changes(self) -> dict[str, Any]:
        """What is done to the logits, as arguments of launchers and references."""
        return {"softcap": self.shapes.softcap, "sinks": self.sinks}

    def logits(self, query: Tensor, key: Tensor, scale: float) -> Tensor:
        """Scaled and capped, float64."""
        return reference.soft_capped(query.double() @ key.double().transpose(2, 3) * scale, self.shapes.softcap)


def make_case(kernel: str, shapes: Shapes, device: str, seed: int = 0) -> Case:
    """Fresh random inputs; keys lie in memory as models hand them over, [B, T, K, D]."""
    generator = torch.Generator(device).manual_seed(seed)
    dtype = getattr(torch, shapes.dtype)
    batch, kv_heads, heads = shapes.batch, shapes.kv_heads, shapes.kv_heads * shapes.group

    def normal(*sizes: int) -> Tensor:
        return torch.randn(*sizes, generator=generator, device=device, dtype=torch.float32).to(dtype)

    sinks = torch.randn(heads, generator=generator, device=device) if shapes.sinks else None
    if kernel.startswith("importance"):
        columns, ahead = shapes.columns, shapes.rows - shapes.window
        length = columns - ahead
        key = normal(batch, columns, kv_heads, shapes.dim).transpose(1, 2)
        query = 2 * normal(batch, heads, shapes.rows, shapes.dim)
        lengths = torch.full((batch,), length, device=device)
        rows = (torch.arange(-shapes.window, ahead, device=device) + length).clamp(min=-1).expand(batch, -1)
        weights = torch.linspace(0, 1, shapes.rows, device=device) if shapes.weighted else None
        scale = 1 / math.sqrt(shapes.dim)
        rows = rows.contiguous()
        case = Case(
            kernel, shapes, (query, key, rows, lengths, shapes.window, scale, shapes.reduce, weights), sinks=sinks
        )
        if kernel == "importance_given_lse":
            case.lse = _log_sum_exp(case).float()
        return case
    if kernel == "gather":
        columns = max(shapes.columns, shapes.budget)
        key, value = (normal(batch, columns, kv_heads, d).transpose(1, 2) for d in (shapes.dim, shapes.value_dim))
        chosen = torch.rand(batch, kv_heads, columns, generator=generator, device=device).argsort(-1)
        return Case(kernel, shapes, (key, value, chosen[..., : shapes.budget].sort(-1).values, shapes.room))
    keys, values = (normal(batch, kv_heads, shapes.slots, d) for d in (shapes.dim, shapes.value_dim))
    lengths = torch.full((batch, kv_heads), shapes.slots, device=device)
    args = (normal(batch, heads, 1, shapes.dim), keys, values, lengths, 1 / math.sqrt(shapes.dim))
    case = Case(kernel, shapes, args, sinks=sinks)
    if kernel == "decode_append":
        lengths.sub_(1)
        case.new = normal(batch, kv_heads, 1, shapes.dim), normal(batch, kv_heads, 1, shapes.value_dim)
    return case


def run(case: Case, tile: Tile | None = None) -> Any:
    """The kernel on a GPU; elsewhere what its operator does there."""
    if case.args[0].device.type != "cuda":
        return fallback(case)
    launcher: Callable[..., Any] = launch.gather_kv
    named: dict[str, Any] = {"tile": tile}
    if case.kernel.startswith("importance"):
        launcher, named = launch.importance, named | {"lse": case.lse, **case.changes}
    elif case.kernel.startswith("decode"):
        launcher, named = launch.attend, named | {"new": case.new, **case.changes}
    return launcher(*case.args, **named)


def fallback(case: Case) -> Any:
    """The same result by aten."""
    if case.kernel.startswith("importance"):
        query, key, rows, lengths, window, scale, reduce, weights = case.args
        return reference.importance(query, key, rows, lengths, window, scale, reduce, weights, case.lse, **case.changes)
    if case.kernel == "gather":
        return reference.gather_kv(*case.args)
    query, keys, values, lengths, scale = case.args
    if case.new is not None:
        reference.append_kv(keys.flatten(1, 2), values.flatten(1, 2), lengths, *case.new)
    return reference.attend(query, keys, values, lengths, scale, **case.changes)


def check(case: Case, tile: Tile | None = None) -> float:
    """Largest error against float64, as a share of what is allowed: at most 1 is right. Runs the kernel once."""
    if case.kernel == "gather":
        key, value, positions, room = case.args
        shape = (*positions.shape[:2], positions.shape[2] + room, -1)
        right = True
        for stored, states in zip(run(case, tile)[:2], (key, value), strict=True):
            view = stored.view(shape)
            index = positions[..., None].expand(-1, -1, -1, states.shape[3])
            right &= torch.equal(view[:, :, : positions.shape[2]], states.gather(2, index))
            right &= not view[:, :, positions.shape[2] :].any()
        return 0.0 if right else math.inf
    if case.kernel.startswith("importance"):
        expected, tolerance = _importance64(case), SCORE_TOLERANCE
        found = run(case, tile).double()
        relative = ((found - expected).abs() / (expected + 1e-3)).max()  # probabilities are small at long prompts
        return float(relative) / tolerance
    before = case.args[3].clone()
    found = run(case, tile).double()  # writes the new token, so the reference comes after
    right = torch.equal(case.args[3], before + (case.new is not None))
    error = (found - _attend64(case)).abs().max()
    return float(error) / TOLERANCE[case.shapes.dtype] if right else math.inf


def _log_sum_exp(case: Case) -> Tensor:
    """[B, H, R] float64, one KV head at a time: all heads at once would be gigabytes."""
    query, key, rows, _, _, scale, *_ = case.args
    group = query.shape[1] // key.shape[1]
    hidden = (torch.arange(key.shape[2], device=key.device) > rows[..., None])[:, None]
    lse = torch.cat(
        [
            case.logits(query[:, head * group : (head + 1) * group], key[:, [head]], scale)
            .masked_fill_(hidden, -math.inf)
            .logsumexp(-1)
            for head in range(key.shape[1])
        ],
        1,
    )
    return lse if case.sinks is None else torch.logaddexp(lse, case.sinks.double()[:, None])


def _importance64(case: Case) -> Tensor:
    query, key, rows, lengths, window, scale, reduce, weights = case.args
    group, lse = case.shapes.group, _log_sum_exp(case)
    hidden = (torch.arange(key.shape[2], device=key.device) > rows[..., None])[:, None]
    scores = []
    for head in range(key.shape[1]):
        own = slice(head * group, (head + 1) * group)
        logits = case.logits(query[:, own], key[:, [head]], scale)
        shares = (logits - lse[:, own, :, None]).exp_().masked_fill_(hidden, 0.0)
        if weights is not None:
            shares.mul_(weights.double()[:, None])
        total = shares.amax if reduce == "max" else shares.mean if reduce == "mean" else shares.sum
        scores.append(total((1, 2)))
    outside = torch.arange(key.shape[2], device=key.device) >= (lengths - window)[:, None]
    return torch.stack(scores, 1).masked_fill(outside[:, None], 0.0)


def _attend64(case: Case) -> Tensor:
    query, keys, values, lengths, scale = case.args
    batch, heads = query.shape[:2]
    folded = query.view(batch, keys.shape[1], -1, query.shape[3])
    unused = torch.arange(keys.shape[2], device=keys.device) >= lengths[..., None]
    logits = case.logits(folded, keys, scale).masked_fill(unused[:, :, None], -math.inf)
    if case.sinks is not None:  # a column of a value that is zero
        column = case.sinks.double().view(1, keys.shape[1], -1, 1).expand(batch, -1, -1, -1)
        logits = torch.cat([logits, column], -1)
    return (logits.softmax(-1)[..., : keys.shape[2]] @ values.double()).view(batch, heads, 1, -1)


def rewind(case: Case) -> Callable[[], None]:
    """What puts a case back to its start: a kernel that writes a token would run out of slots."""
    if case.new is None:
        return lambda: None
    lengths, start = case.args[3], case.args[3].clone()
    return lambda: lengths.copy_(start)


def time_us(
    call: Callable[[], Any], device: str, *, cold: bool, before: Callable[[], None] = lambda: None, repeats: int = 25
) -> float:
    """Median microseconds of a call, the GPU's second-level cache flushed before each where `cold`.

    `before` runs ahead of each call, outside the time.
    """
    for _ in range(3):
        before()
        call()
    if not device.startswith("cuda"):
        spans = []
        for _ in range(repeats):
            before()
            start = time.perf_counter()
            call()
            spans.append((time.perf_counter() - start) * 1e6)
        return statistics.median(spans)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.int8, device=device) if cold else None
    pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(repeats)]
    for start_event, end_event in pairs:
        if flush is not None:
            flush.zero_()
        before()
        start_event.record()
        call()
        end_event.record()
    torch.cuda.synchronize()
    return statistics.median(start_event.elapsed_time(end_event) * 1e3 for start_event, end_event in pairs)
