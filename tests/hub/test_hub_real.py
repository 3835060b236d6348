"""The real models: that their folders load, talk, stop, and that the Qwen pair shares one tokenizer."""

from __future__ import annotations

import pytest
import torch

from specpass import hub

pytestmark = pytest.mark.real
END_TOKENS = {"<|im_end|>", "<|endoftext|>"}
CHAT = [name for name in hub.MODELS if name != "gemma3-270m"]
TEXT = "def f(x):\n\treturn 'a12345' + \"é\"  # It's 1,234.5  \n\n\n  don't 你好 🎉 x  1  22"


@pytest.fixture(scope="module")
def tokenizers() -> dict:
    from transformers import AutoTokenizer

    return {name: AutoTokenizer.from_pretrained(hub.model_path(name), local_files_only=True) for name in hub.MODELS}


@pytest.mark.parametrize("name", CHAT)
def test_tokenizer_round_trip(tokenizers, name):
    tokenizer = tokenizers[name]
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == TEXT
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer.pad_token in END_TOKENS
    assert tokenizer.padding_side == "left"


def test_smollm2_splits_digits_before_spaces(tokenizers):
    tokenizer = tokenizers["smollm2-135m"]
    assert tokenizer.convert_ids_to_tokens(tokenizer("x  12").input_ids) == ["x", "ĠĠ", "1", "2"]


def test_pair_shares_a_tokenizer(tokenizers):
    draft, target = tokenizers["qwen2.5-coder-0.5b"], tokenizers["qwen2.5-coder-1.5b"]
    assert draft.get_vocab() == target.get_vocab()
    assert draft.backend_tokenizer.to_str() == target.backend_tokenizer.to_str()


@pytest.mark.parametrize("name", ["smollm2-135m", "qwen2.5-coder-0.5b"])
def test_model_answers_and_stops(name):
    model, tokenizer = hub.load(name)
    assert model.dtype == torch.bfloat16
    assert sum(weight.numel() for weight in model.parameters()) == hub.MODELS[name].parameters
    assert set(tokenizer.convert_ids_to_tokens(model.generation_config.eos_token_id)) == END_TOKENS
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France? Answer in one word."}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**inputs, max_new_tokens=24, do_sample=False)
    answer = tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")


def test_the_base_model_goes_on_with_a_text(tokenizers):
    """Gemma 3 270M has no chat template: it begins with <bos>, ends with <eos> alone, and goes on with a text."""
    model, tokenizer = hub.load("gemma3-270m")
    assert sum(weight.numel() for weight in model.parameters()) == hub.MODELS["gemma3-270m"].parameters
    assert tokenizer.decode(tokenizer(TEXT).input_ids) == f"<bos>{TEXT}"
    assert (tokenizer.chat_template, tokenizer.padding_side) == (None, "left")
    assert model.generation_config.eos_token_id == [tokenizer.eos_token_id]
    inputs = tokenizer("1, 2, 3, 4, 5,", return_tensors="pt")
    out = model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert tokenizer.decode(out[0], skip_special_tokens=True).startswith("1, 2, 3, 4, 5, 6, 7, 8,")
