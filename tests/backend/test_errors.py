"""One class per mistake; the message names the value at fault, and the model and its cache stay as they were."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from support import call, compile_eager, state_of
from tiny import prompt, tiny
from tokenizers import Tokenizer, models
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import specpass
from specpass import errors, hub
from specpass.backend import checks
from specpass.hub import weights

C, W, L = 24, 8, 4
METHOD = specpass.SpecKV(budget=C, window=W, lookahead=L)


@contextlib.contextmanager
def refused(model: torch.nn.Module, error: type[Exception], *texts: str) -> Iterator[None]:
    """The block raises `error`, whose message holds every text, and leaves the model as it was."""
    before = state_of(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(error) as caught:
        yield
    assert caught.type is error
    assert isinstance(caught.value, specpass.errors.SpecpassError)
    for text in texts:
        assert text in str(caught.value)
    assert state_of(model) == before[0]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[1][name]) or tensor.is_meta


def new_cache(model: Any, **kwargs: Any) -> specpass.BudgetCache:
    return specpass.BudgetCache(model.config, METHOD, **{"max_new_tokens": 4, **kwargs})


def untouched(cache: specpass.BudgetCache) -> bool:
    return not any(layer.is_initialized or layer.tensors() for layer in cache.layers) and cache.get_seq_length() == 0


@pytest.fixture(scope="module")
def model() -> Any:
    """Compiled, with a draft that reads 48 positions."""
    return compile_eager(tiny(), METHOD, tiny(seed=1, max_position_embeddings=48))


# -- before anything is compiled


def test_a_draft_beside_a_lookahead_of_the_prompts_own() -> None:
    target, how = tiny(), specpass.SpecKV(budget=C, window=W, lookahead="ngram")
    with refused(target, errors.LookaheadError, "lookahead='ngram'", "a draft is given", "leave one of them out"):
        specpass.compile(target, draft=tiny(seed=1), method=how)
    with refused(target, errors.SpeculationError, "speculate=2", "SpecKV has none here"):
        specpass.compile(target, method=how, speculate=2)


@pytest.mark.parametrize(
    ("bits", "draft", "texts"),
    [
        (4, "bfloat16", ["draft_bits=4", "expected 8"]),
        (True, "bfloat16", ["draft_bits=True"]),
        (8, "float32", ["float32 on cpu", "dtype=torch.bfloat16"]),
        (8, None, ["SnapKV has none here", "pass draft="]),
    ],
)
def test_bits_that_a_draft_cannot_be_read_in(bits: Any, draft: str | None, texts: list[str]) -> None:
    how = specpass.SnapKV(budget=C, window=W) if draft is None else METHOD
    given = None if draft is None else tiny(seed=1).to(getattr(torch, draft))
    target = tiny()
    with refused(target, errors.DraftBitsError, *texts):
        specpass.compile(target, draft=given, method=how, draft_bits=bits)


@pytest.mark.parametrize(
    ("arguments", "texts"),
    [
        ({"budget": 0}, ["budget=0"]),
        ({"budget": -7}, ["budget=-7"]),
        ({"budget": 8}, ["budget=8", "window=8"]),
        ({"budget": 5}, ["budget=5", "window=8"]),
        ({"budget": 1.5}, ["budget=1.5", "(0, 1]"]),
        ({"budget": True}, ["budget=True"]),
        ({"budget": 64, "kernel": 4}, ["kernel=4"]),
        ({"budget": 64, "reduce": "sum"}, ["reduce='sum'", "max", "mean"]),
        ({"budget": 64, "pool": "mean"}, ["pool='mean'", "avg"]),
        ({"budget": 64, "lookahead": 0}, ["lookahead=0"]),
        ({"budget": 64, "temperature": -0.5}, ["temperature=-0.5"]),
    ],
)
def test_budgets_and_options(arguments: dict[str, Any], texts: list[str]) -> None:
    target = tiny()
    with refused(target, errors.BudgetError, *texts):
        compile_eager(target, specpass.SpecKV(**{"window": W, "lookahead": L, **arguments}), tiny())


def test_no_method_at_all() -> None:
    target = tiny()
    with refused(target, errors.BudgetError, "'speckv'", "SpecKV(budget=1024)"):
        compile_eager(target, "speckv", tiny())


@pytest.mark.parametrize("door", ["compile", "plain"])
def test_a_method_that_needs_a_draft(door: str) -> None:
    target = tiny()
    with refused(target, errors.MissingDraftError, "SpecKV", "draft=", "lookahead_ids="):
        if door == "compile":
            compile_eager(target, METHOD)
        else:
            specpass.Backend(method=METHOD)


def save_tokenizer(folder: Path, words: str) -> str:
    folder.mkdir()
    vocabulary = {word: index for index, word in enumerate(words)}
    Tokenizer(models.WordLevel(vocabulary, unk_token=words[0])).save(str(folder / "tokenizer.json"))
    return str(folder)


def plain_door(target: Any, draft: Any = None) -> None:
    torch._dynamo.reset()
    backend = specpass.Backend(draft=draft or tiny(seed=1), method=METHOD, lowering="eager")
    target.compile(backend=backend, dynamic=True)


def enter(door: str, target: Any, draft: Any) -> Any:
    """Compile, and call once: the plain door meets the target only there."""
    if door == "compile":
        return compile_eager(target, METHOD, draft)
    plain_door(target, draft)
    try:
        return call(target, prompt(40), new_cache(target))
    finally:
        del target._compiled_call_impl  # the user's own compile(), which `refused` would count as a change


@pytest.mark.parametrize(
    ("what", "door"),
    [
        ("vocabulary", "compile"),
        ("tokenizer", "compile"),
        ("device", "compile"),
        ("tokenizer", "plain"),
        ("device", "plain"),
    ],
)
def test_pairs_that_cannot_work(what: str, door: str, tmp_path: Path) -> None:
    target, draft = tiny(), tiny(seed=1)
    if what == "vocabulary":
        draft = tiny(seed=1, vocab=300)
        error, texts = errors.TokenizerMismatchError, ["128", "300"]
    elif what == "tokenizer":
        target.config._name_or_path = save_tokenizer(tmp_path / "target", "abcdef")
        draft.config._name_or_path = save_tokenizer(tmp_path / "draft", "abcfed")
        error, texts = errors.TokenizerMismatchError, ["2 of the draft's 6 tokens"]
    else:
        draft = draft.to("meta")
        error, texts = errors.DeviceMismatchError, ["cpu", "meta"]
    with refused(target, error, *texts):
        enter(door, target, draft)


@pytest.mark.parametrize("which", ["target", "draft"])
@pytest.mark.parametrize("nested", [False, True])
def test_models_on_several_devices_where_graphs_are_needed(which: str, nested: bool, tmp_path: Path) -> None:
    """As device_map="auto" leaves them: accelerate's hooks say where each module computes."""
    pair = {"target": tiny(), "draft": tiny(seed=1)}
    for device, layer in enumerate(pair[which].model.layers):
        hook = SimpleNamespace(execution_device=f"cuda:{device}")
        layer._hf_hook = SimpleNamespace(hooks=(hook,)) if nested else hook
    texts = which, "cuda:0 and cuda:1", "device_map={'': 'cuda:0'}"
    with refused(pair["target"], errors.SeveralDevicesError, *texts):
        specpass.export_onnx(pair["target"], pair["draft"], METHOD, tmp_path / "out")
    if which == "draft":
        with refused(pair["target"], errors.SeveralDevicesError, "SpecPC", *texts):
            compile_eager(pair["target"], specpass.SpecPC(budget=C, window=W), pair["draft"])


def test_devices_of_offloaded_weights_are_one() -> None:
    waiting = map(torch.device, ("cpu", "meta", "cuda", "cuda:0"))
    checks.check_weights(waiting)


def test_one_tokenizer_with_padded_vocabularies_is_no_error(tmp_path: Path) -> None:
    target, draft = tiny(vocab=300), tiny(seed=1, vocab=128)
    for name, model in (("target", target), ("draft", draft)):
        model.config._name_or_path = save_tokenizer(tmp_path / name, "abcdef")
    assert compile_eager(target, METHOD, draft) is target
    compile_eager(tiny(), METHOD, tiny(vocab=192))  # without files: sizes that padding explains


@pytest.mark.parametrize("which", ["target", "draft"])
def test_encoder_decoders(which: str) -> None:
    sizes = {"vocab_size": 128, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    config = transformers.T5Config(**sizes, decoder_start_token_id=0)
    pair = {"target": tiny(), "draft": tiny(seed=1), which: transformers.T5ForConditionalGeneration(config).eval()}
    with refused(pair["target"], errors.EncoderDecoderError, which, "T5ForConditionalGeneration"):
        compile_eager(pair["target"], METHOD, pair["draft"])


@pytest.mark.parametrize("which", ["target", "draft"])
def test_training_mode(which: str) -> None:
    pair = {"target": tiny(), "draft": tiny(seed=1)}
    pair[which].train()
    with refused(pair["target"], errors.GradientsError, which, "eval()"):
        compile_eager(pair["target"], METHOD, pair["draft"])


def test_lowering_by_another_name() -> None:
    target = tiny()
    with refused(target, errors.UnsupportedCallError, "'fast'", "'inductor'", "'eager'"):
        specpass.compile(target, draft=tiny(), method=METHOD, lowering="fast")


# -- at the call: the cache stays empty, and a right call works afterwards


def test_draft_context_too_short(model: Any) -> None:
    cache = new_cache(model)
    with refused(model, errors.DraftContextError, "45 tokens", f"{L} more", "48"):
        call(model, prompt(45), cache)
    assert untouched(cache)
    assert call(model, prompt(44), cache).shape == (1, 1, 128)
    assert cache.get_seq_length() == 44


@pytest.mark.parametrize("which", ["target", "draft"])
def test_training_mode_at_the_call(which: str) -> None:
    pair = {"target": tiny(), "draft": tiny(seed=1)}
    model = compile_eager(pair["target"], METHOD, pair["draft"])
    cache = new_cache(model)
    pair[which].train()
    with refused(model, errors.GradientsError, which, "eval()"):
        call(model, prompt(40), cache)
    assert untouched(cache)


def test_gradients_wanted() -> None:
    target = compile_eager(tiny().requires_grad_(True), METHOD, tiny(seed=1))
    cache = new_cache(target)
    with refused(target, errors.GradientsError, "torch.no_grad()"), torch.enable_grad():
        target(input_ids=prompt(40), past_key_values=cache)
    assert untouched(cache)
    assert call(target, prompt(40), cache).shape == (1, 1, 128)


def test_no_attention_site(monkeypatch: pytest.MonkeyPatch) -> None:
    def linear(module: Any, query: Any, key: Any, value: Any, mask: Any, **_: Any) -> Any:
        key, value = (states.repeat_interleave(2, 1) for states in (key, value))
        return ((query @ key.transpose(2, 3)).relu().tril() @ value).transpose(1, 2), None

    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "linear", linear)
    target = tiny()
    target.config._attn_implementation = "linear"
    plain_door(target)
    cache = new_cache(target)
    with refused(target, errors.NoAttentionSiteError, "attn_implementation='sdpa'"):
        call(target, prompt(40), cache)
    assert untouched(cache)


def test_partial_graph() -> None:
    target = tiny()
    target.model.layers[1].register_forward_pre_hook(lambda module, args: torch._dynamo.graph_break())
    plain_door(target)
    cache = new_cache(target)
    with refused(target, errors.PartialGraphError, "1 of 2 layers", "graph_breaks"):
        call(target, prompt(40), cache)
    assert untouched(cache)


def test_cache_of_another_method(model: Any) -> None:
    cache = specpass.BudgetCache(model.config, specpass.SpecKV(budget=32, window=W, lookahead=L), max_new_tokens=4)
    with refused(model, errors.MethodMismatchError, "budget=32", f"budget={C}"):
        call(model, prompt(40), cache)
    assert untouched(cache)


def test_uncompiled_model() -> None:
    target = tiny()
    cache = new_cache(target)
    with refused(target, errors.UncompiledCacheError, "specpass.compile"):
        call(target, prompt(40), cache)
    assert untouched(cache)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_another_backend_took_the_place_of_specpass(backend: str) -> None:
    """At the door of compile and at torch's own; a prompt, and a step behind a prompt that was pruned."""
    for door in ("compile", "plain"):
        target, snap = tiny(layers=1), specpass.SnapKV(budget=C, window=W)
        if door == "compile":
            compile_eager(target, snap)
        else:
            target.compile(backend=specpass.Backend(method=snap, lowering="eager"), dynamic=True)
        pruned = specpass.BudgetCache(target.config, snap)
        call(target, prompt(40), pruned)
        target.compile(backend=backend, dynamic=True)
        with refused(target, errors.UncompiledCacheError, "another backend", "specpass.compile"):
            call(target, prompt(40), specpass.BudgetCache(target.config, snap))
        with refused(target, errors.UncompiledCacheError, "another backend"):
            call(target, prompt(1), pruned)
        assert call(target, prompt(40), None).shape == (1, 1, 128)


def test_attention_probabilities(model: Any) -> None:
    cache = new_cache(model)
    with refused(model, errors.UnsupportedCallError, "output_attentions", "restore"):
        call(model, prompt(40), cache, output_attentions=True)
    with refused(model, errors.UnsupportedCallError, "output_attentions"):
        model.generate(prompt(40), max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
    assert untouched(cache)


def test_a_token_that_the_draft_does_not_know() -> None:
    """Vocabularies of one family are padded to unlike sizes; an id beyond the smaller one is another tokenizer's."""
    target = compile_eager(tiny(), METHOD, tiny(seed=1, vocab=100))
    known = prompt(40).clamp(max=99)
    cache = new_cache(target)
    call(target, known, cache)
    assert cache.lookahead_ids.max() < 100
    known[0, 7], cache = 117, new_cache(target)
    with refused(target, errors.TokenizerMismatchError, "token id 117", "100 tokens"):
        call(target, known, cache)
    assert untouched(cache)


def test_labels(model: Any) -> None:
    cache = new_cache(model)
    with refused(model, errors.UnsupportedCallError, "labels="):
        call(model, prompt(40), cache, labels=prompt(40), logits_to_keep=0)
    assert untouched(cache)


def test_a_mask_without_a_last_token(model: Any) -> None:
    cache, mask = new_cache(model), torch.ones(2, 40, dtype=torch.int64)
    mask[1, -3:] = 0
    with refused(model, errors.MaskError, "padding_side"):
        call(model, prompt(40, batch=2), cache, attention_mask=mask)
    assert untouched(cache)


def test_a_padded_batch_goes_on_without_position_ids(model: Any) -> None:
    cache, mask = new_cache(model), torch.ones(2, 40, dtype=torch.int64)
    mask[1, :3] = 0
    call(model, prompt(40, batch=2), cache, attention_mask=mask)
    with refused(model, errors.PositionsError, "position_ids"):
        call(model, prompt(1, batch=2), cache)
    assert cache.get_seq_length() == 40


def test_lookahead_ids(model: Any) -> None:
    cache = new_cache(model, lookahead_ids=prompt(L, batch=3))
    with refused(model, errors.LookaheadError, "3 rows", "batch has 2"):
        call(model, prompt(40, batch=2), cache)
    assert untouched(cache)


def test_corrupt_weights(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    weights.check_weights(tmp_path)
    size = file.stat().st_size
    with file.open("r+b") as stream:
        stream.truncate(size - 5)
    with refused(model, errors.CorruptWeightsError, f"{size - 5:,}", f"{size:,}", "fetch or convert"):
        weights.check_weights(tmp_path)


def test_mismatching_weights(tmp_path: Path) -> None:
    model = tiny()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    with refused(model, errors.CorruptWeightsError, "do not match", "mlp"):
        hub.load(tmp_path)
