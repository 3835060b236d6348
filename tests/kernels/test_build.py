"""C++ libraries: built once, kept, shared by processes; and what is said where one cannot be built."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from specpass.kernels.cpu import build
from specpass.kernels.cpu.build import Source, Unbuilt, load
from specpass.kernels.cpu.isa import Isa

SUM = 'extern "C" int sum(int a, int b) { return a + b; }'
CODE = (
    "import sys; from pathlib import Path; from specpass.kernels.cpu import build; build.FOLDER = Path(sys.argv[1]);"
    "build.use(lambda: build.FOLDER / 'made'); print(build.load(build.Source('sum')).sum(2, 3))"
)

compiles = pytest.mark.skipif(not any(map(shutil.which, build.COMPILERS)), reason="no C++ compiler")


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """Writes sum.cpp where sources are looked for, and returns the folder of what is built."""
    made = tmp_path / "made"
    before = build._folder
    monkeypatch.setattr(build, "FOLDER", tmp_path)
    build.use(lambda: made)
    yield lambda text: (tmp_path / "sum.cpp").write_text(text) and made
    monkeypatch.undo()
    build.use(before)


def why(source: Source) -> str:
    found = load(source)
    assert isinstance(found, Unbuilt)
    return str(found)


@compiles
def test_a_library_is_built_once_and_kept(write, monkeypatch):
    made = write(SUM)
    assert load(Source("sum")).sum(2, 3) == 5
    (kept,) = made.iterdir()
    monkeypatch.setenv("CXX", "no-such-compiler")
    load.cache_clear()
    assert load(Source("sum")).sum(2, 3) == 5
    write(SUM.replace("+", "-"))
    load.cache_clear()
    assert "no C++ compiler (no-such-compiler)" in why(Source("sum"))
    assert list(made.iterdir()) == [kept]


@compiles
def test_a_damaged_library_is_built_anew(write):
    made = write(SUM)
    load(Source("sum"))
    (kept,) = made.iterdir()
    kept.unlink()  # what is loaded stays mapped
    kept.write_bytes(b"no library")
    load.cache_clear()
    assert load(Source("sum")).sum(2, 3) == 5


@compiles
def test_several_processes_build_at_once(write, tmp_path):
    made = write(SUM)
    command = [sys.executable, "-c", CODE, str(tmp_path)]
    several = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0].strip() for process in several] == ["5", "5"]
    assert len(list(made.iterdir())) == 1


@compiles
def test_the_compilers_own_words_are_the_reason(write):
    made = write("int sum( {")
    assert "failed on sum.cpp" in why(Source("sum"))
    assert "error:" in why(Source("sum"))
    assert not list(made.iterdir())


def test_a_machine_that_lacks_something_compiles_nothing(write):
    made = write(SUM)
    assert why(Source("sum", Isa("tomorrow's", ("amx_of_the_future",)))) == "this CPU has no amx_of_the_future"
    assert not made.exists()


@compiles
def test_a_folder_that_cannot_be_made_is_a_reason(write, tmp_path):
    write(SUM)
    (tmp_path / "file").write_text("")
    build.use(lambda: tmp_path / "file" / "below")
    assert "sum.cpp: " in why(Source("sum"))
