"""One child process runs tests/kernels/interpreted.py under Triton's interpreter."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from packaging.version import Version

FILE = Path(__file__).with_name("interpreted.py")


def test_kernels_agree_with_their_references_in_the_interpreter() -> None:
    triton = pytest.importorskip("triton")
    if Version(triton.__version__) < Version("3.7") and Version(numpy.__version__) >= Version("2.4"):
        pytest.skip("Triton 3.6's interpreter cannot loop up to a loaded bound under numpy 2.4; numpy 2.3 works")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", str(FILE)]
    run = subprocess.run(command, env=environment, cwd=FILE.parent.parent, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
    assert "skipped" not in run.stdout.splitlines()[-1], run.stdout
