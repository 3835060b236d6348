"""Names of methods: the package's own modules, what other packages announce, and methods made from texts."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from announced import SNAP, announce

import specpass
import specpass.methods
from specpass.benchmarks import methods
from specpass.errors import MethodOptionError
from specpass.methods import registry
from specpass.reports import cost
from specpass.sizes import Decoder

BUILT_IN = {"SpecKV", "SnapKV", "StreamingLLM", "PyramidKV", "SpecPC", "SpecKVPC"}


def test_the_packages_own_methods() -> None:
    assert set(registry.built_in()) == BUILT_IN
    assert set(registry.names()) == {name.lower() for name in BUILT_IN}
    assert registry.method_class("SpecKV-PC") is specpass.SpecKVPC
    assert {*BUILT_IN, "Method", "compile", "report"} <= set(specpass.__all__) == set(dir(specpass))
    scope: dict[str, object] = {}
    exec("from specpass import *", scope)
    assert scope["PyramidKV"] is specpass.PyramidKV
    with pytest.raises(AttributeError, match="SpecNothing"):
        specpass.SpecNothing  # noqa: B018


def test_a_built_in_method_is_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "newest.py").write_text(SNAP.replace("Toy", "Newest"))
    monkeypatch.setattr(specpass.methods, "__path__", [*specpass.methods.__path__, str(tmp_path)])
    try:
        assert specpass.Newest is registry.method_class("newest")
        assert "Newest" in dir(specpass)
        assert specpass.Newest(64).key.startswith("Newest(budget=64, ")  # no module in front
    finally:
        vars(specpass).pop("Newest", None)  # looked up once, it stays


def test_names_are_known_without_torch_and_without_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, "heavy_method", "import torch" + SNAP, ["heavy = heavy_method:Toy"])
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); from specpass.methods import registry; "
        "print('heavy' in registry.names(), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["True", "False"]


def test_a_package_announces_a_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, "own_method_a", SNAP, ["Toy-KV = own_method_a:Toy"])
    assert registry.own_names() == ("toykv",)
    assert registry.names()[-1] == "toykv"
    made = registry.make_method("toy_kv", "64", ["factor=5"], window=16)
    assert made.key == (
        "own_method_a.Toy(budget=64, window=16, reduce='mean', pool='avg', kernel=7, spread='uniform', "
        "value_norms=False, reconstruction=False, share=None, factor=5)"
    )
    with pytest.raises(AttributeError, match="Toy"):
        specpass.Toy  # noqa: B018


@pytest.mark.parametrize(
    ("value", "why"),
    [
        ("no_such_module:Toy", "ModuleNotFoundError"),
        ("broken_method:Toys", "AttributeError"),
        ("broken_method", "derives from specpass.Method"),
        ("broken_method:dataclasses", "derives from specpass.Method"),
        ("broken_method:specpass.methods.nothing", "AttributeError"),
    ],
)
def test_a_broken_one_is_named(value: str, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, "broken_method", SNAP, [f"toy = {value}"], package="toys")
    assert "toy" in registry.names()
    with (
        pytest.warns(UserWarning, match=f"the method toy = {value} of toys is left out: .*{why}"),
        pytest.raises(MethodOptionError, match=r"'toy' is not a method\. Known: pyramidkv, .*streamingllm, full"),
    ):
        registry.method_class("toy")


def test_a_built_in_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    announce(tmp_path, monkeypatch, "taken_method", SNAP, ["snap-kv = taken_method:Toy", "full = taken_method:Toy"])
    assert registry.own_names() == ()
    with pytest.warns(UserWarning, match="snap-kv = taken_method:Toy of taken_method is left out.*SnapKV of its own"):
        assert registry.method_class("snapkv") is specpass.SnapKV


def test_one_name_of_two_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("second_method", "first_method"):
        (tmp_path / name).mkdir()
        announce(tmp_path / name, monkeypatch, name, SNAP, [f"toy = {name}:Toy"])
    with pytest.warns(UserWarning, match="toy = second_method:Toy .*left out: first_method.Toy has its name"):
        assert registry.method_class("toy").__module__ == "first_method"


def test_methods_from_texts() -> None:
    made = registry.make_method("Snap-KV", "0.25", ["kernel=13", "pool=max"], window=16, lookahead=None)
    assert made == specpass.SnapKV(0.25, window=16, kernel=13, pool="max")
    assert registry.make_method("streamingllm", "64", ["sinks=2"]).sinks == 2
    with pytest.raises(MethodOptionError, match=r"StreamingLLM has no option 'window'.*sinks"):
        registry.make_method("streamingllm", "64", window=8)


def test_the_best_is_a_method_with_fields_of_its_own() -> None:
    best = specpass.SpecKV.best(64, window=16)
    assert (
        best
        == registry.make_method("best", "64", window=16)
        == specpass.SpecKV(64, window=16, spread="global", reconstruction=True)
    )
    assert best != specpass.SpecKV(64, window=16)
    assert registry.make_method("Best", "64", ["spread=heads"]).spread == "heads"
    assert specpass.SpecKV.best(64, spread="uniform").spread == "uniform"
    both = registry.make_method("best-kvpc", 64, ["prompt_budget=512"])
    assert both == specpass.SpecKVPC.best(64, prompt_budget=512)
    assert (both.reconstruction, both.prompt.kernel, both.prompt.neighbours) == (True, 16, 16)
    assert not registry.preset("speckv")
    assert methods.make("specpass_best", 64) == specpass.SpecKV.best(64, lookahead=32)
    shortened = specpass.SpecPC.best(128, window=16)
    assert shortened == registry.make_method("best-pc", "128", window=16) != specpass.SpecPC(128, window=16)
    assert methods.make("specpass_bestpc", 128) == specpass.SpecPC.best(128)


def test_two_classes_of_one_name_are_two_methods() -> None:
    def make(module: str) -> type[specpass.SnapKV]:
        own = type("SnapKV", (specpass.SnapKV,), {"__module__": module})
        return dataclasses.dataclass(frozen=True)(own)

    ours, one, other = specpass.SnapKV(64), make("one")(64), make("other")(64)
    assert len({ours, one, other}) == 3
    assert ours != one != other != ours
    assert len({ours.key, one.key, other.key}) == 3
    fields = "budget=64, window=32, reduce='mean', pool='avg', kernel=7, spread='uniform'"
    assert ours.key == f"SnapKV({fields}, value_norms=False, reconstruction=False, share=None)"
    assert one.key == f"one.{ours.key}"
    sizes = Decoder(2, 64, 4, 2, 16, 96, 128, 3, 4)
    assert cost.costs_of(ours, sizes) is not None
    assert cost.costs_of(one, sizes) is None
