"""A compiled model's call: checked, brought into the form with the fewest graphs, and handed to Dynamo."""

from __future__ import annotations

import contextlib
import gc
import inspect
import types
import warnings
import weakref
from collections.abc import Callable, Container, Hashable, Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._dynamo.exc import FailOnRecompileLimitHit

from specpass.backend import checks
from specpass.backend.answers import read_once
from specpass.backend.behind import Behind
from specpass.backend.by_text import DraftByText
from specpass.backend.cold import coarse_form_of, one_at_a_time
from specpass.backend.compile import Backend
from specpass.backend.foresee import Foresight
from specpass.backend.itself import Itself
from specpass.backend.kept import KeptCalls
from specpass.backend.pieces import piece_of_append, piece_of_lookahead, piece_of_prompt
from specpass.backend.positions import number, number_step, take_one_axis
from specpass.backend.prefix import Questions, check_same
from specpass.backend.settings import call_settings
from specpass.backend.speculate import Speculator
from specpass.backend.turns import Turns
from specpass.backend.uncompiled import FAILURES, Uncompiled, why_uncaptured, why_uncompiled
from specpass.cache.budget import BudgetCache
from specpass.cache.prompt import tokens_of
from specpass.cache.states import why_unheld
from specpass.capture.dynamo import holds_cache_ops
from specpass.capture.model import asks_for_length
from specpass.capture.rope import following
from specpass.errors import GraphLimitError, MaskError, PositionsError, PrefixCacheError, UnsupportedCallError
from specpass.interpret.beside import leave_out_kinds
from specpass.observe import progress


class LooseBackend:
    """A backend for Dynamo, which holds all that it ever saw until torch._dynamo.reset(), without holding the draft.

    The model's own attributes hold the backend: it lives until the model dies or is restored.
    """

    __name__ = "specpass"

    def __init__(self, backend: Backend) -> None:
        self.backend = weakref.ref(backend)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        backend = self.backend()
        assert backend is not None, "called by a model that holds its backend"
        if not holds_cache_ops(gm):  # a piece of a broken graph: calls without a BudgetCache do not come here
            return gm.forward
        return backend(gm, example_inputs)


def fresh_forward(target: nn.Module) -> types.FunctionType:
    """A function with a code object of its own: Dynamo's recompile limit counts per code object."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return target._call_impl(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"specpass_forward_{id(forward):x}")
    return types.FunctionType(code, forward.__globals__, forward.__name__, None, forward.__closure__)


def compiled_call(
    target: nn.Module, forward: types.FunctionType, backend: Backend, by_text: DraftByText | None = None
) -> Callable[..., Any]:
    speculator = Speculator(backend, backend.speculate) if backend.speculate else None
    foresight = Foresight(backend)
    compiled = torch.compile(forward, backend=LooseBackend(backend), dynamic=True)
    uncompiled = Uncompiled(backend, why_uncompiled(target))
    numbered = bool(following(target)) or backend.method.futures > 1
    in_slots = asks_for_length(target)
    names = tuple(inspect.signature(target.forward).parameters)
    warned = False
    known: set[Hashable] = set()  # forms of calls that were compiled
    kept = KeptCalls(target, forward, backend)

    def through_graph(**kwargs: Any) -> Any:
        cache = kwargs["past_key_values"]
        reads_prompt = not cache.filled
        prepare(cache, kwargs, numbered)
        form = coarse_form_of(cache, kwargs)
        with (
            call_settings(specialize_float=True),
            one_at_a_time(known, form),
            collector_rests_while_compiling(),
            told_of_compilation(),
        ):
            out = kept.call(form, kwargs, compiled)
        if backend.ranks is not None and reads_prompt:
            cache.tighten()
        return out

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal warned
        if torch.compiler.is_dynamo_compiling():  # a caller of the model is compiled (not: some other thread compiles)
            return inside_another_graph(target, args, kwargs)
        checks.check_decoder(target, "target")  # train() may have been called since compile
        checks.check_draft(backend.draft, backend.method)
        kwargs.update(zip(names, args, strict=False))
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, BudgetCache):
            kwargs.pop("lookahead_ids", None)
            if kwargs.pop("prefix", None) is not None:
                raise PrefixCacheError(
                    f"prefix= and past_key_values={type(cache).__name__}: answers behind a prefix need a BudgetCache. "
                    "Leave past_key_values out of generate(), or pass specpass.BudgetCache(model.config, method)."
                )
            if not warned and not why_unheld(target.config):  # else the report says why, and no cache helps
                warnings.warn(
                    f"specpass: past_key_values is {type(cache).__name__}, not a BudgetCache, so the model runs "
                    "exactly, unpruned. Use generate(), or pass specpass.BudgetCache(model.config, method).",
                    stacklevel=3,
                )
                warned = True
            return target._call_impl(**kwargs)
        check_outputs(target, kwargs)
        if uncompiled.reason:
            uncompiled.check(cache)
        cache.in_slots = in_slots
        piece = piece_of_prompt(cache, kwargs, call)
        if piece is None:
            piece = read_once(cache, kwargs, call, backend.report)
        if piece is not None:
            return piece
        given = kwargs.pop("lookahead_ids", None)
        if not cache.filled:  # generate() passes it with every token
            cache.look_ahead(given)
        prefix = kwargs.pop("prefix", None)
        if cache.filled:
            check_same(cache, prefix)
        if cache.dropped is not None:
            out = turns(cache, kwargs, given, prefix)
            if out is not None:
                return out
        elif prefix is not None and not cache.filled:
            return questions(cache, kwargs, prefix)
        if itself.writes(cache, kwargs):
            return itself(cache, kwargs)
        if by_text is not None and not cache.filled:
            by_text(cache, kwargs)
        if cache.padded and "position_ids" in names:
            number_step(target, cache, kwargs)
        piece = piece_of_lookahead(cache, kwargs, call)
        if piece is None:
            piece = piece_of_append(cache, kwargs, call)
        if piece is not None:
            return piece
        if isinstance(cache.seen, torch.Tensor) and cache.columns is not None:
            return uncompiled(target, cache, kwargs)  # goes on as its prompt was read
        what = why_uncaptured(target, cache, kwargs)
        if what:
            backend.report.note(f"prompts with {what} are read by the model's own forward, pruned around its attention")
            return uncompiled(target, cache, kwargs)
        take_one_axis(kwargs)
        leave_out_kinds(kwargs)
        leave_out_idle(target, names, kwargs)
        if not uncompiled.reason:
            try:
                if cache.foresees and cache.filled:
                    foresight.make_room(cache, kwargs, through_graph)
                out = None if speculator is None else speculator.step(cache, kwargs, through_graph)
                return through_graph(**kwargs) if out is None else out
            except FailOnRecompileLimitHit as error:
                raise GraphLimitError(
                    f"this call would be one graph more than the {torch._dynamo.config.recompile_limit} that Dynamo "
                    "keeps of a model (torch._dynamo.config.recompile_limit): specpass.restore(model) drops them all, "
                    "and compiling anew begins with none."
                ) from error
            except FAILURES as error:
                uncompiled.failed(error, cache)
        return uncompiled(target, cache, kwargs)

    behind = Behind(target, backend, uncompiled)
    itself = Itself(behind, call)
    questions, turns = Questions(behind, itself, call), Turns(behind, itself)
    return call


def check_outputs(target: nn.Module, kwargs: dict[str, Any]) -> None:
    """Raises: UnsupportedCallError: attention probabilities are asked for."""
    asked = kwargs.get("output_attentions")
    if asked or (asked is None and getattr(target.config, "output_attentions", False)):
        raise UnsupportedCallError(
            "output_attentions=True: pruned attention computes no [S, S] probabilities. Leave it out, or call "
            "specpass.restore(model) first."
        )


def leave_out_idle(target: nn.Module, names: Container[str], kwargs: dict[str, Any]) -> None:
    """What changes nothing is no reason for a graph of its own.

    These are defaults that greedy search names and an assistant's does not, and the tokenizer that generate() has for
    stop strings.
    """
    configs = (target.config, target.config.get_text_config(decoder=True))
    for name in ("use_cache", "return_dict"):
        if kwargs.get(name) is True and all(getattr(config, name, False) for config in configs):
            del kwargs[name]
    if "tokenizer" not in names:
        kwargs.pop("tokenizer", None)


@contextlib.contextmanager
def collector_rests_while_compiling() -> Iterator[None]:
    """No garbage collection inside a compilation: tracing makes millions of objects, and each full pass looks at all.

    It takes an eighth off the time of a trace. Calls that compile nothing are not touched.
    """
    if not gc.isenabled():
        yield
        return
    handler = torch._dynamo.callback.callback_handler
    start = handler.register_start_callback(lambda _: gc.disable())
    end = handler.register_end_callback(lambda _: gc.enable())
    try:
        yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)
        gc.enable()


@contextlib.contextmanager
def told_of_compilation() -> Iterator[None]:
    """What is compiled inside is a task, from the first line that Dynamo traces, for who watches."""
    if not progress.watched():
        yield
        return
    handler, compiling = torch._dynamo.callback.callback_handler, contextlib.ExitStack()
    start = handler.register_start_callback(lambda _: compiling.enter_context(progress.task("compiling")))
    end = handler.register_end_callback(lambda _: compiling.close())
    try:
        with compiling:
            yield
    finally:
        handler.remove_start_callback(start)
        handler.remove_end_callback(end)


def prepare(cache: BudgetCache, kwargs: dict[str, Any], numbered: bool) -> None:
    """Bring a call into the form with the fewest graphs: no mask where none is needed, room for the new tokens.

    Args: numbered: prompts are told their positions (rotary frequencies follow them, and not the lookahead's;
    or several futures count from their end).
    """
    if cache.filled:
        prepare_step(cache, kwargs)
    else:
        prepare_prompt(kwargs, numbered)
    for name, value in kwargs.items():
        if isinstance(value, torch.Tensor):
            kwargs[name] = packed(value)


def packed(value: torch.Tensor) -> torch.Tensor:
    """Graphs differ by strides, and generate hands over slices too; one of a single row counts as contiguous."""
    value = value.contiguous()
    if value.dim() and len(value) == 1 and value.stride(0) != value.numel():
        return value.clone(memory_format=torch.contiguous_format)
    return value


def prepare_prompt(kwargs: dict[str, Any], numbered: bool) -> None:
    mask = kwargs.get("attention_mask")
    if numbered:
        number(kwargs)
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        if bool(mask.all()):  # reads the mask once, before anything is queued
            del kwargs["attention_mask"]
        else:
            number(kwargs)


def prepare_step(cache: BudgetCache, kwargs: dict[str, Any]) -> None:
    mask, tokens = kwargs.get("attention_mask"), tokens_of(kwargs)
    count = tokens.shape[1] if isinstance(tokens, torch.Tensor) else 1
    cache.reserve(count)
    if not cache.exact and isinstance(kwargs.pop("attention_mask", None), torch.Tensor):
        prepare_mask(mask, count, kwargs, cache.biased)
    if cache.biased:
        prepare_bias(cache, tokens, count, kwargs)


def inside_another_graph(target: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The model as it is, as a part of a graph of the caller's.

    Raises: UnsupportedCallError: with a BudgetCache, which only a graph of ours prunes.
    """
    if isinstance(kwargs.get("past_key_values"), BudgetCache):
        raise UnsupportedCallError(
            "a model from specpass.compile is called with a BudgetCache inside another torch.compile: compile one of "
            "them, or call it without that cache."
        )
    return target._call_impl(*args, **kwargs)


def prepare_bias(cache: BudgetCache, tokens: torch.Tensor, count: int, kwargs: dict[str, Any]) -> None:
    """A model that adds a bias of the keys makes it as wide as its mask (ALiBi): give it one [B, P] of all slots.

    Of its values only those of the `count` tokens are read. A single token that some rows hide keeps its mask [B, 1].
    """
    for layer in cache.budgeted:
        layer.tell_positions()
    own = kwargs.get("attention_mask")
    if own is not None and count == 1:
        return
    slots = cache.budgeted[0].get_mask_sizes(count)[0]
    mask = torch.ones(tokens.shape[0], slots, dtype=torch.int64, device=tokens.device)
    if own is not None:
        mask[:, slots - count :] = own
    kwargs["attention_mask"] = mask


def prepare_mask(mask: torch.Tensor, count: int, kwargs: dict[str, Any], biased: bool) -> None:
    """Of a pruned cache's mask [B, M] the appended tokens' columns stay, where one is masked: lengths say the rest.

    Args: biased: whether positions are read of the slots alone.
    Raises: MaskError: not such a mask. PositionsError: tokens are masked and no positions say where the others stand.
    """
    if mask.dim() != 2 or mask.shape[1] < count:
        raise MaskError(
            f"attention_mask is {tuple(mask.shape)} and {count} tokens are appended to a pruned cache: pass a mask "
            "[B, M] of all tokens so far, these included, or none."
        )
    own = mask[:, mask.shape[1] - count :]
    if count == 1 and mask.is_cuda:  # to look would stop the device at every token, and generate() masks none
        return
    if bool(own.all()):
        return
    if kwargs.get("position_ids") is None and not biased:
        raise PositionsError(
            "attention_mask hides some of the appended tokens, so each row's positions are unknown: pass position_ids "
            "[B, q] (generate() does)."
        )
    kwargs["attention_mask"] = own.contiguous()
