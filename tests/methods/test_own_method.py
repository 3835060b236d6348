"""Methods of one's own: the example of docs/extending.md as it stands there, and what the hooks refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from announced import announce
from cli_models import save_model
from pages import example
from support import check_answer, check_rules, compile_eager, kept, padded, run
from tiny import prompt, tiny
from transformers import DynamicCache
from typer.testing import CliRunner

import specpass
from specpass import cli
from specpass.errors import MethodHookError
from specpass.methods import registry
from specpass.testing import eager

C, W = 24, 6
SECTION = "A method: one file"
runner = CliRunner()


@pytest.fixture
def key_norm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The class that the documentation shows, from a package that announces it as the documentation says."""
    source = example("extending.md", SECTION)
    assert len(source.splitlines()) < 60
    points = tomllib.loads(example("extending.md", SECTION, "toml"))["project"]["entry-points"]["specpass.methods"]
    announce(tmp_path, monkeypatch, "own_method", source, [f"{name} = {value}" for name, value in points.items()])
    yield registry.method_class("keynorm")
    del sys.modules["own_method"]


def smallest_keys(twin: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    """Eager: the C - W prompt keys of the smallest norm, and the window, [K, C] per layer."""
    cache, length, found = DynamicCache(), ids.shape[1], []
    with torch.no_grad():
        twin(input_ids=ids, past_key_values=cache)
    for layer in cache.layers:
        norm = layer.keys[0].norm(dim=-1)
        found.append(eager.top_positions((norm.amax(-1, keepdim=True) - norm)[:, : length - W], length, C, W))
    return found


def test_the_documented_method_works(key_norm: Any) -> None:
    torch._dynamo.reset()
    model, twin = compile_eager(tiny(), key_norm(budget=C, window=W)), tiny()
    prompts = [prompt(60, seed=1), prompt(45, seed=2)]
    ids, mask = padded(prompts)
    together = run(model, ids, 5, mask)
    for row, own in enumerate(prompts):
        alone = run(model, own, 5)
        check_rules(kept(alone.cache), own.shape[1], C, W)
        check_answer(alone, twin, own, kept(alone.cache))
        assert together.tokens[row] == alone.tokens[0]
        for ours, theirs in zip(kept(alone.cache), smallest_keys(twin, own), strict=True):
            assert torch.equal(ours, theirs)


def test_the_documented_name_works(key_norm: Any, tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    args = ["-t", str(folder), "-m", "keynorm", "-b", "24", "--option", "window=6", "--lowering", "eager", "--json"]
    result = runner.invoke(cli.app, ["explain", *args])
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["method"] == key_norm(24, window=6).key == f"own_method.{key_norm(24, window=6)!r}"
    assert [site["budget"] for site in found["graphs"][0]["sites"]] == [24, 24]
    assert found["refusals"] == []
    assert found["costs"] is None  # what its scores cost is not known
    text = " ".join(f"w{index % 90}" for index in range(60))
    result = runner.invoke(cli.app, ["generate", *args, "-p", text, "--raw", "-n", "4"])
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["method"] == found["method"]


@dataclasses.dataclass(frozen=True)
class Stride(specpass.SnapKV):
    """Keeps every n-th position, whatever the scores say."""

    def select(self, scores: torch.Tensor, lengths: torch.Tensor, budget: int) -> torch.Tensor:
        slot = torch.arange(budget, device=scores.device)
        positions = (slot * lengths[:, None]) // budget
        return positions[:, None].expand(-1, scores.shape[1], -1).contiguous()


def test_a_choice_of_ones_own() -> None:
    torch._dynamo.reset()
    model, ids = compile_eager(tiny(), Stride(budget=C, window=W)), prompt(48, seed=3)
    ours = run(model, ids, 4)
    assert all(layer[0].tolist() == list(range(0, 48, 2)) for layer in kept(ours.cache))
    check_answer(ours, tiny(), ids, kept(ours.cache))


def host_read(scores: torch.Tensor) -> torch.Tensor:
    return scores[..., 0] if float(scores.sum()) > 0 else scores[..., 1]


@pytest.mark.parametrize(
    ("score", "text"),
    [
        (lambda self, query, key, *_, scale: host_read(key), "no .item()"),
        (lambda self, query, key, *_, scale: key.norm(dim=-1)[..., :3], "expected scores"),
        (lambda self, query, key, *_, scale: (key, key), "must return one tensor"),
        (lambda self, query, key, *_, scale: key[..., 0] * torch.ones(16, 16)[0, 0].to(key), None),
    ],
    ids=["host", "shape", "tuple", "constant"],
)
def test_hooks_that_cannot_be_part_of_a_graph(score: Any, text: str | None) -> None:
    torch._dynamo.reset()
    method = type("Own", (specpass.SnapKV,), {"score": score})(budget=C, window=W)
    model = compile_eager(tiny(layers=1), method)
    if text is None:
        run(model, prompt(40), 2)
        return
    with pytest.raises(MethodHookError, match=re.escape(text)):
        run(model, prompt(40), 2)
