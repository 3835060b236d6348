"""The oracle: transformers' own generate without any cache, over an attention that is spelled out here.

It imports nothing of specpass. Every step reads the whole sequence anew; a row behind the prompt sees of the prompt
only the positions that it is told were kept, and everything behind the prompt. Prompt rows see what the model lets
them see, and so do an answer's first tokens, as long as they are the lookahead's (verified lookahead).

Symbols: B rows (beams and returned sequences included), T columns, S prompt columns (padding included), H query heads,
K KV heads, D head size, W + L rows that score.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from bench.fuzz import evictions
from bench.fuzz.evictions import Event

NAME = "plain_oracle"


@dataclasses.dataclass
class View:
    """What rows behind the prompt see of it.

    Args:
        starts: [prompts] columns of padding in front of each prompt; rows of one prompt are neighbours.
        prompt: S. kept: layer -> positions [prompts, K, C], -1 where unused; layers that are missing see everything.
        mask: [prompts, columns so far] 0 where padding stands; none of what is generated is.
        rows: probabilities of the last so many rows, [B, H, rows, T], and values [B, K, T, Dv] are noted in `found`,
            by layer.
        ahead: [prompts, L] lookahead tokens, which an answer follows for `limit` tokens at most.
        followed: [B] tokens of each row that are, of the call that runs.
        bits: in which what was kept of a prompt is held, 8, 4 or 2; 0: as it is.
        near: whether rounding may have decided: some number of that lay in the middle of two codes, or a router gave
            two experts as much, of which it chose one.
        events: evictions of what stands behind the prompt, in order (see evictions.py).
        states: layer -> queries with the scale in them, and keys, of all columns of the last call.
        windows: layer -> columns that a row reads, None where it reads all: noted of each layer that has attention.
    """

    starts: Tensor
    prompt: int
    kept: dict[int, Tensor] = dataclasses.field(default_factory=dict)
    rows: int = 0
    mask: Tensor | None = None
    ahead: Tensor | None = None
    limit: int = 0
    followed: Tensor | None = None
    bits: int = 0
    near: bool = False
    events: list[Event] = dataclasses.field(default_factory=list)
    states: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    found: dict[int, tuple[Tensor, Tensor]] = dataclasses.field(default_factory=dict)
    windows: dict[int, int | None] = dataclasses.field(default_factory=dict)

    def allowed(self, batch: int, heads: int, tokens: int, layer: int, window: int | None) -> Tensor:
        """[B, H, T, T]: whether row i reads column j."""
        row, column = torch.arange(tokens)[:, None], torch.arange(tokens)[None]
        shown = column >= self.starts[:, None]  # [prompts, T]
        if self.mask is not None:
            shown = shown & torch.nn.functional.pad(self.mask.bool(), (0, tokens - self.mask.shape[1]), value=True)
        shown = shown.repeat_interleave(batch // len(shown), 0)
        seen = ((column <= row) & shown[:, None, None]).expand(batch, heads, -1, -1)
        if window is not None:  # of tokens: padding between turns takes no place in it
            place = shown.cumsum(-1)[:, None]
            return seen & (place[..., None] - place[..., None, :] < window) | (row == column)
        if layer in self.kept:
            kept = self.kept[layer]
            held = torch.zeros(*kept.shape[:2], self.prompt + 1, dtype=torch.bool)
            place = torch.where(kept < 0, self.prompt, kept + self.starts[:, None, None])  # the last column: unused
            held.scatter_(2, place, True)
            held = torch.nn.functional.pad(held[:, :, :-1], (0, tokens - self.prompt), value=True)
            held = held.repeat_interleave(batch // len(kept), 0)
            rows, events = held[:, :, None], [event for event in self.events if event.layer == layer]
            if events:
                rows = evictions.shown(events, self.prompt, *self.columns(batch, tokens), held)
            seen = seen & (rows.repeat_interleave(heads // kept.shape[1], 1) | (row < self.whole))
        return seen | (row == column)  # rows of padding read themselves, which nobody reads

    def columns(self, batch: int, tokens: int) -> tuple[list[int], list[list[int]]]:
        """Of each of B rows the first column of its prompt, and those of its tokens behind it."""
        prompts = len(self.starts)
        mask = torch.ones(prompts, tokens) if self.mask is None else self.mask
        mask = torch.nn.functional.pad(mask, (0, tokens - mask.shape[1]), value=1)
        answers = [(own[self.prompt :].nonzero()[:, 0] + self.prompt).tolist() for own in mask]
        own = [prompt for prompt in range(prompts) for _ in range(batch // prompts)]
        return [int(self.starts[prompt]) for prompt in own], [answers[prompt] for prompt in own]

    @property
    def whole(self) -> int | Tensor:
        """Rows, [B, 1, 1, 1] or one number, that see the prompt as it is."""
        return self.prompt if self.followed is None else self.prompt + self.followed[:, None, None, None]

    def held(self, states: Tensor, layer: int, along: int) -> Tensor:
        """Keys (`along` 0, their slots) or values (`along` 1, their numbers) [B, K, T, D] as the cache holds them."""
        found, kept = states.clone(), self.kept[layer]
        for row, own in enumerate(found):
            prompt = row // (len(states) // len(kept))
            for head, place in enumerate(kept[prompt]):
                columns = place[place >= 0] + self.starts[prompt]
                own[head, columns], near = in_bits(own[head, columns], self.bits, along)
                self.near = self.near or near
        return found

    def follow(self, ids: Tensor) -> None:
        """Count, of ids [B, T], the tokens behind the prompt that are the lookahead's."""
        if self.ahead is None:
            return
        ahead = self.ahead.repeat_interleave(len(ids) // len(self.ahead), 0)
        answer = ids[:, self.prompt :][:, : min(self.limit, ahead.shape[1])]
        self.followed = (answer == ahead[:, : answer.shape[1]]).long().cumprod(1).sum(1)


def in_bits(states: Tensor, bits: int, along: int) -> tuple[Tensor, bool]:
    """[n, D] and back again: KIVI's groups of 64 (arXiv 2402.02750), a row of numbers whole where it is no multiple.

    2 bits have what GEAR adds (arXiv 2403.05527): the number of each group that is farthest from its mean is kept as it
    is, and of what the others miss the two columns of largest weight, by two rounds of power iteration from cosines.

    Returns: that, and whether a number lay so near the middle between two codes that rounding may decide.
    """
    size = 64 if along == 0 or states.shape[1] % 64 == 0 else states.shape[1]
    parts, apart, near = [], [], False
    for group in states.split(size, along):
        far = torch.zeros_like(group, dtype=torch.bool)
        if bits == 2:
            away = (group - group.mean(along, keepdim=True)).abs()
            far.scatter_(along, away.argmax(along, keepdim=True), True)
            two = away.topk(min(2, away.shape[along]), along).values
            near |= two.shape[along] == 2 and bool((two.diff(dim=along).abs() < CLOSE_CODES).any()) and len(states) > 2
        low = torch.where(far, torch.inf, group).amin(along, keepdim=True)
        high = torch.where(far, -torch.inf, group).amax(along, keepdim=True)
        step = ((high - low) / (2**bits - 1)).nan_to_num(0.0, 0.0, 0.0).clamp(min=1e-30)
        place = ((group - low) / step).masked_fill(far | (step <= 1e-30), 0.0)
        near |= bool(((place - place.floor() - 0.5).abs() < CLOSE_CODES).any())
        parts.append(torch.where(far, group, low + step * place.round()))
        apart.append(far)
    made, far = torch.cat(parts, along), torch.cat(apart, along)
    if bits != 2:
        return made, near
    missing = (states - made).masked_fill(far, 0.0)
    index = torch.arange(states.shape[1] * 2, dtype=torch.float32).view(-1, 2)
    span = torch.cos(index * index + index)
    for _ in range(2):
        span = torch.linalg.qr(missing.T @ (missing @ span))[0]
    return torch.where(far, states, made + missing @ span @ span.T), near


CLOSE_CODES = 1e-5  # of a step between two codes
CLOSE_EXPERTS = 5e-5  # between a router's logits
_views: list[View] = []


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Any,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    """Softmax attention of query [B, H, T, D] over key and value [B, K, T, D], all in float32."""
    view = _views[-1]
    view.windows[module.layer_idx] = sliding_window
    batch, heads, tokens, size = query.shape
    view.states[module.layer_idx] = query.float() * (size**-0.5 if scaling is None else scaling), key.float()
    scale, as_it_is = size**-0.5 if scaling is None else scaling, torch.arange(tokens)[:, None] < view.whole
    pairs = [(key, value)]
    if view.bits and module.layer_idx in view.kept:
        pairs += [(view.held(key, module.layer_idx, 0), view.held(value, module.layer_idx, 1))]
    pairs = [tuple(states.repeat_interleave(heads // states.shape[1], 1).float() for states in pair) for pair in pairs]
    both = [query.float() @ own.transpose(-1, -2) * scale for own, _ in pairs]
    scores = torch.where(as_it_is, both[0], both[-1])
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~view.allowed(batch, heads, tokens, module.layer_idx, sliding_window), float("-inf"))
    if s_aux is not None:
        scores = torch.cat([scores, s_aux.float().view(1, heads, 1, 1).expand(batch, -1, tokens, 1)], -1)
    weights = scores.softmax(-1)[..., :tokens]
    if view.rows:
        view.found[module.layer_idx] = weights[:, :, -view.rows :], value.float()
    out = torch.where(as_it_is, weights @ pairs[0][1], weights @ pairs[-1][1])
    return out.transpose(1, 2).to(query.dtype), weights


ALL_ATTENTION_FUNCTIONS.register(NAME, attend)


def watch_experts(router: Any, args: tuple[Tensor], _: Any) -> None:
    """A hook of a router, Linear with `top_k`: near the least chosen expert of some token stands one that is not."""
    logits = torch.nn.functional.linear(args[0].flatten(0, -2), router.weight, getattr(router, "bias", None))
    if _views and router.top_k < logits.shape[-1]:
        least = logits.topk(router.top_k + 1).values[:, -2:]
        _views[-1].near |= bool((least[:, 0] - least[:, 1] < CLOSE_EXPERTS).any())


@contextlib.contextmanager
def seen_by(view: View) -> Iterator[View]:
    """Models with the oracle's attention read through `view`."""
    _views.append(view)
    try:
        yield view
    finally:
        _views.pop()


def generate(model: Any, ids: Tensor, view: View, **options: Any) -> Any:
    """transformers' generate of `ids` [B, S'] without a cache; the result with what `options` ask for."""
    hook = model.register_forward_pre_hook(lambda _, args, call: view.follow(call["input_ids"]), with_kwargs=True)
    try:
        with seen_by(view):
            return model.generate(input_ids=ids, attention_mask=view.mask, use_cache=False, **options)
    finally:
        hook.remove()


@torch.no_grad()
def windows(model: Any) -> dict[int, int | None]:
    """`View.windows` of a model: what its layers tell their attention, whatever its config calls them."""
    with seen_by(View(torch.zeros(1, dtype=torch.int64), 1)) as view:
        model(input_ids=torch.ones(1, 1, dtype=torch.int64), use_cache=False)
    return view.windows


@torch.no_grad()
def probabilities(model: Any, ids: Tensor, rows: int) -> dict[int, tuple[Tensor, Tensor]]:
    """Of each layer that has attention that of the last `rows` tokens of `ids` [1, T], [H, rows, T], and all values
    [K, T, Dv]."""
    view = View(torch.zeros(1, dtype=torch.int64), ids.shape[1], rows=rows)
    with seen_by(view):
        model(input_ids=ids, use_cache=False)
    return {layer: (weights[0], values[0]) for layer, (weights, values) in view.found.items()}
