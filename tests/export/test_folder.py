"""The exported folder: standard operators, checked shapes, named nodes, shared weights; what is refused when opened."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from onnx_cases import BLOCK, METHODS, NEW, PROMPTS, Case, make, pair
from support import compile_eager
from tiny import tiny

import specpass
from specpass import errors, runtime
from specpass.export import api
from specpass.runtime import bundle

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make(tmp_path_factory.mktemp("onnx") / "speckv")


@pytest.fixture
def copy(case: Case, tmp_path: Path) -> Path:
    return Path(shutil.copytree(case.folder, tmp_path / "copy"))


# -- what is in it


def test_inputs_outputs_and_constant_budget(case: Case) -> None:
    graph = onnx.load(case.folder / "prefill.onnx", load_external_data=False).graph
    assert [value.name for value in graph.input] == ["input_ids", "attention_mask"]
    shapes = {
        value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        for value in (*graph.input, *graph.output)
    }
    assert shapes["input_ids"] == shapes["attention_mask"] == ["batch", "sequence"]
    assert shapes["logits"] == ["batch", 1, 128]
    for layer in range(2):
        assert shapes[f"present.{layer}.key"] == shapes[f"present.{layer}.value"] == ["batch", 2, 24, 16]
        assert shapes[f"positions.{layer}"] == ["batch", 2, 24]
    assert shapes["lookahead_ids"] == ["batch", 4]


@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx"])
def test_standard_operators_checker_and_strict_shape_inference(case: Case, name: str, tmp_path: Path) -> None:
    path = str(case.folder / name)
    onnx.checker.check_model(path, full_check=True)
    onnx.shape_inference.infer_shapes_path(path, str(tmp_path / name), check_type=True, strict_mode=True)
    model = onnx.load(path, load_external_data=False)
    assert [(opset.domain, opset.version >= 20) for opset in model.opset_import] == [("", True)]
    assert not model.functions


def test_the_drafts_steps_are_one_loop(case: Case) -> None:
    graph = onnx.load(case.folder / "prefill.onnx", load_external_data=False).graph
    assert [node.op_type for node in graph.node].count("Loop") == 1


def test_nodes_name_their_layer_and_the_pruning(case: Case) -> None:
    graph = onnx.load(case.folder / "prefill.onnx", load_external_data=False).graph
    names = {node.name for node in graph.node}
    assert len(names) == len(graph.node)
    for layer in range(2):
        for operator in ("importance", "select", "gather_kv"):
            stem = f"model.layers.{layer}.self_attn.{operator}/"
            assert any(name.startswith(stem) for name in names), stem
    assert any(name.startswith("draft.model.layers.0.") for name in names)


def test_weights_are_there_once(case: Case) -> None:
    for file, model in (("target.onnx_data", case.target), ("draft.onnx_data", case.draft)):
        assert model is not None
        size = sum(param.numel() * param.element_size() for param in model.parameters())
        assert size <= (case.folder / file).stat().st_size <= 1.05 * size
    used = {}
    for name in ("prefill.onnx", "decode.onnx"):
        tensors = onnx.load(case.folder / name, load_external_data=False).graph.initializer
        places = [{entry.key: entry.value for entry in tensor.external_data} for tensor in tensors]
        used[name] = {(place["location"], place["offset"]) for place in places if place}
    assert {file for file, _ in used["prefill.onnx"]} == {"target.onnx_data", "draft.onnx_data"}
    assert used["decode.onnx"] <= used["prefill.onnx"]


def test_without_the_drafts_data_prefill_does_not_load(copy: Path) -> None:
    import onnxruntime

    (copy / "draft.onnx_data").unlink()
    with pytest.raises(Exception, match=r"draft\.onnx_data"):
        onnxruntime.InferenceSession(str(copy / "prefill.onnx"))


# -- generating


def test_stop_tokens_padding_and_streaming(case: Case) -> None:
    free = case.model.generate(PROMPTS, max_new_tokens=NEW, stop_tokens=())
    stop = free[0][2]
    seen: list[tuple[int, int]] = []
    got = case.model.generate(
        PROMPTS, max_new_tokens=NEW, stop_tokens=[stop], on_token=lambda row, token: seen.append((row, token))
    )
    expected = [row[: row.index(stop) + 1] if stop in row else row for row in free]
    assert got == expected
    assert len(got[0]) <= 3
    assert [[token for row, token in seen if row == own] for own in range(3)] == got


def test_a_stop_token_of_the_model_ends_as_in_generate(tmp_path: Path) -> None:
    method = METHODS["snapkv"]
    target = tiny("llama", layers=2)
    first = compile_eager(target, method).generate(torch.tensor(PROMPTS[:1]), max_new_tokens=NEW, do_sample=False)
    specpass.restore(target)
    target.generation_config.eos_token_id = int(first[0, len(PROMPTS[0]) + 2])
    target.generation_config.repetition_penalty = 1.3
    specpass.export_onnx(target, method=method, out=tmp_path / "out")
    compile_eager(target, method)
    model = runtime.load(tmp_path / "out", threads=1, verify=True)
    for own in PROMPTS:
        theirs = target.generate(torch.tensor([own]), max_new_tokens=NEW, do_sample=False)[0, len(own) :].tolist()
        assert model.generate([own], max_new_tokens=NEW) == [theirs]


def test_sampling_depends_on_the_seed_alone(case: Case) -> None:
    options: dict[str, Any] = {"max_new_tokens": 20, "temperature": 1.5, "top_k": 50, "top_p": 0.95}
    one, two, other = (case.model.generate(PROMPTS[:1], seed=seed, **options) for seed in (1, 1, 2))
    assert one == two != other
    assert case.model.generate(PROMPTS[:1], max_new_tokens=5, temperature=9.0, top_k=1) == case.model.generate(
        PROMPTS[:1], max_new_tokens=5
    )


def test_a_step_writes_into_the_bound_buffers(case: Case) -> None:
    state = case.model.prefill(PROMPTS, room=4)
    places = {name: value.data_ptr() for name, value in state.storage.items()}
    before = {name: value.numpy().copy() for name, value in state.storage.items()}
    slots = state.lengths.copy()
    case.model.step(state, np.array([5, 6, 7]))
    for name, value in state.storage.items():
        assert value.data_ptr() == places[name]
        layer = int(name.split(".")[1])
        changed = (value.numpy() != before[name]).any(-1)
        for row in range(3):
            for head in range(2):
                assert np.flatnonzero(changed[row, head]).tolist() == [slots[layer, row, head]]


@pytest.mark.parametrize("option", [{"temperature": -1.0}, {"top_k": -1}, {"top_p": 0.0}, {"repetition_penalty": 0.0}])
def test_sampling_errors_name_the_value(case: Case, option: dict[str, float]) -> None:
    with pytest.raises(errors.SamplingError, match=next(iter(option))):
        case.model.generate(PROMPTS, **option)


@pytest.mark.parametrize("prompts", [[], [[]], [[1, 2], [128]], [[-1]], [["a"]]])
def test_wrong_prompts(case: Case, prompts: list[list[int]]) -> None:
    with pytest.raises(errors.PromptError):
        case.model.generate(prompts)


# -- without torch


def test_runs_where_torch_is_not(case: Case) -> None:
    code = (
        BLOCK
        + f"""
import json, specpass, specpass.runtime
model = specpass.runtime.load({str(case.folder)!r}, threads=1)
print(json.dumps(model.generate({PROMPTS!r}, max_new_tokens={NEW})))
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == case.model.generate(PROMPTS, max_new_tokens=NEW)


# -- what is refused


def manifest(folder: Path, **changes: Any) -> None:
    path = folder / "specpass.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_another_version(copy: Path) -> None:
    manifest(copy, version=99)
    with pytest.raises(errors.BundleError, match=r"version 99 .* export the model again"):
        runtime.load(copy)


def test_no_export(tmp_path: Path) -> None:
    with pytest.raises(errors.BundleError, match="specpass export"):
        runtime.load(tmp_path)
    (tmp_path / "specpass.json").write_text("{")
    with pytest.raises(errors.BundleError, match="cannot be read"):
        runtime.load(tmp_path)
    (tmp_path / "specpass.json").write_text('{"version": 1}')
    with pytest.raises(errors.BundleError, match="does not describe"):
        runtime.load(tmp_path)


@pytest.mark.parametrize("name", ["prefill.onnx", "decode.onnx", "target.onnx_data", "draft.onnx_data"])
def test_missing_and_truncated_files(copy: Path, name: str) -> None:
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-7])
    with pytest.raises(errors.BundleError, match=rf"{name} has {len(data) - 7:,} bytes and should have {len(data):,}"):
        runtime.load(copy)
    (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(errors.BundleError, match="other content"):
        runtime.load(copy, verify=True)
    (copy / name).unlink()
    with pytest.raises(errors.BundleError, match=f"{name} is missing"):
        runtime.load(copy)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "..\\secret", "C:secret", ""])
def test_paths_that_lead_outside(copy: Path, name: str) -> None:
    (copy.parent / "secret").write_bytes(b"12345")
    files = json.loads((copy / "specpass.json").read_text())["files"]
    manifest(copy, files=files | {name: {"bytes": 5, "sha256": ""}})
    with pytest.raises(errors.BundleError, match="leads outside"):
        runtime.load(copy)


def test_a_link_that_leads_outside(copy: Path) -> None:
    outside = copy.parent / "outside"
    (copy / "draft.onnx_data").rename(outside)
    (copy / "draft.onnx_data").symlink_to(outside)
    with pytest.raises(errors.BundleError, match="leads outside"):
        runtime.load(copy)


# -- what cannot be exported


def test_an_interrupted_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "write_graphs", stop)
    with pytest.raises(KeyboardInterrupt):
        specpass.export_onnx(tiny("llama"), method=METHODS["snapkv"], out=tmp_path / "deep" / "out")
    assert list((tmp_path / "deep").iterdir()) == []


def test_an_earlier_export_is_replaced_and_other_folders_are_not(tmp_path: Path) -> None:
    old = tmp_path / "out"
    old.mkdir()
    (old / "notes.txt").write_text("mine")
    with pytest.raises(errors.OutputFileError, match="no earlier export"):
        specpass.export_onnx(tiny("llama"), out=old)
    (old / "specpass.json").write_text("{}")
    with api.folder_that_appears_whole(old) as folder:
        (folder / "new").write_text("new")
        assert (old / "notes.txt").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in old.iterdir()] == ["new"]


def test_an_architecture_that_is_refused_names_the_layer(tmp_path: Path) -> None:
    with pytest.raises(errors.ExportError, match="layer 0 is no attention layer"):
        specpass.export_onnx(tiny("lfm2"), method=METHODS["snapkv"], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_operator_without_an_onnx_form_is_named_with_its_layer(tmp_path: Path) -> None:
    target = tiny("llama", layers=2)
    inner = target.model.layers[1].mlp
    forward = inner.forward
    inner.forward = lambda x: forward(x) + torch.special.bessel_j0(x)
    with pytest.raises(errors.ExportError, match=r"model\.layers\.1.*bessel_j0"):
        specpass.export_onnx(target, method=METHODS["streamingllm"], out=tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_arguments_are_checked_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, draft = pair("llama")
    out = tmp_path / "out"
    with pytest.raises(errors.BudgetError, match="ratio"):
        specpass.export_onnx(target, method=specpass.SnapKV(budget=0.5), out=out)
    with pytest.raises(errors.LookaheadError, match="one prompt"):
        specpass.export_onnx(target, draft, specpass.SpecKV(budget=64, lookahead_ids=[[1, 2]]), out)
    with pytest.raises(errors.MissingDraftError):
        specpass.export_onnx(target, None, METHODS["speckv"], out)
    with pytest.raises(errors.DtypeMismatchError, match="bfloat16"):
        specpass.export_onnx(tiny("llama").to(torch.bfloat16), method=METHODS["snapkv"], out=out)
    with pytest.raises(errors.ExportError, match="int8"):
        specpass.export_onnx(target, method=METHODS["snapkv"], out=out, weights="int3")
    monkeypatch.setattr(api, "PACKAGES", ("no_such_package",))
    with pytest.raises(errors.OnnxMissingError, match="no_such_package"):
        specpass.export_onnx(target, method=METHODS["snapkv"], out=out)
    assert not out.exists()


def test_the_runtime_without_onnxruntime_says_so(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(errors.OnnxMissingError, match="pip install onnxruntime"):
        runtime.load(case.folder)


def test_a_draft_that_reads_too_little(copy: Path) -> None:
    manifest(copy, context=60)
    with pytest.raises(errors.DraftContextError, match="70 tokens"):
        runtime.load(copy).generate(PROMPTS)


def test_version_and_names_are_those_of_the_docs() -> None:
    assert (bundle.MANIFEST, bundle.PREFILL, bundle.DECODE) == ("specpass.json", "prefill.onnx", "decode.onnx")
