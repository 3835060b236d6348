"""Settings of every test run: quiet threads, no network, fixed seeds, a fresh Dynamo for each module."""

from __future__ import annotations

import os

# Read when torch and huggingface_hub are imported, so they are set before anything else.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import gc
import logging
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings

# The same examples in every run: a failure seen once is seen again.
settings.register_profile(
    "specpass", deadline=None, derandomize=True, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("specpass")

# Tracing makes millions of small objects that die young: fewer collections, a tenth less time.
gc.set_threshold(50_000, 20, 20)

# Dynamo collects after each graph, which is a fixture's job here (fresh_dynamo).
torch._dynamo.config.run_gc_after_compile = False

# pytest's log capture would otherwise make torch render a trace record of everything that it compiles.
logging.getLogger("torch.__trace").propagate = False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "real: needs real weights, fetched on first use (run with -m real)")


@pytest.fixture(scope="module", autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """No graph of one module serves another."""
    yield
    torch._dynamo.reset()
    gc.collect()
    gc.freeze()  # what stays is torch's own; looking at it again took five seconds a module, and more while tracing


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else nanobind takes Triton's functions for leaks


@pytest.fixture(scope="session", autouse=True)
def calls_are_traced(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No call is kept on disk: tests put their own passes and functions in others' places, which no key tells.

    A draft's graphs are, in a folder of this run: most tests have the same few drafts, a second each.
    """
    from specpass.backend.kept import KeptCalls
    from specpass.capture import stored

    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "graphs"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored, "graphs_dir", lambda: folder)
        patch.setattr(KeptCalls, "usable", False)
        yield


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def autograd_stays_on() -> Iterator[None]:
    """A test, a fixture or specpass itself that leaves autograd off is caught where it happens."""
    assert torch.is_grad_enabled(), "a fixture of this test left autograd off"
    yield
    left = torch.is_grad_enabled()
    torch.set_grad_enabled(True)  # the tests behind this one are not to blame
    assert left, "the test left autograd off"


@pytest.fixture
def triton_counts_as_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of kernels decides as where Triton is, whatever this machine has."""
    from specpass.kernels import dispatch

    monkeypatch.setattr(dispatch, "triton_installed", lambda: True)
