"""What is said of a CPU."""

from __future__ import annotations

import pytest
import torch

from specpass.kernels.cpu.isa import AVX512, multiplies


def test_a_cpu_that_our_kernels_run_on_multiplies_bfloat16() -> None:
    assert multiplies(torch.float32)
    capabilities = torch.cpu.get_capabilities()
    if all(capabilities.get(name) for name in AVX512.needs):
        assert multiplies(torch.bfloat16)
    if capabilities["architecture"] == "x86_64" and not (capabilities["avx512_f"] or capabilities["avx_ne_convert"]):
        assert not multiplies(torch.bfloat16)


@pytest.mark.parametrize("supported", [True, False])
def test_onednn_is_asked(supported: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    assert multiplies(torch.bfloat16) is supported


def test_a_torch_without_onednn_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can be asked: its products are not said to be slow."""
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.delattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", raising=False)
    assert multiplies(torch.bfloat16)
