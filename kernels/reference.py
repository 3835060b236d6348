"""Plain aten references of the operators that pruned graphs hold: readable, exact, any device.

Symbols: B batch, S prompt length, L lookahead, T = S + L columns, H query heads, K key/value heads, G = H / K,
D head dimension, W window, C budget, N room for generated tokens, P = C + N slots, R query rows that score.
Rows are packed: row b's tokens stand at 0 .. lengths[b] - 1, whatever padding the caller had.
Formulas: arXiv 2506.08373; SnapKV (2404.14469).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ROWS = 256  # query rows whose logits are held at once where no flash attention serves


def pack_order(attention_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Columns of each row with the real tokens first.

    Args: attention_mask [B, S], nonzero where a token is real.
    Returns: order [B, S] int64 (packed column -> original column), lengths [B] int64.
    """
    real = attention_mask != 0
    order = torch.argsort(torch.logical_not(real).to(torch.int8), dim=1, stable=True)
    return order, real.sum(1)


def pack_ids(ids: Tensor, order: Tensor) -> Tensor:
    """[B, S] ids with the real tokens first, by `order` [B, S]."""
    return ids.gather(1, order)


def append_ids(ids: Tensor, extra: Tensor, lengths: Tensor) -> Tensor:
    """[B, S] packed ids -> [B, S + L]: row b's `extra` [B, L] stands right behind its lengths[b] tokens."""
    length = extra.shape[1]
    out = F.pad(ids, (0, length))
    index = lengths[:, None] + torch.arange(length, device=ids.device)
    return out.scatter(1, index, extra.to(ids.dtype))


def append_positions(positions: Tensor, lengths: Tensor, length: int) -> Tensor:
    """[B or 1, S] packed position ids -> [B, S + L]; the lookahead goes on counting from each row's last token."""
    batch, size = lengths.shape[0], positions.shape[1]
    column = torch.arange(size + length, device=positions.device).expand(batch, -1)
    source = torch.minimum(column, (lengths - 1)[:, None])
    packed = positions.expand(batch, -1).gather(1, source)
    return packed + (column - source).to(positions.dtype)


def take_positions(hidden: Tensor, index: Tensor) -> Tensor:
    """[B, T, E] hidden states at index [B, M] -> [B, M, E]."""
    return hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[2]))


def unpack_index(order: Tensor) -> Tensor:
    """Inverse of the packing order [B, S]: original column -> packed column."""
    return torch.argsort(order, dim=1)


def score_rows(lengths: Tensor, lookahead_ids: Tensor | None, window: int, eos_ids: list[int]) -> Tensor:
    """Positions of the query rows that score: the last W prompt rows and the lookahead rows.

    Args: lengths [B]; lookahead_ids [B, L] or None; a sequence's first EOS counts, the rows after it do not.
    Returns: rows [B, W + L] int64, -1 where there is none.
    """
    rows = torch.arange(-window, 0, device=lengths.device)[None, :] + lengths[:, None]
    rows = rows.clamp(min=-1)
    if lookahead_ids is None:
        return rows
    length = lookahead_ids.shape[1]
    ahead = lengths[:, None] + torch.arange(length, device=lengths.device)
    ended = torch.zeros_like(lookahead_ids, dtype=torch.bool)
    for eos in eos_ids:
        ended = ended | (lookahead_ids == eos)
    after = ended.cumsum(1) - ended.to(torch.int64)
    return torch.cat([rows, ahead.masked_fill(after > 0, -1)], 1)


def take_rows(query: Tensor, rows: Tensor) -> Tensor:
    """[B, H, T, D] queries at rows [B, R] (-1 reads row 0, which `importance` then leaves out) -> [B, H, R, D]."""
    index = rows.clamp(min=0)[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3])
    return query.gather(2, index)


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
    """Attention probability that each prompt column gets from the query rows, reduced over the rows of a KV head.

    Args: query [B, H, R, D]; key [B, K, T, D]; rows [B, R] positions (-1: left out); lengths [B] prompt lengths;
    reduce "max", "mean" or "sum"; weights [R] float32 >= 0 of the rows, or None; lse [B, H, R] float32: the rows'
    natural log-sum-exp over the columns that they see, where `prefill_attention_lse` found it already; softcap, sinks:
    as `modified_attention`.
    Returns: scores [B, K, T] float32; columns outside [0, lengths - W) are 0.
    """
    batch, heads, count, dim = query.shape
    kv_heads, columns = key.shape[1], key.shape[2]
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * count, dim).float()  # K is never repeated to H heads
    logits = soft_capped(torch.matmul(folded, key.float().transpose(2, 3)) * scale, softcap)
    column = torch.arange(columns, device=key.device)
    hidden = (column > rows[:, :, None])[:, None, None]  # [B, 1, 1, R, T]
    logits = logits.view(batch, kv_heads, group, count, columns).masked_fill_(hidden, float("-inf"))
    live = rows >= 0
    if lse is None:
        probabilities = softmax_with_sinks(logits, None if sinks is None else sinks.view(kv_heads, group, 1))
        probabilities = probabilities.masked_fill(~live[:, None, None, :, None], 0.0)
        if weights is not None:
            probabilities = probabilities * weights[:, None]
        scores = probabilities.amax(dim=(2, 3)) if reduce == "max" else probabilities.sum(dim=(2, 3))
    else:  # in place, and one exponential a column for "max": no second array of rows x columns
        norm = lse.reshape(batch, kv_heads, group, count, 1).masked_fill(~live[:, None, None, :, None], 0.0)
        logits.sub_(norm if weights is None else norm - weights.log()[:, None])
        scores = logits.amax(dim=(2, 3)).exp_() if reduce == "max" else logits.exp_().sum(dim=(2, 3))
    if reduce == "mean":
        scores = scores / (group * live.sum(1).clamp(min=1))[:, None, None]
    return scores.masked_fill((column >= (lengths - window)[:, None])[:, None], 0.0)


def select(scores: Tensor, lengths: Tensor, budget: int, window: int, kernel: int, pool: str) -> Tensor:
    """Pooled scores -> kept positions: the top C - W, ties to the lower position, and the last W.

    Args: scores [B, K, T] float32, 0 outside the scored columns; lengths [B].
    Returns: positions [B, K, C] int64, ascending; unused slots -1.
    """
    kv_heads, columns = scores.shape[1:]
    pad = kernel // 2
    pooled = F.max_pool1d(scores, kernel, 1, pad) if pool == "max" else F.avg_pool1d(scores, kernel, 1, pad)
    top = budget - window
    column = torch.arange(columns, device=scores.device)
    outside = (column >= (lengths - window)[:, None])[:, None]
    pooled = F.pad(pooled.masked_fill(outside, -1.0), (0, top), value=-1.0)  # T may be shorter than C - W
    # A stable sort keeps equal scores in order of position, which torch.topk does not promise.
    values, index = torch.sort(pooled, dim=-1, descending=True, stable=True)
    never = columns + budget
    best = index[..., :top].masked_fill(values[..., :top] < 0, never)
    last = torch.arange(-window, 0, device=scores.device) + lengths[:, None]
    last = last.masked_fill(last < 0, never)[:, None].expand(-1, kv_heads, -1)
    return _ascending(torch.cat([best, last], -1), never)


def select_recent(lengths: Tensor, kv_heads: int, budget: int, sinks: int) -> Tensor:
    """The first `sinks` and the last C - sinks positions: [B, K, C] int64, ascending; unused slots -1."""
    slot = torch.arange(budget, device=lengths.device)
    shift = (lengths - budget).clamp(min=0)[:, None]
    positions = torch.where(slot < sinks, slot, slot + shift)
    positions = positions.masked_fill(positions >= lengths[:, None], -1)
    return positions[:, None].expand(-1, kv_heads, -1).contiguous()


def _ascending(positions: Tensor, never: int) -> Tensor:
    ordered = positions.sort(-1).values
    return ordered.masked_fill(ordered >= never, -1)


def gather_kv(key: Tensor, value: Tensor, positions: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compact K and V into the cache's storage.

    Args: key [B, K, T, D], value [B, K, T, Dv]; positions [B, K, C] (-1: unused); room N.
    Returns: keys [B, K * (C + N), D], values [B, K * (C + N), Dv], lengths [B, K] int64 (slots in use).
    """
    batch, kv_heads, budget = positions.shape
    index = positions.clamp(min=0)[..., None]
    unused = (positions < 0)[..., None]

    def compact(states: Tensor) -> Tensor:
        dim = states.shape[3]
        storage = states.new_zeros(batch, kv_heads, budget + room, dim)
        kept = states.gather(2, index.expand(-1, -1, -1, dim)).masked_fill(unused, 0)
        storage[:, :, :budget] = kept
        return storage.view(batch, kv_heads * (budget + room), dim)

    return compact(key), compact(value), (positions >= 0).sum(-1)


def keep_all(lengths: Tensor, kv_heads: int, budget: int) -> Tensor:
    """Positions [B, K, C] of rows that fit the budget: 0 .. lengths[b] - 1, then -1."""
    slot = torch.arange(budget, device=lengths.device)
    positions = torch.where(slot < lengths[:, None], slot, -1)
    return positions[:, None].expand(-1, kv_heads, -1).contiguous()


def keep_kv(key: Tensor, value: Tensor, lengths: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor]:
    """Storage of the draft: all of K and V and room for its own tokens, which overwrite a short row's padding.

    Returns: as `gather_kv`.
    """
    kv_heads = key.shape[1]
    keys, values = (F.pad(states, (0, 0, 0, room)).flatten(1, 2) for states in (key, value))
    return keys, values, lengths[:, None].repeat(1, kv_heads)


def fill(key: Tensor, value: Tensor, room: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Keep every KV pair: what the traced graph says before any pass, and what a refused graph runs.

    Returns: as `gather_kv`, and positions [B, K, S].
    """
    batch, kv_heads, size = key.shape[:3]
    positions = torch.arange(size, device=key.device).expand(batch, kv_heads, -1).contiguous()
    return *gather_kv(key, value, positions, room), positions


def append_kv(keys: Tensor, values: Tensor, lengths: Tensor, key: Tensor, value: Tensor) -> None:
    """Write q new KV pairs behind the slots in use, in place, and advance `lengths`.

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K]; key [B, K, q, D], value [B, K, q, Dv].
    """
    batch, kv_heads, count = key.shape[:3]
    slot = (lengths[:, :, None] + torch.arange(count, device=key.device))[..., None]

    def write(storage: Tensor, new: Tensor) -> None:
        view = storage.view(batch, kv_heads, -1, new.shape[3])
        view.scatter_(2, slot.expand(-1, -1, -1, new.shape[3]), new)

    write(keys, key)
    write(values, value)
    lengths.add_(count)


def extend_kv(keys: Tensor, values: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Storage of a cache that keeps everything, one step on: [B, K, n, D] and [B, K, q, D] -> [B, K * (n + q), D]."""
    return torch.cat([keys, key], 2).flatten(1, 2), torch.cat([values, value], 2).flatten(1, 2)


def attend(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """Budgeted attention of q new queries; the GQA group is folded into the query length.

    Args: query [B, H, q, D]; keys [B, K, P, D], values [B, K, P, Dv]; lengths [B, K] with the q new slots counted;
    softcap, sinks: as `modified_attention`.
    Returns: [B, H, q, Dv]; query i reads the slots below lengths - (q - 1 - i).
    """
    batch, heads, count, dim = query.shape
    group = heads // keys.shape[1]
    mask = slots_read(lengths, count, keys.shape[2], group)
    if softcap or sinks is not None:
        return modified_attention(query, keys, values, mask.unflatten(2, (-1, count)), scale, softcap, sinks)
    folded = query.reshape(batch, keys.shape[1], group * count, dim)
    out = F.scaled_dot_product_attention(folded, keys, values, attn_mask=mask, scale=scale)
    return out.reshape(batch, heads, count, values.shape[3])


def slots_read(lengths: Tensor, count: int, slots: int, group: int) -> Tensor:
    """Mask [B, K, 1 or G * q, P] of `attend`: which of P slots each of q queries reads."""
    limit = lengths[:, :, None] - torch.arange(count - 1, -1, -1, device=lengths.device)  # [B, K, q]
    mask = torch.arange(slots, device=lengths.device) < limit[..., None]  # [B, K, q, P]
    if count > 1:
        mask = mask[:, :, None].expand(-1, -1, group, -1, -1).reshape(*lengths.shape, group * count, slots)
    return mask


def soft_capped(logits: Tensor, softcap: float) -> Tensor:
    """softcap * tanh(logits / softcap), as Gemma 2 has it (arXiv 2408.00118); 0 caps nothing."""
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def softmax_with_sinks(logits: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax in float32 over the last axis and, where there are sinks, one logit more that belongs to no key.

    Args: logits [..., M, T]; sinks, broadcast to [..., M]: each row's further logit (gpt-oss, arXiv 2508.10925).
    """
    if sinks is None:
        return torch.softmax(logits, dim=-1, dtype=torch.float32)
    column = sinks.to(logits.dtype).expand(logits.shape[:-1])[..., None]
    return torch.softmax(torch.cat([logits, column], -1), dim=-1, dtype=torch.float32)[..., :-1]


def modified_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """Attention whose logits are soft-capped, or whose softmax has a sink: what eager models compute.

    Args: query [B, H, q, D]; key [B, K, T, D], value [B, K, T, Dv]; mask: True where a query reads, or added to the
    logits, broadcast to [B, H, q, T] or [B, K, G, q, T]; softcap: 0 for none; sinks [H] natural logits.
    Returns: [B, H, q, Dv].
    """
    batch, heads, count, dim = query.shape
    kv_heads = key.shape[1]
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * count, dim)
    logits = soft_capped(torch.matmul(folded, key.transpose(2, 3)) * scale, softcap)
    logits = logits.view(batch, kv_heads, group, count, key.shape[2])
    if mask is not None:
        if mask.dim() == 4:
            mask = mask[:, :, None] if mask.shape[1] == 1 else mask.unflatten(1, (kv_heads, group))
        logits = logits.masked_fill(~mask, float("-inf")) if mask.dtype == torch.bool else logits + mask
    weights = softmax_with_sinks(logits, None if sinks is None else sinks.view(kv_heads, group, 1))
    out = torch.matmul(weights.to(value.dtype).flatten(2, 3), value)
    return out.view(batch, heads, count, value.shape[3])


def prefill_modified(
    query: Tensor, key: Tensor, value: Tensor, scale: float, softcap: float, sinks: Tensor | None
) -> Tensor:
    """`prefill_attention` with a soft cap or sinks, for ROWS queries at a time: never [T, T] logits."""
    columns = torch.arange(key.shape[2], device=key.device)
    parts = []
    for start in range(0, query.shape[2], ROWS):
        seen = min(start + ROWS, query.shape[2])
        mask = (columns[:seen] <= columns[start:seen, None])[None, None]
        parts.append(
            modified_attention(
                query[:, :, start:seen], key[:, :, :seen], value[:, :, :seen], mask, scale, softcap, sinks
            )
        )
    return torch.cat(parts, 2)


def prefill_with_sinks(query: Tensor, key: Tensor, value: Tensor, scale: float, sinks: Tensor) -> Tensor:
    """`prefill_attention` with sinks [H]: flash attention, each row scaled by the share that its sink leaves."""
    every = torch.arange(query.shape[2], device=query.device).expand(query.shape[0], -1)
    out, lse = prefill_attention_lse(query, key, value, every, scale)
    return out * torch.sigmoid(lse - sinks.float()[:, None])[..., None].to(out.dtype)


def prefill_attention(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    """Causal attention of packed rows: [B, H, T, D] x [B, K, T, D] -> [B, H, T, Dv]; needs no mask.

    One call per member of the GQA group, each on views, so that K and V are never repeated to H heads.
    """
    batch, heads, columns = query.shape[:3]
    group = heads // key.shape[1]
    if group == 1:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    out = query.new_empty(batch, columns, heads, value.shape[3]).transpose(1, 2)
    for member in range(group):
        out[:, member::group] = F.scaled_dot_product_attention(
            query[:, member::group], key, value, is_causal=True, scale=scale
        )
    return out


def prefill_attention_lse(
    query: Tensor, key: Tensor, value: Tensor, rows: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """`prefill_attention`, and the log-sum-exp of the rows that score, which aten's flash attention finds on its way.

    Args: query [B, H, T, D], key and value [B, K, T, D], 16-bit on CUDA; rows [B, R] positions (-1 reads row 0).
    Returns: [B, H, T, D]; lse [B, H, R] float32, natural.
    """
    batch, heads, columns = query.shape[:3]
    group, index = heads // key.shape[1], rows.clamp(min=0)[:, None]
    if query.device.type != "cpu":  # reads K and V of a group once, without repeating them
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, True, scale=scale)[:2]
        return out, lse.gather(2, index.expand(-1, heads, -1))
    out = query.new_empty(batch, columns, heads, value.shape[3]).transpose(1, 2)
    lse = query.new_empty(batch, heads, rows.shape[1], dtype=torch.float32)
    for member in range(group):
        part, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[:, member::group], key, value, 0.0, True, scale=scale
        )
        out[:, member::group] = part
        lse[:, member::group] = sums.gather(2, index.expand(-1, key.shape[1], -1))
    return out, lse


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
    """`append_kv` of one token, then `attend`: [B, H, 1, Dv].

    Args: keys [B, K * P, D], values [B, K * P, Dv], lengths [B, K], changed in place; query [B, H, 1, D];
    key [B, K, 1, D], value [B, K, 1, Dv].
    """
    append_kv(keys, values, lengths, key, value)
    keys, values = (states.unflatten(1, (key.shape[1], -1)) for states in (keys, values))
    return attend(query, keys, values, lengths, scale, softcap, sinks)


def _hash_uniform(seed: int, step: int, size: int, device: torch.device) -> Tensor:
    """[size] floats in (0, 1) from a counter: splitmix64's mixing of (seed, step, index), the same on any device."""
    start = ((seed * 1_000_003 + step) * 0x9E3779B9 + (1 << 63)) % (1 << 64) - (1 << 63)  # wraps to int64
    counter = torch.arange(size, dtype=torch.int64, device=device) + start
    mixed = counter * -7046029254386353131
    mixed = (mixed ^ ((mixed >> 30) & 0x3FFFFFFFF)) * -4658895280553007687
    mixed = (mixed ^ ((mixed >> 27) & 0x1FFFFFFFFF)) * -7723592293110705685
    mixed = mixed ^ ((mixed >> 31) & 0x1FFFFFFFF)
    return ((mixed & 0xFFFFFFFFFFFF).double() + 0.5) / float(1 << 48)


def next_token(
    logits: Tensor, ended: Tensor, vocab: int, temperature: float, seed: int, step: int, eos_ids: list[int], pad_id: int
) -> tuple[Tensor, Tensor]:
    """The draft's next token of each row.

    Args: logits [B, M, V], the last of M is read, ids >= vocab are masked out; ended [B] bool. temperature 0.0 is
    greedy; above, Gumbel noise from a counter makes the draw depend on (seed, step) alone, not on the batch.
    Returns: ids [B, 1] int64 (pad_id where the row had ended), ended [B] bool.
    """
    last = logits[:, -1, :vocab]
    if temperature > 0:
        noise = -torch.log(-torch.log(_hash_uniform(seed, step, vocab, logits.device)))
        last = last.double() / temperature + noise
    ids = torch.argmax(last, dim=-1).masked_fill(ended, pad_id)
    for eos in eos_ids:
        ended = ended | (ids == eos)
    return ids[:, None], ended
