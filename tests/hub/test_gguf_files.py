"""GGUF files of the user's: converted once, anew when they change, and one error for each that cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from gguf_files import TOKENS, write_gguf
from tiny import prompt, tiny

from specpass import hub
from specpass.errors import CorruptWeightsError, FetchError, GgufError, UnknownModelError
from specpass.hub import gguf as conversion


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_file_is_the_model_that_it_was_made_of(tmp_path: Path) -> None:
    """Weights as they are in the file, in its own float type; tokenizer, ends and chat template come along."""
    file = write_gguf(tmp_path / "tiny.gguf")
    before = file.read_bytes()
    model, tokenizer = hub.load(file)
    ids = prompt(20, vocab=len(TOKENS))
    assert model.dtype == torch.float32
    torch.testing.assert_close(model(ids).logits, tiny("qwen2", vocab=len(TOKENS))(ids).logits)
    assert tokenizer.decode(tokenizer("Why? 12").input_ids) == "Why? 12"
    assert tokenizer.chat_template
    assert model.generation_config.eos_token_id == [len(TOKENS) - 1, len(TOKENS) - 2]
    assert file.read_bytes() == before


@pytest.mark.parametrize(("kind", "dtype"), [("F16", torch.float16), ("Q8_0", torch.bfloat16)])
def test_the_files_own_float_type_is_kept_and_blocks_become_bfloat16(tmp_path: Path, kind: str, dtype) -> None:
    model, _ = hub.load(write_gguf(tmp_path / "tiny.gguf", layers=1, kind=kind))
    assert model.dtype == dtype
    weight = tiny("qwen2", layers=1, vocab=len(TOKENS)).model.layers[0].self_attn.q_proj.weight
    torch.testing.assert_close(model.model.layers[0].self_attn.q_proj.weight.float(), weight, atol=0.02, rtol=0.02)


def test_converted_once_and_anew_when_the_file_changes(tmp_path: Path, cache: Path, monkeypatch) -> None:
    made: list[str] = []
    convert = conversion.convert
    monkeypatch.setattr(conversion, "convert", lambda name, *rest: (made.append(name), convert(name, *rest))[1])
    file = write_gguf(tmp_path / "tiny.gguf", layers=1)
    first = hub.model_path(file)
    assert hub.model_path(str(file)) == first
    write_gguf(file, layers=1, seed=1)
    os.utime(file, ns=(1, 1))
    second = hub.model_path(file)
    assert made == ["tiny.gguf", "tiny.gguf"]
    assert first != second
    assert [path for path in (cache / "gguf").iterdir() if path.is_dir()] == [second]


def test_what_is_no_gguf_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"weights")
    with pytest.raises(GgufError, match=r"model\.safetensors is no GGUF file: it begins with b'weig'.*name the folder"):
        hub.model_path(file)
    with pytest.raises(UnknownModelError, match=r"there is no file or folder '.*absent\.gguf'"):
        hub.model_path(tmp_path / "absent.gguf")


@pytest.mark.parametrize("left", [6, 400, 5000, -1])
def test_a_file_that_was_cut_off_is_named(tmp_path: Path, left: int) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", layers=1)
    file.write_bytes(file.read_bytes()[:left])
    with pytest.raises(CorruptWeightsError, match=r"tiny\.gguf has [\d,]+ bytes, and ends before"):
        hub.model_path(file)


def test_an_architecture_that_transformers_does_not_read_is_named(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", layers=1, architecture="rwkv6")
    with pytest.raises(GgufError, match="architecture 'rwkv6', which transformers does not read"):
        hub.model_path(file)
    assert not cache.exists()


def test_a_tokenizer_that_transformers_does_not_read_is_named(tmp_path: Path, cache: Path) -> None:
    with pytest.raises(GgufError, match=r"tiny\.gguf cannot be converted: its tokenizer or its weights lack"):
        hub.model_path(write_gguf(tmp_path / "tiny.gguf", layers=1, merges=()))
    assert not [path for path in (cache / "gguf").iterdir() if path.is_dir()]


def test_a_part_of_a_file_says_how_parts_are_joined(tmp_path: Path) -> None:
    with pytest.raises(GgufError, match=r"one of 3 parts.*llama-gguf-split --merge"):
        hub.model_path(write_gguf(tmp_path / "tiny-00001-of-00003.gguf", layers=1, parts=3))


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write_gguf(tmp_path / "tiny.gguf", layers=1)
    monkeypatch.setenv("SPECPASS_CACHE", str(file))
    with pytest.raises(FetchError, match=r"cannot be written to: .*SPECPASS_CACHE"):
        hub.model_path(file)
