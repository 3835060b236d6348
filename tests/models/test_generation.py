"""Six families generate through specpass at a covering budget as they do without it, in every way of generate().

The assertions are those of transformers' own generation tests, written anew: its packages do not hold the tests of
models. What the plain model fails may fail here too; what specpass refuses is named in REFUSED.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import compile_eager
from transformers import CompileConfig, DynamicCache

import specpass
from specpass.benchmarks.coverage.tiny import tiny_model
from specpass.errors import UnsupportedCallError

FAMILIES = ("llama", "gpt_neox", "gemma2", "gemma3_text", "gpt2", "lfm2")
IDS = torch.randint(1, 100, (2, 20), generator=torch.Generator().manual_seed(0))
ONE = IDS[:1]
MASK = torch.ones_like(IDS)
MASK[0, :6] = 0
DICT = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True}
Way = Callable[[Any], Any]


def generate(ids: torch.Tensor, **options: Any) -> Way:
    """generate() with eight tokens at least, so that no early end hides anything."""

    def way(model: Any) -> Any:
        torch.manual_seed(11)
        return model.generate(ids, **{"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, **options})

    return way


def assisted(**options: Any) -> Way:
    def way(model: Any) -> Any:
        helper = twin(model.config.model_type)
        return generate(ONE, assistant_model=helper, **options)(model)

    return way


def embedded(**options: Any) -> Way:
    def way(model: Any) -> Any:
        embeds = model.get_input_embeddings()(IDS)
        return generate(None, inputs_embeds=embeds, attention_mask=torch.ones_like(IDS), **options)(model)

    return way


def continued(model: Any) -> Any:
    """A second call goes on from the first one's cache."""
    first = generate(ONE, return_dict_in_generate=True)(model)
    return generate(first.sequences, past_key_values=first.past_key_values)(model)


def without_mask_and_with(model: Any) -> Any:
    """Left padding changes nothing: the padded row's tokens are those of the row alone."""
    together = generate(IDS, attention_mask=MASK)(model)
    alone = generate(IDS[:1, 6:], attention_mask=MASK[:1, 6:])(model)
    return torch.cat([together[:1, 20:], alone[:, 14:]])


def inside_a_graph(model: Any) -> Any:
    """A static cache, and generate() compiling the model's call into one graph."""
    config = CompileConfig(fullgraph=True, dynamic=False, backend="eager", mode=None)
    config._compile_all_devices = True
    return generate(ONE, cache_implementation="static", compile_config=config)(model)


def own_cache(model: Any) -> Any:
    return generate(ONE, past_key_values=DynamicCache(config=model.config))(model)


def all_logits(model: Any) -> Any:
    with torch.no_grad():
        whole = model(input_ids=IDS, attention_mask=MASK).logits
        last = model(input_ids=IDS, attention_mask=MASK, logits_to_keep=1).logits
    torch.testing.assert_close(whole[:, -1:], last)
    return last


WAYS: dict[str, Way] = {
    "greedy": generate(IDS),
    "greedy, dict": generate(IDS, output_hidden_states=True, **DICT),
    "greedy, without a cache": generate(IDS, use_cache=False, **DICT),
    "sample": generate(IDS, do_sample=True),
    "sample, several": generate(IDS, do_sample=True, num_return_sequences=2, **DICT),
    "beams": generate(IDS, num_beams=2, num_return_sequences=2),
    "beams, dict": generate(IDS, num_beams=2, output_hidden_states=True, **DICT),
    "beam sampling": generate(IDS, do_sample=True, num_beams=2),
    "assisted": assisted(),
    "assisted sampling": assisted(do_sample=True),
    "prompt lookup": generate(torch.cat([ONE, ONE], 1), prompt_lookup_num_tokens=3),
    "embeddings": embedded(),
    "embeddings, beams": embedded(num_beams=2),
    "continued": continued,
    "left padding": without_mask_and_with,
    "static cache": generate(IDS, cache_implementation="static"),
    "one graph": inside_a_graph,
    "own cache": own_cache,
    "direct call": all_logits,
    "processors": generate(IDS, no_repeat_ngram_size=2, repetition_penalty=1.2, bad_words_ids=[[5], [7, 9]]),
    "chunked prefill": generate(IDS, prefill_chunk_size=7),
    "attentions": generate(IDS, output_attentions=True, return_dict_in_generate=True),
}
# Every way on a plain family and on a hybrid; on the others those that a model's own spelling may break.
FEW = ("llama", "gemma3_text")
ON_ALL = ("greedy", "beams", "embeddings", "continued", "left padding")
CASES = [(family, way) for family in FAMILIES for way in WAYS if family in FEW or way in ON_ALL]
REFUSED = {"attentions": UnsupportedCallError}


@functools.cache
def twin(family: str) -> Any:
    return tiny_model(family)


@functools.cache
def compiled(family: str) -> Any:
    torch._dynamo.reset()
    return compile_eager(tiny_model(family), specpass.SnapKV(budget=256, window=8))


def outcome(way: Way, model: Any) -> Any:
    try:
        return way(model)
    except Exception as error:
        return error


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(("family", "way"), CASES)
def test_as_without_specpass(family: str, way: str) -> None:
    plain, ours = (outcome(WAYS[way], model) for model in (twin(family), compiled(family)))
    if way in REFUSED:
        assert isinstance(ours, REFUSED[way]), repr(ours)
        return
    if isinstance(plain, Exception):
        assert not isinstance(ours, (AssertionError, TypeError)), repr(ours)
        return
    assert not isinstance(ours, Exception), repr(ours)
    same(ours, plain)


def same(ours: Any, plain: Any) -> None:
    """Equal ids, close numbers, the same fields of the same lengths."""
    if isinstance(plain, torch.Tensor):
        if plain.dtype == torch.int64:
            assert torch.equal(ours, plain)
        else:
            torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)
    elif isinstance(plain, tuple):
        assert len(ours) == len(plain)
        for one, other in zip(ours, plain, strict=True):
            same(one, other)
    elif isinstance(plain, dict):
        assert ours.keys() == plain.keys()
        for name in plain:
            if name != "past_key_values":
                same(ours[name], plain[name])
