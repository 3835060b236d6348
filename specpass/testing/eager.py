"""SpecKV, SnapKV and StreamingLLM in plain eager PyTorch: the oracle that compiled results are compared with.

It imports nothing of specpass and knows no model names: attention is read from what transformers itself
offers (`output_attentions`, or its attention registry for the time of one forward). Batch 1, no padding: a
row of a padded batch is compared with the row run alone. Formulas: "Draft-based Approximate Inference for
LLMs" (arXiv 2506.08373), Algorithm 1; SnapKV (2404.14469); StreamingLLM (2309.17453).

Symbols: S prompt length, L lookahead tokens, H query heads, K KV heads, G = H/K, D head size, W window, C
budget, T tokens that the scored forward reads (S + valid L).
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import DynamicCache, PreTrainedModel

from specpass.testing.attention import capture, probabilities_by_capture, probabilities_by_output


@dataclasses.dataclass(frozen=True)
class Scoring:
    """How probabilities become scores; the defaults are SpecKV's."""

    window: int = 32
    kernel: int = 7
    reduce: str = "max"  # max | mean, over the G * rows of a KV head
    pool: str = "max"  # max | avg, along the sequence
    outputs: bool = False  # scored by what rows' outputs lose, not by their attention (by the route "capture")


SPECKV = Scoring()
SNAPKV = Scoring(reduce="mean", pool="avg")


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a method keeps: `positions` [K, min(C, S)] per layer, and the `scores` [K, S - W] that chose them.

    `scores` is empty where nothing was scored (StreamingLLM, or a budget that holds the whole prompt).
    """

    positions: list[torch.Tensor]
    scores: list[torch.Tensor]


@dataclasses.dataclass(frozen=True)
class Generation:
    """New `tokens` (an EOS included) and the float32 `logits` [len(tokens), V] that chose them."""

    tokens: list[int]
    logits: torch.Tensor


def eos_ids_of(model: PreTrainedModel) -> tuple[int, ...]:
    """End-of-sequence ids in the model's generation config, which holds an int, a list or None."""
    ids = model.generation_config.eos_token_id
    if ids is None:
        return ()
    return (ids,) if isinstance(ids, int) else tuple(ids)


# -- scores and selection


def pooled_scores(probabilities: torch.Tensor, prompt_length: int, how: Scoring) -> torch.Tensor:
    """Probabilities [K, G * rows, T] -> pooled scores [K, S - W] (algorithms of SpecKV, steps 3 to 5)."""
    columns = probabilities[:, :, : prompt_length - how.window]
    reduced = columns.amax(1) if how.reduce == "max" else columns.mean(1)
    if how.pool == "max":
        return F.max_pool1d(reduced, how.kernel, stride=1, padding=how.kernel // 2)
    return F.avg_pool1d(reduced, how.kernel, stride=1, padding=how.kernel // 2, count_include_pad=True)


def top_positions(scores: torch.Tensor, prompt_length: int, budget: int, window: int) -> torch.Tensor:
    """Pooled scores [K, S - W] -> kept positions [K, C], ascending; ties go to the lower position."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices  # stable: equal scores keep their order
    top = order[:, : budget - window].sort(dim=-1).values
    tail = torch.arange(prompt_length - window, prompt_length, device=scores.device)
    return torch.cat([top, tail.expand(len(scores), -1)], dim=-1)


def everything(model: PreTrainedModel, prompt_length: int, kv_heads: int) -> Selection:
    """All S positions in every layer: what a budget C >= S keeps."""
    every = torch.arange(prompt_length).expand(kv_heads, -1)
    return Selection([every.clone() for _ in range(model.config.num_hidden_layers)], [])


def select(
    model: PreTrainedModel,
    ids: torch.Tensor,
    budget: int,
    lookahead: torch.Tensor | None = None,
    how: Scoring = SPECKV,
    route: str = "capture",
) -> Selection:
    """SpecKV (`lookahead` [1, valid L], without padding) or SnapKV (None and `how=SNAPKV`) on `ids` [1, S].

    Args:
        route: "capture" (long prompts, any dtype) or "output" (tiny float32 models).
    """
    length, kv_heads = ids.shape[1], kv_heads_of(model)
    if budget >= length:
        return everything(model, length, kv_heads)
    tokens = ids if lookahead is None else torch.cat([ids, lookahead.to(ids)], dim=1)
    rows = how.window + tokens.shape[1] - length
    if route == "output":
        return _selection(probabilities_by_output(model, tokens, rows), length, budget, how)
    return _selection(probabilities_by_capture(model, tokens, rows, how.outputs), length, budget, how)


def _selection(probabilities: list[torch.Tensor], length: int, budget: int, how: Scoring) -> Selection:
    scores = [pooled_scores(layer, length, how) for layer in probabilities]
    return Selection([top_positions(layer, length, budget, how.window) for layer in scores], scores)


def kept_attention(probabilities: torch.Tensor, kept: torch.Tensor, prompt_length: int) -> float:
    """The share of the rows' attention that pruning leaves: 1 less what falls on dropped columns of the prompt.

    Args:
        probabilities: [K, G * rows, T] of the rows that score; all of their columns, so that each row adds up to 1.
        kept: positions [K, C].
    """
    prompt = probabilities[:, :, :prompt_length].float().mean(1)  # [K, S]
    return 1.0 - float((prompt.sum(-1) - prompt.gather(-1, kept.to(prompt.device)).sum(-1)).mean())


def select_share(
    model: PreTrainedModel,
    ids: torch.Tensor,
    budgets: Sequence[int],
    share: float,
    lookahead: torch.Tensor | None = None,
    how: Scoring = SPECKV,
) -> tuple[Selection, list[list[float]]]:
    """The first of `budgets` whose selection keeps `share` of the attention in the mean over layers, else the last.

    Returns: what is kept, and of each budget, of each layer, the share that it keeps. Arguments as in `select`.
    """
    length = ids.shape[1]
    tokens = ids if lookahead is None else torch.cat([ids, lookahead.to(ids)], dim=1)
    layers = probabilities_by_capture(model, tokens, how.window + tokens.shape[1] - length)
    found, shares = [], []
    for budget in budgets:
        found.append(_selection(layers, length, min(budget, length), how))
        shares.append([kept_attention(*each, length) for each in zip(layers, found[-1].positions, strict=True)])
    enough = [sum(each) >= share * len(each) for each in shares]
    return found[enough.index(True) if True in enough else -1], shares


@dataclasses.dataclass(frozen=True)
class Prefilled:
    """One full prefill of the prompt `ids` [1, S], shared by several methods where a prefill takes a minute.

    `logits` [1, 1, V] are those of position S - 1, `rows` [K, G * W, S] per layer the window's probabilities.
    """

    model: PreTrainedModel
    ids: torch.Tensor
    cache: DynamicCache
    logits: torch.Tensor
    rows: list[torch.Tensor]


@torch.no_grad()
def prefill(model: PreTrainedModel, ids: torch.Tensor, window: int) -> Prefilled:
    """Prefill `ids` [1, S] once, with all KV pairs, and note the attention of its last `window` tokens."""
    cache = DynamicCache()
    with capture(model, window) as rows:
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    return Prefilled(model, ids, cache, logits, rows)


@torch.no_grad()
def select_shared(
    start: Prefilled, budget: int, lookahead: torch.Tensor | None = None, how: Scoring = SPECKV
) -> Selection:
    """As `select`, from a prefill that exists: the lookahead [1, valid L] follows on a copy of its cache.

    Causality makes this the same as one forward over S + L tokens, but for rounding.
    """
    length, columns = start.ids.shape[1], start.ids.shape[1] - how.window
    if budget >= length:
        return everything(start.model, length, kv_heads_of(start.model))
    if lookahead is None:
        return _selection(start.rows, length, budget, how)
    with capture(start.model, lookahead.shape[1]) as rows:
        start.model(input_ids=lookahead, past_key_values=copy.deepcopy(start.cache))
    both = [
        torch.cat([prompt[:, :, :columns], ahead[:, :, :columns]], dim=1)
        for prompt, ahead in zip(start.rows, rows, strict=True)
    ]
    return _selection(both, length, budget, how)


def select_streaming(model: PreTrainedModel, prompt_length: int, budget: int, sinks: int = 4) -> Selection:
    """StreamingLLM: the first `sinks` positions and the last C - sinks, in every layer and head."""
    if budget >= prompt_length:
        return everything(model, prompt_length, kv_heads_of(model))
    tail = torch.arange(prompt_length - (budget - sinks), prompt_length)
    kept = torch.cat([torch.arange(sinks), tail]).expand(kv_heads_of(model), -1)
    return Selection([kept.clone() for _ in range(model.config.num_hidden_layers)], [])


def kv_heads_of(model: PreTrainedModel) -> int:
    """K; families without grouped heads have no field for it."""
    return getattr(model.config, "num_key_value_heads", None) or model.config.num_attention_heads


def score_margin(scores: torch.Tensor, kept: torch.Tensor, window: int) -> float:
    """Smallest kept minus largest dropped score, the least over the KV heads: >= -1e-6 for a right selection.

    Args:
        scores: pooled scores [K, S - W]. kept: positions [K, C] under test, the window's included.
    """
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(1, kept[:, : kept.shape[1] - window].to(scores.device), True)
    low = scores.masked_fill(~chosen, float("inf")).amin(-1)
    high = scores.masked_fill(chosen, float("-inf")).amax(-1)
    return float((low - high).min())


# -- generation


@torch.no_grad()
def _greedy(
    model: PreTrainedModel,
    ids: torch.Tensor,
    steps: int,
    eos_ids: Sequence[int],
    vocab_size: int | None = None,
    keep: Sequence[torch.Tensor] | None = None,
    start: Prefilled | None = None,
    ahead: Sequence[int] = (),
) -> Generation:
    """Prefill `ids` [1, S] or take `start`, prune to `keep` (positions [K, C] per layer), decode greedily.

    Verified lookahead: nothing is pruned before the first token that is not the one of `ahead`.
    """
    length = ids.shape[1]
    if start is None:
        cache = DynamicCache()
        logits = model(input_ids=ids, past_key_values=cache, logits_to_keep=1).logits
    else:
        cache, logits = copy.deepcopy(start.cache), start.logits
    tokens: list[int] = []
    seen: list[torch.Tensor] = []
    while True:
        seen.append(logits[0, -1, :vocab_size].float())
        tokens.append(int(seen[-1].argmax()))
        if len(tokens) == steps or tokens[-1] in eos_ids:
            return Generation(tokens, torch.stack(seen))
        if keep is not None and tokens != list(ahead[: len(tokens)]):
            answer = torch.arange(length, length + len(tokens) - 1, device=ids.device)
            prune(cache, [torch.cat([kept, answer.expand(len(kept), -1).to(kept)], 1) for kept in keep])
            keep = None
        # the position is the logical one: a pruned cache holds fewer slots than the tokens it stands for
        position = torch.full_like(ids[:, :1], length + len(tokens) - 1)
        logits = model(
            input_ids=torch.full_like(position, tokens[-1]), position_ids=position, past_key_values=cache
        ).logits


def prune(cache: DynamicCache, positions: Sequence[torch.Tensor]) -> None:
    """Keep the slots `positions` [K, C] of each layer's keys and values [1, K, S, D], in place."""
    for layer, kept in zip(cache.layers, positions, strict=True):
        index = kept.to(layer.keys.device)[None, :, :, None].expand(-1, -1, -1, layer.keys.shape[-1])
        layer.keys, layer.values = layer.keys.gather(2, index), layer.values.gather(2, index)


def generate(
    target: PreTrainedModel,
    ids: torch.Tensor,
    positions: Sequence[torch.Tensor] | None,
    max_new_tokens: int,
    eos_ids: Sequence[int] | None = None,
    start: Prefilled | None = None,
    ahead: Sequence[int] = (),
) -> Generation:
    """Greedy decoding of `ids` [1, S] over the kept `positions` (one [K, C] per layer; None keeps all).

    The first token comes from the full prefill; the next ones see C + t slots and are numbered from S on.

    Args:
        eos_ids: default the ids of the target's generation config.
        start: a prefill of `ids` to go on from; it is left as it is.
        ahead: lookahead tokens: as long as the answer is these, it is decoded with all KV (verified lookahead).
    """
    stops = eos_ids_of(target) if eos_ids is None else eos_ids
    return _greedy(target, ids, max_new_tokens, stops, keep=positions, start=start, ahead=ahead)


def generate_full(
    target: PreTrainedModel, ids: torch.Tensor, max_new_tokens: int, eos_ids: Sequence[int] | None = None
) -> Generation:
    """Greedy decoding of `ids` [1, S] with all KV pairs."""
    return generate(target, ids, None, max_new_tokens, eos_ids)


def draft_lookahead(
    draft: PreTrainedModel,
    ids: torch.Tensor,
    lookahead: int,
    pad_id: int = 0,
    eos_ids: Sequence[int] | None = None,
    vocab_size: int | None = None,
) -> tuple[torch.Tensor, int]:
    """The draft's greedy continuation of `ids` [1, S]: ([1, L] ids, number of valid rows).

    The first EOS is a valid row; `pad_id` follows it.

    Args:
        eos_ids: default the ids of the draft's generation config.
        vocab_size: logits from this id on are left out (the smaller of the two padded vocabularies).
    """
    stops = eos_ids_of(draft) if eos_ids is None else eos_ids
    tokens = _greedy(draft, ids, lookahead, stops, vocab_size).tokens
    padded = tokens + [pad_id] * (lookahead - len(tokens))
    return torch.tensor([padded], device=ids.device), len(tokens)
