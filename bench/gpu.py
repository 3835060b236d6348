"""Everything about a GPU in one command: `python bench/gpu.py`; JSON to bench/results/.

1. Every kernel on the device against a float64 reference, on fresh random inputs.
2. Every kernel against its floor (the larger of bytes over the measured copy bandwidth and FLOPs over the measured
   matmul rate), second-level cache flushed, at 512k slots and more; and against its peers in the same run.
3. End to end, random weights in the shapes of Llama-3.1-8B with a Llama-3.2-1B draft: time to first token, decode
   tokens/s, peak memory, for full KV and pruned.

`--device cpu --tiny` runs every line of the script with small sizes on any machine; its times mean nothing.
Results are written after each step, and steps that the time limit leaves out are named.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from bench import gpu_kernels, gpu_models
from bench.common import RESULTS, machine, versions, write_json


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
                steps[name] = {"error": f"{type(error).__name__}: {error}"[:400]}
            gpu_kernels.free(self.device)
            print(f"{section}, {name}: {time.monotonic() - start:.1f} s  {steps[name]}", flush=True)
        write_json(self.path, self.document)
        return steps[name]


def main() -> int:
    """Run everything; exit code 1 if a kernel was wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small sizes, any machine")
    parser.add_argument("--minutes", type=float, default=7.5, help="time limit")
    parser.add_argument("--skip-models", action="store_true", help="kernels alone")
    parser.add_argument("--out", type=Path, default=None, help="result file")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny proves the script anywhere")
    path = options.out or RESULTS / f"gpu{'_tiny' if options.tiny else ''}.json"
    run = Run(path, options.device, options.tiny, options.minutes)
    gpu_kernels.correctness(run)
    gpu_kernels.floors(run)
    gpu_kernels.full_kv(run)
    if not options.skip_models:
        gpu_models.end_to_end(run)
    wrong = [name for name, found in run.document["correctness"].items() if not found.get("error_share", 2.0) <= 1.0]
    print(f"wrote {path}" + (f"; WRONG: {', '.join(wrong)}" if wrong else ""))
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
