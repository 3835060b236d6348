"""A draft's graphs on disk: found again by the same draft, by no other, and never half."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import prompt, tiny
from torch import nn
from transformers.models.llama import modeling_llama

import specpass
from specpass.capture import draft as capture
from specpass.capture import stored


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(stored, "graphs_dir", lambda: tmp_path / "graphs")
    return tmp_path / "graphs"


def forbid_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    def trace(*args: object) -> stored.Graphs:
        raise AssertionError("traced, though the graphs were kept")

    monkeypatch.setattr(capture, "trace_draft", trace)


def test_the_next_process_does_not_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs from the disk are those that were traced, and a target reads its prompt with them alike."""
    method = specpass.SpecKV(budget=24, window=8, lookahead=4)
    ids = prompt(50)

    def written() -> tuple[list[int], list[int]]:
        model = specpass.compile(tiny(seed=0), draft=tiny(seed=1), method=method, lowering="eager")
        cache = specpass.BudgetCache(model.config, method, max_new_tokens=1)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False, pad_token_id=0)
        return out.tolist(), cache.lookahead_ids.tolist()

    traced = written()
    forbid_tracing(monkeypatch)
    assert written() == traced


def test_kept_graphs_are_those_that_were_traced() -> None:
    model = tiny(seed=1)
    traced = capture.capture_draft(model, goes_on=True)
    key = capture.graphs_key(model, None, True)
    assert key is not None
    kept = stored.load(key)
    assert kept is not None
    graphs = (traced.prefill, traced.step, traced.extend, traced.plain_step)
    for old, new in zip(graphs, kept, strict=True):
        assert old is not None
        assert new is not None
        assert new.code == old.code
        for one, other in zip(old.graph.nodes, new.graph.nodes, strict=True):
            assert str(one.meta.get("val")) == str(other.meta.get("val"))
            assert one.meta.get("nn_module_stack") == other.meta.get("nn_module_stack")
    assert kept[1] is kept[3]  # one step, as it was


def test_another_draft_has_another_key() -> None:
    keys = {capture.graphs_key(tiny(seed=1), None, False)}
    assert keys == {capture.graphs_key(tiny(seed=2), None, False)}  # weights are inputs
    changed = tiny(seed=1)
    changed.model.layers[1].self_attn.scaling = 0.5
    keys.add(capture.graphs_key(changed, None, False))
    keys.add(capture.graphs_key(tiny(seed=1, layers=3), None, False))
    keys.add(capture.graphs_key(tiny(seed=1, attention="eager"), None, False))
    keys.add(capture.graphs_key(tiny(seed=1).to(torch.bfloat16), None, False))
    keys.add(capture.graphs_key(tiny(seed=1), None, True))
    keys.add(capture.graphs_key(tiny(seed=1), specpass.SpecPC(budget=128), False))
    with torch.autocast("cpu", torch.bfloat16):
        keys.add(capture.graphs_key(tiny(seed=1), None, False))
    assert len(keys) == 8
    assert None not in keys


def test_another_version_or_a_patched_model_is_another_maker(monkeypatch: pytest.MonkeyPatch) -> None:
    def makers() -> str:
        key = capture.graphs_key(tiny(seed=1), None, False)
        assert key is not None
        return key.maker

    before = makers()
    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", lambda *args: args[:2])
    patched = makers()
    monkeypatch.setattr(stored, "fingerprint", lambda: "of other passes")
    assert len({before, patched, makers()}) == 3


def test_what_no_hash_tells_is_not_kept() -> None:
    hooked, patched, extra, foreign = (tiny(seed=1) for _ in range(4))
    hooked.model.norm.register_forward_hook(lambda module, args, out: out * 2)
    norm = patched.model.norm
    norm.forward = lambda hidden: type(norm).forward(norm, hidden) * factor
    factor = 2
    extra.model.norm.offset = torch.ones(1)
    foreign.config._attn_implementation = "somebody's"

    class Local(nn.Identity):
        def forward(self, hidden: torch.Tensor) -> torch.Tensor:
            return hidden * factor

    local = tiny(seed=1)
    local.model.norm = Local()
    assert [capture.graphs_key(model, None, False) for model in (hooked, patched, extra, foreign, local)] == [None] * 5


def test_a_damaged_file_is_replaced(folder: Path) -> None:
    model = tiny(seed=1)
    capture.capture_draft(model)
    (path,) = folder.iterdir()
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="cannot be read .* traced anew"):
        capture.capture_draft(model)
    capture.capture_draft(model)  # without a warning


def test_what_another_version_left_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(seed=1)
    capture.capture_draft(model)
    monkeypatch.setattr(stored, "fingerprint", lambda: "of other passes")
    capture.capture_draft(model)
    assert len(list(folder.iterdir())) == 1
    forbid_tracing(monkeypatch)
    capture.capture_draft(model)


def test_a_folder_that_cannot_be_written_is_no_error(folder: Path) -> None:
    folder.write_text("a file stands where the folder would be")
    assert capture.capture_draft(tiny(seed=1)).layers == 2
