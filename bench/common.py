"""What the benchmark scripts share: machine facts, results as JSON, a store that resumes, models by name.

Run the scripts as modules from the repository's root: `python -m bench.multikey --help`.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results"

# Spinning OpenMP threads make small operators forty times slower on few cores; read when torch is loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("GOMP_SPINCOUNT", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

if str(ROOT / "tests") not in sys.path:  # the eager reference is the tests'; benchmarks compare with the same one
    sys.path.insert(0, str(ROOT / "tests"))


def machine() -> dict[str, Any]:
    """CPU model, cores that this process may use, memory in GiB."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {"cpu": model, "cores": cores, "memory_gib": round(memory, 1), "system": platform.system()}


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that decide a figure; None where one is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("torch", "transformers", "triton", "specpass"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_json(path: Path, document: Any) -> None:
    """Write atomically: a reader, or a run that is cut off, never sees half a file."""
    from specpass.files import write_file

    write_file(path, json.dumps(document, indent=1) + "\n")


def save_results(path: Path, settings: dict[str, Any], **parts: Any) -> None:
    """One benchmark's document: machine, versions and settings on top, then the named parts."""
    write_json(path, {"machine": machine(), "versions": versions(), "settings": settings, **parts})
    print(f"wrote {os.path.relpath(path)}")


def median(values: Iterable[float], digits: int = 4) -> float:
    """Median, rounded for reading."""
    return round(statistics.median(values), digits)


class Store:
    """Results of a long run, one record per (method, seed), written after each so that a rerun goes on.

    Args:
        path: JSON file. settings: what the records depend on; records made with others are refused.

    Raises:
        SystemExit: the file holds records of other settings.
    """

    def __init__(self, path: Path, settings: dict[str, Any], restart: bool = False) -> None:
        self.path, self.settings = path, settings
        self.records: dict[tuple[str, int], dict[str, Any]] = {}
        if restart or not path.exists():
            return
        stored = json.loads(path.read_text())
        if stored["settings"] != json.loads(json.dumps(settings)):
            raise SystemExit(f"{path} holds results of other settings: {stored['settings']}; pass --restart.")
        self.records = {(record["method"], record["seed"]): record for record in stored["results"]}

    def __contains__(self, key: tuple[str, int]) -> bool:
        return key in self.records

    def __getitem__(self, key: tuple[str, int]) -> dict[str, Any]:
        return self.records[key]

    def put(self, method: str, seed: int, summary: Any = None, **fields: Any) -> None:
        """Add or replace a record and write the file, `summary` on top of the records."""
        self.records[method, seed] = {"method": method, "seed": seed, **fields}
        self.save(summary)

    def save(self, summary: Any = None) -> None:
        """Write the file; called by `put`, and once more when the summary is complete."""
        parts = {} if summary is None else {"summary": summary}
        document = {"machine": machine(), "versions": versions(), "settings": self.settings, **parts}
        write_json(self.path, {**document, "results": list(self.records.values())})


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


def load_tokenizer(name: str) -> Any:
    """The named model's tokenizer, chat template included."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model_folder(name))
