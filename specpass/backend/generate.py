"""What Hugging Face's generate() asks of a compiled model: its cache, no masks, and which arguments are known."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from transformers.generation.configuration_utils import GenerationMode

from specpass.backend.compile import Backend
from specpass.backend.prefix import check_same
from specpass.cache.budget import BudgetCache
from specpass.cache.prefix import Prefix
from specpass.cache.states import why_unheld
from specpass.errors import DroppedError, GeneratedError, PrefixCacheError, PrefixUnsupportedError, UnsupportedCallError


def cache_factory(target: Any, backend: Backend) -> Callable[..., Any]:
    def prepare_cache(
        generation_config: Any, model_kwargs: dict, generation_mode: Any, batch_size: int, max_cache_length: int
    ) -> Any:
        """Stands in for the method of the same name, and asks it wherever the user chose a cache."""
        chosen = model_kwargs.get("past_key_values") is not None or generation_config.cache_implementation is not None
        prefix = model_kwargs.get("prefix")
        if prefix is not None:
            check_prefix(prefix, model_kwargs, generation_config, generation_mode)
        unheld = why_unheld(target.config)
        if unheld:
            backend.report.refuse(unheld)
        if chosen or unheld or generation_config.use_cache is False:
            check_unassisted(model_kwargs.get("past_key_values"), generation_mode)
            own = model_kwargs.get("past_key_values")
            announce(own, prompt_length(generation_config, model_kwargs), sequences(generation_config))
            return type(target)._prepare_cache_for_generation(
                target, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
            )
        prompt, bound = prompt_length(generation_config, model_kwargs), backend.bound
        model_kwargs["past_key_values"] = cache = BudgetCache(
            target.config,
            backend.method,
            max_new_tokens=new_tokens(generation_config, model_kwargs),
            prompt_length=prompt if prompt is None or prefix is None else prompt + len(prefix),
            generated=None if bound is None else bound.slots,
            evict="recent" if bound is None else bound.policy,
            share_budget=bound is not None and bound.shared,
            dropped=backend.dropped,
            cache_bits=backend.bits or None,
            early_exit=not backend.speculate,  # the draft of a speculator reads every prompt
        )
        cache.assisted = generation_mode == GenerationMode.ASSISTED_GENERATION
        check_unassisted(cache, generation_mode)
        announce(cache, prompt, sequences(generation_config))
        generation_config.disable_compile = True  # generate would compile the call a second time on a GPU
        return None

    return prepare_cache


def check_unassisted(cache: Any, mode: Any) -> None:
    """Raises: GeneratedError, DroppedError: candidates, which may be taken back, would be taken for more than that."""
    if not isinstance(cache, BudgetCache) or mode != GenerationMode.ASSISTED_GENERATION:
        return
    without = "leave assistant_model and prompt_lookup_num_tokens out, or"
    if cache.bound is not None:
        raise GeneratedError(
            f"generated={cache.bound.slots} with assisted decoding, whose candidates would evict tokens before they "
            f"are accepted: {without} generated."
        )
    if cache.dropped is not None:
        raise DroppedError(
            f"dropped={cache.dropped!r} with assisted decoding, whose candidates come several at a time, as a turn "
            f"does: {without} dropped; specpass.compile(..., speculate=4) lets the draft propose."
        )


def check_prefix(prefix: Any, model_kwargs: dict, generation_config: Any, mode: Any) -> None:
    """Raises: PrefixCacheError: a cache that is none of ours, or is full of something else. PrefixUnsupportedError."""
    cache = model_kwargs.get("past_key_values")
    if not isinstance(prefix, Prefix):
        return  # the call says it
    if mode == GenerationMode.ASSISTED_GENERATION:
        raise PrefixUnsupportedError(
            "prefix= with assisted decoding, whose assistant has not read the document: leave assistant_model and "
            "prompt_lookup_num_tokens out; specpass.compile(..., speculate=4) lets the draft propose."
        )
    other = "use_cache=False" if generation_config.use_cache is False else generation_config.cache_implementation
    if cache is not None and not isinstance(cache, BudgetCache):
        other = f"past_key_values={type(cache).__name__}"
    if other:
        raise PrefixCacheError(
            f"prefix= and {other}: answers behind a prefix need a BudgetCache. Leave it out of generate()."
        )
    if cache is not None and cache.filled:
        check_same(cache, prefix)


def announce(cache: Any, columns: int | None, asked: int) -> None:
    """Tell an empty cache of ours what is about to come: calls may bring less, or more (see pieces.py).

    Args: columns: of its prompt. asked: sequences of each prompt (see answers.py).
    """
    if isinstance(cache, BudgetCache) and not cache.filled:
        cache.awaited, cache.asked = columns, asked


def sequences(generation_config: Any) -> int:
    """How often generate hands over each row of the batch."""
    return max(generation_config.num_beams or 1, generation_config.num_return_sequences or 1)


def prompt_length(generation_config: Any, model_kwargs: dict) -> int | None:
    """S as generate sees it, padding included; None where it does not say."""
    for name, axes in (("inputs_embeds", 3), ("attention_mask", 2)):
        given = model_kwargs.get(name)
        if isinstance(given, torch.Tensor) and given.dim() == axes:
            return int(given.shape[1])
    masked = getattr(generation_config, "_mask_length", None)  # of a mask of ones, which generate takes away
    if masked is None and generation_config.max_new_tokens:
        return generation_config.max_length - generation_config.max_new_tokens
    return masked


def new_tokens(generation_config: Any, model_kwargs: dict) -> int:
    """How many tokens are generated at most; max_length does not count a prompt of embeddings."""
    counted = None if "inputs_embeds" in model_kwargs else prompt_length(generation_config, model_kwargs)
    return generation_config.max_new_tokens or max(1, generation_config.max_length - (counted or 0))


def kwargs_check(target: Any) -> Callable[[dict[str, Any]], None]:
    def validate_model_kwargs(model_kwargs: dict[str, Any]) -> None:
        """Stands in for the method of the same name: generate(lookahead_ids=..., prefix=...) are no typing errors."""
        own = {name: given for name, given in model_kwargs.items() if name not in ("lookahead_ids", "prefix")}
        type(target)._validate_model_kwargs(target, own)

    return validate_model_kwargs


def keep_cache(target: Any) -> Callable[..., dict[str, Any]]:
    own = type(target).prepare_inputs_for_generation.__get__(target)

    @functools.wraps(own)  # generate reads its arguments' names
    def prepare_inputs(*args: Any, past_key_values: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Stands in for the method of the same name, which may leave a cache behind and read all tokens anew.

        Long-rope does, where the tokens reach the length from which its other frequencies serve: ours is emptied then.
        """
        inputs = own(*args, past_key_values=past_key_values, **kwargs)
        if isinstance(past_key_values, BudgetCache) and inputs.get("past_key_values") is None:
            if past_key_values.filled:
                past_key_values.reset()
            inputs["past_key_values"] = past_key_values
        return inputs

    return prepare_inputs


def refuse_batching(backend: Backend) -> Callable[..., Any]:
    def init_continuous_batching(*_: Any, **__: Any) -> Any:
        """Stands in for the method of the same name, which generate_batch() and transformers' server call.

        Raises: UnsupportedCallError.
        """
        raise UnsupportedCallError(
            "generate_batch and continuous batching (transformers serve --continuous-batching) bring a paged cache of "
            "transformers' own, whose blocks hold the same positions for all KV heads of a layer, and "
            f"{backend.method.name} has no part in it: the model would run unpruned. Call generate(), which prunes "
            "padded batches too; or call specpass.restore(model) and shorten the prompts with "
            "specpass.PromptCompressor(draft, specpass.SpecPC(budget=1024)); or use specpass serve."
        )

    return init_continuous_batching


def keep_mask(attention_mask: Any = None, **_: Any) -> Any:
    """generate would build a 4-D mask in slot coordinates for every step; lengths replace it."""
    return attention_mask
