"""Tiny models with tokenizers in folders, as the command line reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}<s> {{ m['content'] }} {% endfor %}{% if add_generation_prompt %}<a>{% endif %}"


def save_model(folder: Path, words: int = 120, template: str | None = TEMPLATE, **settings: Any) -> Path:
    """A tiny model and a word-level tokenizer (w0 .. w{words - 1}) in `folder`; returns it."""
    tiny(**settings).save_pretrained(folder)
    vocabulary = {"<pad>": 0, "<s>": 1, "<a>": 2, "<unk>": 3} | {f"w{i}": i + 4 for i in range(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>")
    if template is not None:
        fast.chat_template = template
    fast.save_pretrained(folder)
    return folder
