"""What a BudgetCache's calls compute, in plain aten.

Symbols: B batch, S prompt, K KV heads, D and Dv head dimensions, C budget, N room, P = C + N slots, q new tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specpass.dialect import cache as dialect
from specpass.errors import UncompiledCacheError
from specpass.kernels.bits.reference import quantize_kv
from specpass.kernels.decode import reference
from specpass.kernels.gather.reference import gather_kv, gather_ragged, offsets_and_lengths, share_layers
from specpass.ops.bind import bind


def fill(
    key: Tensor, value: Tensor, handle: Tensor, budget: int, room: int, layer: int, short: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep every KV pair: what the traced graph says before any pass, and what a refused graph runs.

    Returns: as `gather_kv`, and positions [B, K, S].
    """
    check_owner(handle, again=True)
    batch, kv_heads, size = key.shape[:3]
    positions = torch.arange(size, device=key.device).expand(batch, kv_heads, -1).contiguous()
    return *gather_kv(key, value, positions, room), positions


def check_owner(handle: Tensor | None, again: bool = False) -> None:
    """A graph that says this was compiled by specpass, if it belongs to a cache.

    Args: again: a graph of a stage in between may be run by itself, once the compiled one has read the prompt.
    Raises: UncompiledCacheError: another backend runs it as it was traced, and nothing would prune.
    """
    found = getattr(handle, "_specpass_cache", None)
    cache = None if found is None else found()
    if cache is not None and cache.pruned_by is None and not (again and cache.served):
        raise UncompiledCacheError(
            "a BudgetCache was given to a model that another backend compiled (a later model.compile() or "
            "torch.compile() takes the place of specpass's), so nothing prunes it: call specpass.compile(model, ...) "
            "last, or use another cache."
        )


def keep_kv(key: Tensor, value: Tensor, lengths: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Storage of the draft: all of K and V and room for its own tokens, which overwrite a short row's padding.

    Returns: as `gather_kv`.
    """
    kv_heads = key.shape[1]
    keys, values = (F.pad(states, (0, 0, 0, room)).flatten(1, 2) for states in (key, value))
    return keys, values, lengths[:, None].repeat(1, kv_heads)


def extend_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Storage of a cache that keeps everything, one step on: [B, K, n, D] and [B, K, q, D] -> [B, K * (n + q), D]."""
    return torch.cat([keys, key], 2).flatten(1, 2), torch.cat([values, value], 2).flatten(1, 2)


def append_kv(
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    key: Tensor,
    value: Tensor,
    handle: Tensor | None,
    positions: Tensor | None = None,
    offsets: Tensor | None = None,
    quantized: list[Tensor] | None = None,
    bits: int = 0,
    queries: Tensor | None = None,
    prompt: list[Tensor] | None = None,
) -> None:
    """See the reference; `handle` led the backend to the cache, and passes have read what is not used here."""
    check_owner(handle)
    reference.append_kv(keys, values, lengths, key, value, offsets)


def take_back(lengths: Tensor, padding: Tensor) -> None:
    """Lengths [B, K] less padding [B], in place."""
    lengths.sub_(padding[:, None])


def note_queries(queries: Tensor, query: Tensor, scale: float, padding: Tensor | None = None) -> None:
    """Queries [B, H, W, D] become those of the newest W tokens, `query` [B, H, q, D] among them, in place.

    Of row b the last padding[b] of q are no tokens.
    """
    size, count = queries.shape[2], query.shape[2]
    both = torch.cat([queries, (query.float() * scale).to(queries.dtype)], 2)
    if padding is None:
        queries.copy_(both[:, :, count:])
        return
    place = (count - padding)[:, None] + torch.arange(size, device=query.device)
    queries.copy_(both.gather(2, place[:, None, :, None].expand_as(queries)))


def lookahead(key: Tensor, given: Tensor | None, length: int) -> Tensor:
    """[B, L]: the caller's ids, or -1 where nobody wrote any."""
    if given is not None:
        return given.to(key.device, copy=True)
    return torch.full((key.shape[0], length), -1, dtype=torch.int64, device=key.device)


def read_prompt(key: Tensor, scores: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Every position of key [B, K, S, D], read without a shift: [B, S] and [B]."""
    batch, size = key.shape[0], key.shape[2]
    positions = torch.arange(size, device=key.device).expand(batch, -1).contiguous()
    return positions, torch.zeros(batch, dtype=torch.int64, device=key.device)


def size(x: Tensor, dim: int) -> Tensor:
    """A size as a 0-d int64 tensor."""
    return torch.full((), x.shape[dim], dtype=torch.int64, device=x.device)


def advance(seen: Tensor, shift: Tensor | None, count: int) -> None:
    """Count `count` tokens more, in place; `shift` is for shift_positions."""
    seen.add_(count)


def widen(storage: Tensor, kv_heads: int, slots: int) -> Tensor:
    """Storage [B, K * P, D] as [B, K, slots, D], zeros behind P."""
    view = storage.unflatten(1, (kv_heads, -1))
    return F.pad(view, (0, 0, 0, slots - view.shape[2]))


def kept_shares(positions: Tensor, rungs: list[int]) -> tuple[Tensor, Tensor]:
    """Nothing is dropped: rung 0 of every position [B, K, C], and a share of 1 for each rung [B, R]."""
    return torch.zeros_like(positions), positions.new_ones(positions.shape[0], len(rungs), dtype=torch.float32)


def show_heads(storage: Tensor, offsets: Tensor, slots: int) -> Tensor:
    """[B, K, slots, D] zeros: shapes are traced, and a pass puts attention over the storage in their place."""
    return storage.new_zeros(*offsets.shape, slots, storage.shape[2])


def gather_functional(key: Tensor, value: Tensor, positions: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """`gather_kv` without free slots, writing nothing in place (ONNX: the runtime owns the room)."""
    if room:
        raise ValueError(f"room={room}: an exported prefill has no free slots")
    index = positions.clamp(min=0)[..., None]
    unused = (positions < 0)[..., None]

    def compact(states: Tensor) -> Tensor:
        kept = states.gather(2, index.expand(-1, -1, -1, states.shape[3]))
        return kept.masked_fill(unused, 0).flatten(1, 2)

    return compact(key), compact(value), (positions >= 0).sum(-1)


bind(dialect.Fill, fill)
bind(dialect.AppendKv, append_kv)
bind(dialect.NoteQueries, note_queries)
bind(dialect.QuantizeKv, quantize_kv)
bind(dialect.TakeBack, take_back)
bind(dialect.KeepKv, keep_kv)
bind(dialect.ExtendKv, extend_kv)
bind(dialect.Lookahead, lookahead)
bind(dialect.ReadPrompt, read_prompt)
bind(dialect.Size, size)
bind(dialect.Advance, advance)
bind(dialect.Widen, widen)
bind(dialect.GatherKv, gather_kv, onnx=gather_functional)
bind(dialect.GatherRagged, gather_ragged)
bind(dialect.HeadOffsets, offsets_and_lengths)
bind(dialect.KeptShares, kept_shares)
bind(dialect.ShowHeads, show_heads)
bind(dialect.ShareLayers, share_layers)
