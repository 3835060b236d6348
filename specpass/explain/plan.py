"""A long prompt over several devices, on paper: bytes that each of them holds, and the least time of each part.

The target is spread as specpass.parallel prunes it: each of P devices has 1/P of its heads, MLPs and vocabulary, so
that the closed forms of reports/cost.py, with the sizes divided, are those of one device. Residual streams and the
draft are whole on each, and prompts are read in one piece. One thing is counted otherwise than there: of causal
attention the half that is read.

Floors: FLOPs over the data sheet's 16-bit rate, or bytes moved over its bandwidth, whichever takes longer. No kernel
reaches them; what goes between devices stands beside them in bytes.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from specpass.errors import ScaleError
from specpass.kernels.archs import Arch
from specpass.lowering.row_pieces import piece_rows
from specpass.methods.base import CANDIDATES, Method
from specpass.parallel.shards import check_heads
from specpass.reports.cost import costs_of
from specpass.sizes import Decoder, context_length

Pair = tuple[float, float]  # full KV, the method


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one of `devices` holds and does for a prompt of `tokens` tokens; each amount for full KV and for the method.

    Args:
        held: bytes by name; each PEAK is the sum of what is held at that moment.
        work: by phase (WORK): "flops", "bytes" moved, "sent" to other devices (a ring), "seconds" at least.
        notes: what is to be known besides.
    """

    method: str
    tokens: int
    devices: int
    arch: Arch
    held: dict[str, Pair]
    work: dict[str, dict[str, Pair]]
    notes: tuple[str, ...]

    def data(self) -> dict[str, Any]:
        """Plain data, for JSON."""

        def named(pairs: dict[str, Pair]) -> dict[str, Any]:
            return {name: {"full": full, "method": own} for name, (full, own) in pairs.items()}

        return {
            "method": self.method,
            "tokens": self.tokens,
            "devices": self.devices,
            "arch": {"name": self.arch.name, "flops_per_s": self.arch.flops, "bytes_per_s": self.arch.bandwidth},
            "held": named(self.held),
            "work": {phase: named(amounts) for phase, amounts in self.work.items()},
            "notes": list(self.notes),
        }


def plan(
    target: Any,
    draft: Any,
    method: Method,
    *,
    tokens: int,
    devices: int,
    arch: Arch,
    new_tokens: int = 256,
    itemsizes: tuple[int, int] = (2, 2),
) -> Plan:
    """Bytes and floors of a target spread over `devices` by its KV heads, with a draft that each of them holds.

    Args: target, draft: configs; draft None: the method asks none. itemsizes: bytes of a number in target and draft.

    Raises: ParallelPlanError: KV heads that the devices do not divide. ScaleError: nothing is counted of these models
        or this method, or the prompt fits the budget.
    """
    check_heads(target, devices)
    whole = Decoder.of(target, itemsizes[0])
    small = None if draft is None else Decoder.of(draft, itemsizes[1])
    costs = None if whole is None else costs_of(method, part_of(whole, devices), small)
    if whole is None or costs is None:
        behind = "" if draft is None else f" behind a {draft.model_type}"
        raise ScaleError(
            f"{method.name} on a {target.model_type}{behind}: bytes and FLOPs are counted of dense decoders without "
            "windows or experts, and of the methods that specpass brings; leave --tokens out."
        )
    resolved = method.resolve(tokens)
    budget = max(resolved.layer_budgets(whole.layers))
    if tokens <= budget:
        raise ScaleError(f"tokens={tokens:,} fit the budget of {budget:,} and are kept whole: name a longer prompt.")
    part, numbers = part_of(whole, devices), costs.numbers(tokens, new_tokens)
    read = tokens_read(resolved, tokens, new_tokens)
    ring = 2 * (devices - 1) / devices * 2 * whole.layers * whole.hidden * whole.itemsize  # of one token
    skipped = {"prefill": (skipped_half(part, tokens), skipped_half(part, read))}
    again = resolved.window + resolved.look_ahead(new_tokens) if method.writes_itself else 0
    sent = {"prefill": (ring * tokens, ring * (read + again)), "decode": (ring, ring)}
    if method.writes_itself:
        sent["draft"] = (0, ring * (resolved.look_ahead(new_tokens) - 1))
    if small is not None:
        skipped["draft"] = (0, skipped_half(small, tokens))
    phases = [phase for phase in WORK if phase != "draft" or small is not None or method.writes_itself]
    matrices = (weights(part, whole, target), 0 if small is None else weights(small, small, draft))
    return Plan(
        method.key,
        tokens,
        devices,
        arch,
        _held(part, small, resolved, (tokens, read), matrices, numbers["kv_bytes"]),
        {phase: _work(arch, numbers, phase, skipped.get(phase, (0, 0)), sent.get(phase, (0, 0))) for phase in phases},
        tuple(_notes(method, tokens, {"target": target, "draft": draft})),
    )


WORK = {"draft": "the draft reads and writes", "prefill": "the target reads", "decode": "a step of the answer"}
PEAKS = ("at once while the draft reads", "at once while the target reads", "at once while it answers")


def part_of(decoder: Decoder, devices: int) -> Decoder:
    """The sizes that one of `devices` has of a decoder whose KV heads they divide; the others are rounded up."""
    return dataclasses.replace(
        decoder,
        heads=decoder.heads // devices,
        kv_heads=decoder.kv_heads // devices,
        intermediate=-(-decoder.intermediate // devices),
        vocab=-(-decoder.vocab // devices),
    )


def weights(part: Decoder, whole: Decoder, config: Any) -> int:
    """Bytes of a device's matrices; an embedding that is not the head too is whole on each, as transformers plans."""
    attention = 2 * part.hidden * part.head_dim * (part.heads + part.kv_heads)
    layer = attention + part.mlp_matrices * part.hidden * part.intermediate
    tied = config.get_text_config(decoder=True).tie_word_embeddings
    return part.itemsize * (part.layers * layer + part.hidden * (part.vocab + (0 if tied else whole.vocab)))


def kv(decoder: Decoder, slots: int, layers: int) -> int:
    """Bytes of keys and values in `slots` slots of every head of `layers` layers."""
    return 2 * layers * decoder.kv_heads * decoder.head_dim * slots * decoder.itemsize


def activations(part: Decoder, rows: int, pieces: bool) -> int:
    """Least bytes of `rows` tokens inside a layer, beside its keys and values: the residual stream, and the larger of
    what attention (the normed input or the output, and queries) and the MLP (its input and inner rows) hold at once;
    with `pieces` of rows (lowering/row_pieces.py) the MLP's are those of one, and attention's output waits for them."""
    inner = part.heads * part.head_dim
    attention = rows * (max(part.hidden, inner) + inner)
    few = min(rows, piece_rows(part.intermediate * part.itemsize, "cuda")) if pieces else rows
    mlp = few * (part.hidden + (part.mlp_matrices - 1) * part.intermediate)
    waiting = rows * (inner + part.hidden) if few < rows else 0
    return part.itemsize * (rows * part.hidden + max(attention, waiting + mlp))


def tokens_read(method: Method, tokens: int, new_tokens: int) -> int:
    """Rows of the target's prefill: those of the prompt, or of what is left of it, and the lookahead's."""
    left = tokens if method.prompt is None else min(tokens, int(method.prompt.resolve(tokens).budget))
    return left + (method.look_ahead(new_tokens) * method.futures if method.appends and not method.writes_itself else 0)


def skipped_half(decoder: Decoder, rows: int) -> int:
    """FLOPs above the diagonal of the attention of `rows` tokens."""
    return 2 * rows * rows * decoder.layers * decoder.heads * decoder.head_dim


def _held(
    part: Decoder,
    small: Decoder | None,
    method: Method,
    rows: tuple[int, int],
    matrices: tuple[int, int],
    kept: tuple[int, int],
) -> dict[str, Pair]:
    """Bytes by name, for full KV and the method, whose prefills are of `rows` tokens."""
    tokens, read = rows
    held: dict[str, Pair] = {"target weights": (matrices[0], matrices[0])}
    drafting = 0
    if small is not None:
        caches, layer = kv(small, tokens, small.layers), activations(small, tokens, pieces=True)
        held |= {"draft weights": (0, matrices[1]), "draft K/V of the prompt": (0, caches)}
        held["draft activations of a layer"] = (0, layer)
        drafting = sum(matrices) + caches + layer
    whole = kv(part, tokens, part.layers)
    until = kept[1]
    own = kv(part, read, 1)
    if method.writes_itself:  # all layers', until each has scored the lookahead
        own = whole
    if method.spread == "global":  # each layer's candidates, until the last has read the prompt
        until *= CANDIDATES
    held["target K/V while it reads"] = (whole, own + until)
    held["target activations of a layer"] = (
        activations(part, tokens, pieces=False),
        activations(part, read, pieces=True),
    )
    held["cache while it answers"] = kept
    reading, inside = held["target K/V while it reads"], held["target activations of a layer"]
    base = (matrices[0], sum(matrices))
    peaks: list[Pair] = [
        (0, drafting),
        (base[0] + reading[0] + inside[0], base[1] + reading[1] + inside[1]),
        (base[0] + kept[0], base[1] + kept[1]),
    ]
    return held | {name: peak for name, peak in zip(PEAKS, peaks, strict=True) if any(peak)}


def _work(arch: Arch, numbers: dict[str, tuple[int, int]], phase: str, skipped: Pair, sent: Pair) -> dict[str, Pair]:
    full, own = (numbers[f"{phase}_flops"][way] - skipped[way] for way in (0, 1))
    moved = numbers[f"{phase}_bytes"]
    floors = [max(f / arch.flops, b / arch.bandwidth) for f, b in zip((full, own), moved, strict=True)]
    return {"flops": (full, own), "bytes": moved, "sent": sent, "seconds": (floors[0], floors[1])}


def _notes(method: Method, tokens: int, configs: dict[str, Any]) -> list[str]:
    notes = []
    for name, config in configs.items():
        made_for = None if config is None else context_length(config)
        if made_for and tokens > made_for:
            notes.append(f"the {name} was made for {made_for:,} positions")
    if method.writes_itself:
        notes.append("the target is its own draft, by steps from a pruned cache; it reads window and lookahead again")
    if method.sparse_prefill:
        notes.append("FLOPs are those of exact attention: sparse_prefill takes fewer")
    return notes
