"""specpass.compile and specpass.restore: one line to add to a Hugging Face program.

compile() sets instance attributes only (the compiled call and what generate() asks for); restore() removes them.
Classes, forwards, hooks and transformers' attention registry stay untouched.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx, nn

import specpass.ops.flops  # noqa: F401  (torch's FLOP counter knows our operators)
from specpass.backend import checks
from specpass.backend.compile import Backend
from specpass.backend.limit import raised_limit
from specpass.cache.budget import BudgetCache
from specpass.graph.roles import ROLES
from specpass.methods.base import Method

ATTRIBUTES = ("_compiled_call_impl", "_prepare_cache_for_generation", "create_masks_for_generate", "_specpass")
_ABSENT = object()


@dataclasses.dataclass
class Compiled:
    """What compile() knows about a model: its backend, and the attributes that restore() puts back."""

    backend: Backend
    before: dict[str, Any]

    def __deepcopy__(self, memo: dict) -> Compiled:
        return self  # a copied model shares the compiled graphs' backend

    def __reduce__(self) -> Any:
        raise TypeError("a model compiled with specpass cannot be pickled: call specpass.restore(model) first")


def compile(
    target: nn.Module,
    draft: nn.Module | None = None,
    method: Method | None = None,
    *,
    lowering: str = "inductor",
    lookahead_ids: Any = None,
    **options: Any,
) -> nn.Module:
    """Compile `target` in place, so that `generate` and direct calls prune its KV cache.

    Args:
        target: a Hugging Face decoder in eval mode.
        draft: a smaller decoder with the same tokenizer, on the same device, in the same dtype.
        method: e.g. specpass.SpecKV(budget=1024, window=32, lookahead=32).
        lowering: "inductor", or "eager" for the same passes without Inductor.
        lookahead_ids: [B, L] token ids in place of the draft's.
        options: further options of specpass.Backend.

    Returns: target.

    Raises:
        BudgetError, MissingDraftError, TokenizerMismatchError, DeviceMismatchError, DtypeMismatchError,
        GradientsError, EncoderDecoderError: before anything is changed; each message names the fix.
    """
    checks.check_method(method)
    checks.check_decoder(target, "target")
    backend = Backend(draft, method, lowering=lowering, lookahead_ids=lookahead_ids, **options)
    checks.check_pair(target.config, next(target.parameters()), draft)
    restore(target)
    before = {name: target.__dict__.get(name, _ABSENT) for name in ATTRIBUTES}
    target._specpass = Compiled(backend, before)
    target._compiled_call_impl = _call(target, backend)
    target._prepare_cache_for_generation = _cache_factory(target, backend)
    target.create_masks_for_generate = _keep_mask
    return target


def restore(model: nn.Module) -> nn.Module:
    """Undo compile(); a model that was not compiled is left as it is."""
    state = model.__dict__.get("_specpass")
    if state is None:
        return model
    state.backend.report.target_configs.clear()  # report() no longer finds this model
    for name, value in state.before.items():
        model.__dict__.pop(name, None)
        if value is not _ABSENT:
            model.__dict__[name] = value
    return model


class _Loose:
    """A backend for Dynamo, which holds all that it ever saw until torch._dynamo.reset(), without holding the draft.

    The model's own attributes hold the backend: it lives until the model dies or is restored.
    """

    __name__ = "specpass"

    def __init__(self, backend: Backend) -> None:
        self.backend = weakref.ref(backend)

    def __call__(self, gm: fx.GraphModule, example_inputs: list[Any], **_: Any) -> Callable[..., Any]:
        backend = self.backend()
        assert backend is not None, "called by a model that holds its backend"
        return backend(gm, example_inputs)


def _fresh(target: nn.Module) -> Callable[..., Any]:
    """A function with a code object of its own: Dynamo's recompile limit counts per code object."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        return target._call_impl(*args, **kwargs)

    code = forward.__code__.replace(co_name=f"specpass_forward_{id(forward):x}")
    return types.FunctionType(code, forward.__globals__, forward.__name__, None, forward.__closure__)


def _call(target: nn.Module, backend: Backend) -> Callable[..., Any]:
    compiled = torch.compile(_fresh(target), backend=_Loose(backend), dynamic=True)
    warned = False

    def call(*args: Any, **kwargs: Any) -> Any:
        nonlocal warned
        checks.check_decoder(target, "target")  # train() may have been called since compile
        checks.check_draft(backend.draft, backend.method)
        kwargs.update(zip(ROLES, args, strict=False))
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, BudgetCache) or len(args) > len(ROLES):
            if not warned:
                warnings.warn(
                    f"specpass: past_key_values is {type(cache).__name__}, not a BudgetCache, so the model runs "
                    "exactly, unpruned. Use generate(), or pass specpass.BudgetCache(model.config, method).",
                    stacklevel=3,
                )
                warned = True
            return target._call_impl(*args[len(ROLES) :], **kwargs)
        prepare(cache, kwargs)
        with raised_limit(specialize_float=True), collector_rests_while_compiling():
            return compiled(**kwargs)

    return call


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


def prepare(cache: BudgetCache, kwargs: dict[str, Any]) -> None:
    """Bring a call into the form with the fewest graphs: no mask where none is needed, room for the new tokens."""
    mask = kwargs.get("attention_mask")
    if not cache.layers[0].is_initialized:
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            if bool(mask.all()):  # reads the mask once, before anything is queued
                del kwargs["attention_mask"]
            elif kwargs.get("position_ids") is None:
                kwargs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        return
    ids = kwargs.get("input_ids")
    cache.reserve(ids.shape[1] if ids is not None else 1)
    if not cache.exact:
        kwargs.pop("attention_mask", None)  # lengths say which slots are in use


def _cache_factory(target: Any, backend: Backend) -> Callable[..., Any]:
    def prepare_cache(
        generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Stands in for the method of the same name, and asks it wherever the user chose a cache."""
        chosen = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        if chosen or generation_config.use_cache is False:
            return type(target)._prepare_cache_for_generation(
                target, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        prompt = prompt_length(generation_config, model_kwargs)
        model_kwargs["past_key_values"] = BudgetCache(
            target.config, backend.method, max_new_tokens=generation_config.max_length - prompt, prompt_length=prompt
        )
        generation_config.disable_compile = True  # generate would compile the call a second time on a GPU
        return None

    return prepare_cache


def prompt_length(generation_config: Any, model_kwargs: dict) -> int:
    """S as generate sees it, padding included."""
    mask = model_kwargs.get("attention_mask")
    if isinstance(mask, torch.Tensor) and mask.dim() == 2:
        return mask.shape[1]
    return generation_config.max_length - (generation_config.max_new_tokens or 1)


def _keep_mask(attention_mask: Any = None, **_: Any) -> Any:
    """generate would build a 4-D mask in slot coordinates for every step; lengths replace it."""
    return attention_mask
