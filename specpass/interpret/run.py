"""One call of a target that runs uncompiled: a prompt in one or two phases, or tokens behind it."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specpass.cache.budget import BudgetCache
from specpass.cache.prompt import check_gradients, check_prompt, positions_of, tokens_of
from specpass.cache.protocol import BudgetLayer
from specpass.cache.states import StateLayer
from specpass.capture.rope import rope_as_it_was
from specpass.dialect.define import SPEC
from specpass.errors import PositionsError, UnsupportedCallError
from specpass.interpret.beside import features, positions_for, types_mask
from specpass.interpret.compress import Part, compressed
from specpass.interpret.draft import Written
from specpass.interpret.keep import Keeper
from specpass.interpret.lookahead import ReadAhead, borrow_attributes, reads_initial_states
from specpass.interpret.prompt import ReadPrompt, ReadWhole
from specpass.interpret.rows import Packing
from specpass.interpret.steps import Steps, block_packing
from specpass.interpret.watch import Listener
from specpass.observe.layers import reading_by_layers
from specpass.reports.record import PromptRecord, SiteRecord
from specpass.rewrite import Refusal

Write = Callable[[Tensor, "Tensor | None", Packing, int, dict[str, Any]], Written]
KEPT = ("use_cache", "return_dict", "output_hidden_states", "past_key_values")  # of a call whose prompt is compressed


@dataclasses.dataclass
class Call:
    """A target, a cache and the caller's arguments.

    Args:
        write: (ids [B, S], mask, packing, L, the call) -> what the draft writes.
        eos_ids: of the draft.
        context: positions that the draft can read, or None.
    """

    target: nn.Module
    cache: BudgetCache
    kwargs: dict[str, Any]
    write: Write | None = None
    eos_ids: tuple[int, ...] = ()
    context: int | None = None

    def __call__(self) -> tuple[Any, PromptRecord | None]:
        """The model's output, and of a prompt what was done to it."""
        check_gradients(self.target.parameters())
        if self.cache.filled:
            return self._step(), None
        try:
            return self._prompt()
        except BaseException:
            self.cache.reset()  # layers that were filled before the error are of no use
            raise

    def whole(self) -> Any:
        """A prompt without pruning: the model's output, exact; the cache keeps everything."""
        cache, kwargs = self.cache, dict(self.kwargs)
        like = tokens_of(kwargs)
        mask = kwargs.get("attention_mask")
        padded = isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask.all())
        cache.columns = 0
        out = self._forward(ReadWhole(cache), kwargs)
        cache.columns, cache.read_mask = like.shape[1], mask if padded else None
        cache.seen = torch.full((), like.shape[1], dtype=torch.int64, device=like.device)
        cache.padded = padded
        return out

    def _prompt(self) -> tuple[Any, PromptRecord]:
        cache, kwargs, ids = self.cache, dict(self.kwargs), self.kwargs.get("input_ids")
        like = tokens_of(kwargs)
        batch, size = like.shape[:2]
        mask = kwargs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None
        short = cache.early_exit and size <= cache.whole
        context = None if cache.given_ids is not None else self.context
        check_prompt(cache, (batch, size), mask, 0 if short else cache.lookahead, context)
        packing = Packing.of(like, mask)
        if packing.order is None and mask is not None:
            mask = None
            del kwargs["attention_mask"]
        seen = features(kwargs)
        if seen and cache.compresses and not short:
            raise Refusal(
                f"{cache.method.name} drops prompt tokens, and {seen[0]} has features for each of its placeholders: "
                "prune such prompts with SpecKV or SnapKV"
            )
        if seen and ids is not None:
            kwargs["position_ids"] = positions_for(self.target, ids, mask, kwargs)
        written = None if short or not cache.lookahead else self._written(kwargs, mask, packing, like.device)
        part = None
        if cache.compresses:
            part = self._part(packing, ids, written, short)
            if not short:
                mask, packing = part.mask, part.packing
                kwargs = self._of_part(part, kwargs)
        ahead = written.ids if written is not None and cache.method.appends else None
        if "position_ids" not in kwargs and packing.real is not None:
            kwargs["position_ids"] = positions_of(packing.real)
        keeper = self._keeper(packing, short, ahead, part)
        reading = ReadPrompt(cache, keeper, ahead is not None, blocks=bool(seen) or types_mask(self.target, kwargs))
        cache.columns, cache.read_mask = 0, None
        with reading_by_layers(self.target):
            out = self._forward(reading, kwargs)
        cache.columns, cache.read_mask = part.ids.shape[1] if part is not None and not short else size, mask
        if ahead is not None:
            self._read_ahead(reading, ahead, kwargs.get("position_ids"))
        keeper.finish()
        self._told(size, like.device, packing, written, part)
        if part is not None and not short:
            out = last_logits(out)
        return out, self._record(reading, short, ahead)

    def _written(self, kwargs: dict[str, Any], mask: Tensor | None, packing: Packing, device: Any) -> Written:
        """Lookahead tokens: the caller's, the prompt's own, or the draft's."""
        cache, ids = self.cache, kwargs.get("input_ids")
        if cache.given_ids is not None:
            return Written(cache.given_ids.to(device, copy=True), cache.given_scores)
        if ids is None and cache.compresses:
            raise UnsupportedCallError(
                f"the prompt came as inputs_embeds, and {cache.method.name} chooses among token ids: pass "
                "input_ids, or use SnapKV or StreamingLLM."
            )
        if ids is None:
            who = "where nothing can be looked up" if cache.method.looks_up else "which no draft can read"
            raise UnsupportedCallError(
                f"the prompt came as inputs_embeds, {who}, and {cache.method.name} looks ahead of token ids: pass "
                "lookahead_ids=[B, L] token ids with it (generate() takes them too), or use a method without a "
                "lookahead (SnapKV, StreamingLLM)."
            )
        if cache.method.looks_up:
            return Written(SPEC.prompt_lookup(packing.ids(ids), packing.lengths, cache.lookahead))
        assert self.write is not None, "whoever reads a prompt says who writes"
        return self.write(ids, mask, packing, cache.lookahead, kwargs)

    def _part(self, packing: Packing, ids: Tensor | None, written: Written | None, short: bool) -> Part:
        how, lengths = self.cache.method.prompt, packing.lengths
        assert how is not None
        if ids is None:
            raise UnsupportedCallError(f"{self.cache.method.name} chooses among token ids: pass input_ids.")
        if short:
            positions = SPEC.keep_all(lengths, 1, how.budget)[:, 0]
            return Part(positions, torch.zeros_like(lengths), ids, None, positions)
        assert written is not None
        assert written.scores is not None, "captured with the method's prompt, the draft scores"
        return compressed(how, written.scores, packing.ids(ids), lengths)

    def _of_part(self, part: Part, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The call's arguments for the tokens that the target reads."""
        new = {name: kwargs[name] for name in KEPT if name in kwargs}
        new |= {"input_ids": part.ids, "position_ids": part.told}
        if "logits_to_keep" in inspect.signature(self.target.forward).parameters:
            new["logits_to_keep"] = 1
        if part.mask is not None:
            new["attention_mask"] = part.mask
        return new

    def _keeper(self, packing: Packing, short: bool, ahead: Tensor | None, part: Part | None) -> Keeper:
        rows, method = None, self.cache.method
        if method.scored and not short:
            rows = SPEC.score_rows(packing.lengths, ahead, method.window, list(self.eos_ids))
        return Keeper(self.cache, packing, short, rows, None if part is None or short else part.positions)

    def _forward(self, listener: Listener, kwargs: dict[str, Any]) -> Any:
        names = inspect.signature(self.target.forward).parameters
        if "position_ids" not in names:
            kwargs.pop("position_ids", None)
        with listening(self.cache, listener), listener.watch or contextlib.nullcontext():
            out = self.target._call_impl(**kwargs)
        listener.finish()
        return out

    def _read_ahead(self, reading: ReadPrompt, ahead: Tensor, positions: Tensor | None) -> None:
        """The second phase. Args: ahead [B, L]; positions: the prompt's, [.., S], None where they count from 0."""
        cache, length = self.cache, ahead.shape[1]
        states = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
        listener, columns, mask = ReadAhead(reading, length), cache.columns, cache.read_mask
        last = (
            torch.full((1, 1), int(columns or 0) - 1, device=ahead.device) if positions is None else positions[..., -1:]
        )
        together = reads_initial_states(self.target, cache.layers)
        width = length if together else 1
        back = [layer.borrow_states() for layer in states] + [borrow_attributes(self.target)]
        try:
            for start in range(0, length, width):
                told = last + 1 + torch.arange(start, start + width, device=last.device)
                call = {"input_ids": ahead[:, start : start + width], "position_ids": told, "past_key_values": cache}
                if mask is not None:
                    mask = torch.cat([mask, mask.new_ones(mask.shape[0], width)], 1)
                    call["attention_mask"] = mask
                if "logits_to_keep" in inspect.signature(self.target.forward).parameters:
                    call["logits_to_keep"] = 1
                with rope_as_it_was(self.target):
                    self._forward(listener, {**call, "use_cache": True})
                assert cache.columns is not None
                cache.columns += width
            listener.settle()
        finally:
            cache.columns = columns
            for put_back in back:
                put_back()

    def _told(self, size: int, device: Any, packing: Packing, written: Written | None, part: Part | None) -> None:
        """What the cache knows of a prompt of `size` columns, in the caller's count."""
        cache = self.cache
        cache.seen = torch.full((), size, dtype=torch.int64, device=device)
        cache.padded = self.kwargs.get("attention_mask") is not None and packing.real is not None
        cache.lookahead_ids = None if written is None else written.ids
        if part is not None:
            cache.prompt_positions, cache.shift = part.positions, part.shift

    def _record(self, reading: ReadPrompt, short: bool, ahead: Tensor | None) -> PromptRecord:
        cache = self.cache
        paths = attention_paths(self.target)
        states = [layer for layer in cache.layers if isinstance(layer, StateLayer)]
        held = [tensor for layer in states for tensor in layer.state_tensors()]
        sites = {index: self._site(paths[index], cache.layers[index], short) for index in reading.pruned}
        sites |= {index: SiteRecord(paths[index], 0, reason) for index, reason in reading.exact.items()}
        without = [path for index, path in paths.items() if not isinstance(cache.layers[index], BudgetLayer)]
        shared = [
            dataclasses.replace(sites[owner], module=path, reads=sites[owner].module)
            for path, owner in zip(without, reading.readers, strict=False)  # a layer's own second look has no path
        ]
        found = [*(sites[index] for index in sorted(sites)), *shared]
        return PromptRecord(short, found, len(states), sum(tensor[0].nbytes for tensor in held), ahead is not None)

    def _site(self, path: str, layer: BudgetLayer, short: bool) -> SiteRecord:
        if layer.is_sliding:
            return SiteRecord(path, layer.budget, str(layer.span))
        budget = self.cache.whole if short else layer.budget
        spread = self.cache.method.spread if layer.ragged else "uniform"
        return SiteRecord(path, budget, spread=spread, unquantized=layer.unquantized)

    def _step(self) -> Any:
        """q tokens behind the prompt."""
        cache, kwargs = self.cache, dict(self.kwargs)
        like = tokens_of(kwargs)
        count = like.shape[1]
        if cache.columns is None:  # a graph read the prompt
            cache.columns = int(cache.seen)
        cache.reserve(count)
        mask = kwargs.pop("attention_mask", None)
        packing = block_packing(like, mask if isinstance(mask, Tensor) else None)
        if cache.read_mask is not None or packing.real is not None:
            read = cache.read_mask
            if read is None:
                read = torch.ones(like.shape[0], cache.columns, dtype=torch.int64, device=like.device)
            block = read.new_ones(like.shape[0], count) if packing.real is None else packing.real.to(read.dtype)
            cache.read_mask = kwargs["attention_mask"] = torch.cat([read, block], 1)
        kwargs["position_ids"] = self._step_positions(kwargs.get("position_ids"), count, like.device)
        steps = Steps(cache, packing, causal=not (features(kwargs) or types_mask(self.target, kwargs)))
        out = self._forward(steps, kwargs)
        cache.columns += count
        cache.appended += count
        cache.seen.add_(count)
        return out

    def _step_positions(self, given: Tensor | None, count: int, device: Any) -> Tensor | None:
        """Position ids as the target was told them; None where it counts on by itself."""
        cache = self.cache
        if given is not None:
            return given if cache.shift is None else SPEC.told_positions(given, cache.shift)
        if cache.padded and "position_ids" in inspect.signature(self.target.forward).parameters:
            raise PositionsError(
                "a padded batch is decoded without position_ids, so each row's next position is unknown: pass "
                "position_ids [B, 1] (generate() does)."
            )
        if cache.shift is None:
            return None
        return (torch.arange(count, device=device) + SPEC.told_length(cache.seen, cache.shift))[None]


def last_logits(out: Any) -> Any:
    """A model's output, tuple or not, with the logits of the last row alone."""
    if isinstance(out, tuple):
        return (out[0][:, -1:], *out[1:])
    out.logits = out.logits[:, -1:]
    return out


@contextlib.contextmanager
def listening(cache: BudgetCache, listener: Listener) -> Iterator[None]:
    """The cache's updates go to `listener`."""
    cache.listener = listener
    try:
        yield
    finally:
        cache.listener = None


def attention_paths(target: nn.Module) -> dict[int, str]:
    """Layer -> path of the module that attends, where modules know their number, else the number."""
    found = {index: f"layer {index}" for index in range(target.config.get_text_config(decoder=True).num_hidden_layers)}
    for name, module in target.named_modules():
        index = getattr(module, "layer_idx", None)
        if isinstance(index, int) and "attention" in type(module).__name__.lower():
            found[index] = name
    return found
