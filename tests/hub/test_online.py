"""Models of the hub, without it: what its library answers becomes one error each; revisions; models with code."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from cli_models import save_model
from huggingface_hub import constants
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from tiny import prompt, tiny

from specpass import hub
from specpass.errors import (
    CorruptWeightsError,
    FetchError,
    GatedModelError,
    RemoteCodeError,
    RevisionError,
    UnknownModelError,
)

ID = "some/model"
MODELING = """
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own"


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


@pytest.fixture
def answer(monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the hub's library is asked, and what it raises."""
    seen = SimpleNamespace(asked={}, raises=None)

    def download(name: str, **given: Any) -> str:
        seen.asked = {"name": name, **given}
        raise seen.raises

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    return seen


def refused(kind: type[HfHubHTTPError]) -> HfHubHTTPError:
    response: Any = SimpleNamespace(headers={}, request=None)
    return kind("refused", response=response)


@pytest.mark.parametrize(
    ("raised", "error", "text"),
    [
        (refused(GatedRepoError), GatedModelError, r"gated: accept its terms at .*/some/model.*HF_TOKEN"),
        (refused(RepositoryNotFoundError), UnknownModelError, "the hub has no model 'some/model', or a private"),
        (refused(RevisionNotFoundError), RevisionError, "no revision 'v9'.*branches, tags or commits"),
        (refused(HfHubHTTPError), FetchError, r"'some/model' at revision 'v9'.*out of reach \(HfHubHTTPError\)"),
        (LocalEntryNotFoundError("no"), FetchError, r"out of reach \(LocalEntryNotFoundError\): check the network"),
    ],
)
def test_each_answer_of_the_hub_is_one_error(raised, error, text, answer, monkeypatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    answer.raises = raised
    with pytest.raises(error, match=text) as caught:
        hub.model_path(hub.at_revision(ID, "v9"))
    assert type(caught.value) is error
    assert (answer.asked["name"], answer.asked["revision"]) == (ID, "v9")


def test_a_revision_is_found_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "models--some--model"
    for name, commit in {"main": "a" * 40, "v1": "b" * 40}.items():
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "refs").mkdir(exist_ok=True)
        (folder / "refs" / name).write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    found = [hub.model_path(name).name for name in (ID, f"{ID}@v1", f"{ID}@{'a' * 40}")]
    assert found == ["a" * 40, "b" * 40, "a" * 40]
    with pytest.raises(FetchError, match=r"'some/model' at revision 'v2' is not in .*HF_HUB_OFFLINE is set"):
        hub.model_path(f"{ID}@v2")


def test_only_models_of_the_hub_have_revisions(tmp_path: Path) -> None:
    for name in (str(tmp_path), "smollm2-135m"):
        with pytest.raises(RevisionError, match=f"revision 'v1' of '{name}': only models of the hub"):
            hub.model_path(f"{name}@v1")


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose class lies in its folder."""
    folder = save_model(tmp_path_factory.mktemp("own") / "model", layers=1)
    config = json.loads((folder / "config.json").read_text())
    names = {"AutoConfig": "modeling.OwnConfig", "AutoModelForCausalLM": "modeling.OwnForCausalLM"}
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (folder / "modeling.py").write_text(MODELING)
    return folder


def test_code_of_a_model_runs_where_it_is_trusted_alone(own: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path))
    with pytest.raises(RemoteCodeError, match=r"'own', which transformers has no class for.*--trust-remote-code"):
        hub.load(own)
    model, _ = hub.load(own, trust_remote_code=True)
    assert type(model).__name__ == "OwnForCausalLM"
    assert (model(prompt(8)).logits == tiny(layers=1)(prompt(8)).logits).all()


def test_shards_are_one_model_and_a_missing_one_is_named(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    tiny().save_pretrained(folder, max_shard_size="100KB")
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    assert (hub.load(folder)[0](prompt(8)).logits == tiny()(prompt(8)).logits).all()
    shards[0].unlink()
    with pytest.raises(CorruptWeightsError, match=rf"names shard '{shards[0].name}', which is not in the folder"):
        hub.load(folder)


def test_a_folder_without_weights_says_so(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UnknownModelError, match=r"has no weights that load: .*safetensors.*cut off"):
        hub.load(folder)
