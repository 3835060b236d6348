"""specpass.compile and specpass.restore: one line to add to a Hugging Face program.

compile() sets instance attributes only (the compiled call and what generate() asks for); restore() removes them.
Classes, forwards, hooks and transformers' attention registry stay untouched.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from torch import nn
from torch._dynamo.eval_frame import remove_from_cache

import specpass.ops.flops  # noqa: F401  (torch's FLOP counter knows our operators)
from specpass.backend import checks
from specpass.backend.by_text import DraftByText
from specpass.backend.compile import Backend
from specpass.backend.direct import compiled_call, fresh_forward
from specpass.backend.generate import cache_factory, keep_cache, keep_mask, kwargs_check, refuse_batching
from specpass.backend.itself import check_writes
from specpass.backend.turns import check_holds
from specpass.cache.bits import check_bits
from specpass.cache.conversation import check_place
from specpass.capture.devices import parts_by_device
from specpass.capture.rope import prepare_rope
from specpass.capture.stored import OURS
from specpass.errors import ParallelPlanError
from specpass.methods.base import Method
from specpass.parallel.agree import about, agreement
from specpass.parallel.shards import Ranks, local_part, ranks_of
from specpass.reports.report import base_of

_ABSENT = object()


@dataclasses.dataclass
class Compiled:
    """What compile() knows about a model: its backend, and the attributes that restore() puts back.

    `forget` drops the compiled graphs, and with them the draft's weights. `part` is what runs in the place of a model
    that is spread over processes, else None.
    """

    backend: Backend
    before: dict[str, Any]
    forget: Callable[[], Any]
    part: nn.Module | None = None

    def __deepcopy__(self, memo: dict) -> Compiled:
        return dataclasses.replace(self, forget=lambda: None)  # a copied model shares the graphs and does not own them

    def __reduce__(self) -> Any:
        raise TypeError("a model compiled with specpass cannot be pickled: call specpass.restore(model) first")


def compile(
    target: nn.Module,
    draft: nn.Module | None = None,
    method: Method | None = None,
    *,
    lowering: str = "inductor",
    lookahead_ids: Any = None,
    speculate: int = 0,
    tokenizers: tuple[Any, Any] | None = None,
    generated: int | None = None,
    evict: str = "recent",
    share_budget: bool = False,
    dropped: str | None = None,
    cache_bits: int | None = None,
    **options: Any,
) -> nn.Module:
    """Compile `target` in place, so that `generate` and direct calls prune its KV cache.

    Both then take `lookahead_ids=` [B, L] too, token ids in the draft's place for this prompt: one that comes as
    inputs_embeds, say, which no draft can read.

    Args:
        target: a Hugging Face decoder in eval mode. Of a PEFT model the decoder inside is compiled: its generate()
            prunes, and adapters may be switched, switched off or merged later.
        draft: a smaller decoder, on the same device, or on any where the target is spread over several; with the same
            tokenizer, or see `tokenizers`.
        method: e.g. specpass.SpecKV(budget=1024, window=32, lookahead=32).
        lowering: "inductor", or "eager" for the same passes without Inductor.
        lookahead_ids: [B, L] token ids in place of the draft's.
        speculate: tokens that the draft proposes at a time behind its lookahead, to be verified by the pruned target in
            one call: answers stay the same, and come sooner where the draft is often right. The draft then keeps its
            keys and values of the whole prompt. 0: none.
        tokenizers: (the target's, the draft's), two fast tokenizers of transformers, of a draft with another tokenizer:
            in front of the compiled call the draft reads the prompt's text in its own tokens, and what it writes and
            how it scores is carried over to the target's (see specpass.backend.by_text). None: both have one.
        generated: slots of each KV head for the answer's tokens, beyond which older ones are evicted. A BudgetCache
            that is passed to generate() says so itself. None: the cache grows.
        evict: which of them stay: see specpass.BudgetCache.
        share_budget: the prompt's slots are evicted alike, so that prompt and answer share one budget.
        dropped: "host": what is dropped stays in host memory, and a later turn chooses among all of it anew, by its own
            question. A BudgetCache that is passed to generate() says so itself. None: what is dropped is gone.
        cache_bits: 8, 4 or 2 bits for each number of the prompt's slots: see specpass.BudgetCache, which says so itself
            where one is passed to generate(). None: the model's dtype.
        options: further options of specpass.Backend.

    Returns: target.

    Raises:
        SpecpassError: before anything is changed, with a message that names the fix: BudgetError, MissingDraftError,
            TokenizerMismatchError, DeviceMismatchError, SeveralDevicesError, GradientsError, EncoderDecoderError,
            SpeculationError, GeneratedError, DroppedError, CacheBitsError, LookaheadError; of a target that is spread
            over processes ParallelPlanError, RanksDisagreeError.
    """
    checks.check_decoder(target, "target")
    inside = base_of(target)
    ranks = ranks_of(inside)
    with agreement(ranks) as told:
        method = checks.check_method(method)
        part, reads = (None, draft) if ranks is None else check_spread_out(inside, ranks, draft, method)
        backend = Backend(reads, method, lowering=lowering, lookahead_ids=lookahead_ids, **options)
        backend.ranks = ranks
        backend.speculate = checks.check_speculate(speculate, draft, backend.method)
        backend.dropped = dropped
        check_place(dropped)
        if dropped is not None:
            check_holds(inside, backend.method, by_text=tokenizers is not None)
        check_writes(inside, backend.method)
        backend.bits = backend.report.bits = check_bits(cache_bits, backend.method)
        backend.bound = backend.report.bound = checks.check_generated(
            generated, evict, share_budget, backend.method, backend.bits, backend.speculate
        )
        checks.check_places(inside, draft, backend.method)
        backend.report.devices = parts_by_device(inside, draft)
        if draft is not None and tokenizers is None:
            checks.check_tokenizers(target.config, draft.config)
        by_text = None if tokenizers is None else DraftByText(backend, target, tokenizers)
        comparable = [item for item in options.items() if item[0] != "observe"]  # a function of each process's own
        told |= {"the target": about(target), "the draft": about(draft), "method": backend.method.key}
        told |= {"lowering": lowering, "speculate": repr(speculate), "options": repr(sorted(comparable))}
        told |= {"generated": repr(backend.bound), "dropped": repr(dropped), "cache_bits": repr(cache_bits)}
    _install(inside, part, backend, by_text)
    return target


def check_spread_out(
    target: nn.Module, ranks: Ranks, draft: nn.Module | None, method: Method
) -> tuple[nn.Module, nn.Module | None]:
    """What runs on this rank in the place of a target that is spread over processes, and of its draft.

    Raises: ParallelPlanError: it cannot be spread so.
    """
    theirs = None if draft is None else ranks_of(draft)
    if theirs is not None and theirs.apart and method.prompt is not None:
        raise ParallelPlanError(
            f"{method.name} chooses tokens by all of the draft's heads, and the draft's are spread over {theirs.size} "
            "processes: load it whole in each of them, without tp_plan."
        )
    part = local_part(target, ranks)
    if draft is target:
        return part, part
    return part, draft if draft is None or theirs is None else local_part(draft, theirs)


def _install(target: nn.Module, part: nn.Module | None, backend: Backend, by_text: DraftByText | None) -> None:
    """Put the attributes in place through which a decoder is called and generates.

    Args: part: what runs in its place, of one that is spread over processes.
    """
    restore(target)
    runs = target if part is None else part
    prepare_rope(runs)
    before = {name: target.__dict__.get(name, _ABSENT) for name in OURS}
    forward = fresh_forward(runs)
    # Dynamo's cache would outlive the model: what it holds of a code object is out of the garbage collector's sight.
    forget = weakref.finalize(target, remove_from_cache, forward.__code__)
    forget.atexit = False
    target._specpass = Compiled(backend, before, forget, part)
    target._compiled_call_impl = compiled_call(runs, forward, backend, by_text)
    target._prepare_cache_for_generation = cache_factory(target, backend)
    if hasattr(type(target), "prepare_inputs_for_generation"):
        target._validate_model_kwargs = kwargs_check(target)
        target.prepare_inputs_for_generation = keep_cache(target)
    if hasattr(type(target), "init_continuous_batching"):
        target.init_continuous_batching = refuse_batching(backend)
    target.create_masks_for_generate = keep_mask


def restore(model: nn.Module) -> nn.Module:
    """Undo compile(); a model that was not compiled is left as it is."""
    inside = base_of(model)
    state = inside.__dict__.get("_specpass")
    if state is None:
        return model
    state.forget()
    state.backend.report.target_configs.clear()  # report() no longer finds this model
    for name, value in state.before.items():
        inside.__dict__.pop(name, None)
        if value is not _ABSENT:
            inside.__dict__[name] = value
    return model
