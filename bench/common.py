"""What the benchmark scripts share: machine facts, results as JSON, a store that resumes, models by name.

Run the scripts as modules from the repository's root: `python -m bench.multikey --help`.
"""

from __future__ import annotations

import copy
import os
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Spinning OpenMP threads make small operators forty times slower on few cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from specpass.benchmarks import results  # noqa: E402  (the environment is set first)
from specpass.benchmarks.results import machine, versions, write_json  # noqa: E402


def save_results(path: Path, settings: dict[str, Any], **parts: Any) -> None:
    """One benchmark's document: machine, versions and settings on top, then the named parts."""
    write_json(path, {"machine": machine(), "versions": versions(), "settings": settings, **parts})
    print(f"wrote {os.path.relpath(path)}")


def median(values: Iterable[float], digits: int = 4) -> float:
    """Median, rounded for reading."""
    return round(statistics.median(values), digits)


class Store(results.Store):
    """Results of a long run, one record per (method, seed), written after each so that a rerun goes on."""

    def __init__(self, path: Path, settings: dict[str, Any], restart: bool, summarise: results.Summarise) -> None:
        super().__init__(path, settings, ("method", "seed"), restart, summarise)

    def put(self, method: str, seed: int, **fields: Any) -> None:
        """Add or replace a record and write the file."""
        self.add({"method": method, "seed": seed, **fields})


def model_folder(name: str) -> str:
    """A folder that AutoModelForCausalLM loads: `name` itself if it is one, else by specpass.hub."""
    if Path(name).is_dir():
        return name
    from specpass.hub import model_path

    return str(model_path(name))


def load_model(name: str, dtype: str = "bfloat16") -> Any:
    """The named model, in eval mode, without gradients, attention by SDPA."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_folder(name), dtype=getattr(torch, dtype), attn_implementation="sdpa"
    )
    return model.eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """The model once more, with the same weights in memory: each engine compiles one of its own."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def load_tokenizer(name: str) -> Any:
    """The named model's tokenizer, chat template included."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(name))


def own_text(tokenizer: Any, count: int, length: int) -> list[list[int]]:
    """`count` prompts of `length` tokens: windows of this repository's own text and code, one after another."""
    files = sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("specpass/**/*.py")])
    ids = [token for file in files for token in tokenizer(file.read_text(), add_special_tokens=False).input_ids]
    stride = (len(ids) - length) // count
    return [ids[index * stride : index * stride + length] for index in range(count)]
