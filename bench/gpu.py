"""Everything about a GPU: `python bench/gpu.py --part tokens`, then `kernels`, then `models`; JSON to bench/results/.

tokens: does the device write what it must? Tiny models of random weights in float32: every method against
    transformers (a covering budget), kernels against aten, CUDA graphs on and off, Inductor against eager, padded
    batches, generations in a row, a batch beyond the reach of 32-bit indices.
kernels: every kernel against a float64 reference, on fresh random inputs; against its floor (the larger of bytes over
    the measured copy bandwidth and FLOPs over the measured matmul rate), second-level cache flushed; decode attention
    against other libraries' at three budgets and batches; importance and select at 32k and 128k.
models: random weights in the shapes of Llama-3.1-8B with a Llama-3.2-1B draft: first token, decode tokens/s, peak
    memory, and where the time goes, for full KV (static cache, compiled) and pruned, each compiled once.

Without --part all three run. Each ends within ten minutes; results are written after each step, and steps that the
time limit leaves out are named. `--device cpu --tiny` runs every line with small sizes on any machine; its times mean
nothing. The exit code is 1 if a token or a kernel was wrong.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import gpu_kernels, gpu_models, gpu_tables, gpu_tokens
from bench.common import RESULTS, ROOT, machine, versions, write_json


class Run:
    """A run with a deadline: steps by name, and the document that holds what they found."""

    def __init__(self, path: Path, device: str, tiny: bool, minutes: float) -> None:
        self.path, self.device, self.tiny = path, device, tiny
        self.deadline = time.monotonic() + 60 * minutes
        self.document: dict[str, Any] = {
            "machine": machine(),
            "gpu": gpu_kernels.describe_device(device),
            "versions": versions(),
            "settings": {"device": device, "tiny": tiny, "minutes": minutes},
            "note": "sizes are tiny: the script is proved, times mean nothing" if tiny else "",
        }

    def step(self, section: str, name: str, call: Any, needs: float = 0.0) -> Any:
        """Run one step and write the document; an error or a lack of time is what it found."""
        steps = self.document.setdefault(section, {})
        if time.monotonic() + needs > self.deadline:
            steps[name] = {"skipped": "out of time"}
        else:
            start = time.monotonic()
            try:
                steps[name] = call()
            except Exception as error:  # one kernel's failure, or a model that does not fit, is a result
                steps[name] = {
                    "error": f"{type(error).__name__}: {error}"[:400],
                    "trace": traceback.format_exc()[-1500:].replace(f"{ROOT}/", ""),
                }
            gpu_kernels.free(self.device)
            print(f"{section}, {name}: {time.monotonic() - start:.1f} s  {steps[name]}", flush=True)
        write_json(self.path, self.document)
        return steps[name]

    def wrong(self) -> list[str]:
        """Steps that were to be right and were not, for whatever reason."""
        kernels, tokens = (self.document.get(section, {}) for section in ("correctness", "tokens"))
        return [name for name, found in kernels.items() if not found.get("error_share", 2.0) <= 1.0] + [
            name for name, found in tokens.items() if found.get("right") is not True
        ]


PARTS: dict[str, tuple[Callable[[Run], None], ...]] = {
    "tokens": (gpu_tokens.correctness,),
    "kernels": (
        gpu_kernels.correctness,
        gpu_kernels.floors,
        gpu_tables.decode_table,
        gpu_tables.selection,
        gpu_tables.prefill_table,
        gpu_tables.sparse_table,
        gpu_kernels.full_kv,
    ),
    "models": (gpu_kernels.measure_rates, gpu_models.end_to_end),
}


def main() -> int:
    """Run the parts; exit code 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", choices=PARTS, action="append", help="repeatable; all where left out")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, any machine")
    parser.add_argument("--minutes", type=float, default=9.0, help="time limit of each part")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result files gpu_PART.json")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny proves the script anywhere")
    gc.collect()
    gc.freeze()  # each step ends with a collection: what torch brought is not looked at again
    wrong = []
    for part in options.part or PARTS:
        path = options.out / f"gpu_{part}{'_tiny' if options.tiny else ''}.json"
        run = Run(path, options.device, options.tiny, options.minutes)
        for section in PARTS[part]:
            section(run)
        wrong += run.wrong()
        print(f"wrote {path}")
    if wrong:
        print(f"WRONG: {'; '.join(wrong)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
