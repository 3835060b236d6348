"""What kernels need of a CPU, and the compiler's flags that let them use it."""

from __future__ import annotations

import dataclasses

import torch


@dataclasses.dataclass(frozen=True)
class Isa:
    """`needs`: keys of torch.cpu.get_capabilities()."""

    title: str
    needs: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()


AVX2 = Isa("AVX2", ("avx2", "fma3"), ("-mavx2", "-mfma"))
AVX512 = Isa(
    "AVX-512",
    ("avx512_f", "avx512_bw", "avx512_dq", "avx512_vl", "avx512_bf16"),
    ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512bf16", "-mfma"),
)
AMX = Isa("AMX", (*AVX512.needs, "amx_tile", "amx_bf16"), (*AVX512.flags, "-mamx-tile", "-mamx-bf16"))
VNNI = Isa("AVX-512 VNNI", (*AVX512.needs, "avx512_vnni"), (*AVX512.flags, "-mavx512vnni"))
ANY = Isa("any")


def multiplies(dtype: torch.dtype) -> bool:
    """Whether this CPU has instructions for products of `dtype`: without them torch takes several times float32's time.

    oneDNN is asked, by which torch multiplies on a CPU; True of a torch that was built without it.
    """
    if not torch.backends.mkldnn.is_available():
        return True
    asked = {torch.bfloat16: "_is_mkldnn_bf16_supported", torch.float16: "_is_mkldnn_fp16_supported"}
    return dtype not in asked or bool(getattr(torch.ops.mkldnn, asked[dtype])())
