"""Other implementations, each run by the Python of its own environment: kvpress pins an older transformers.

The environment is made on first use, in the cache folder, from the pins in peers.txt.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock

from specpass.benchmarks.models import Answer, Pair
from specpass.benchmarks.quality.variants import Variant
from specpass.benchmarks.tasks.prompts import Prompt
from specpass.errors import PeerError
from specpass.files import cache_dir
from specpass.hub import model_path

HERE = Path(__file__).parent
PINS, WORKER = HERE / "peers.txt", HERE / "worker.py"
SHARING = (  # prune what one prefill wrote
    "kvpress_snapkv",
    "kvpress_adakv_snapkv",
    "kvpress_expected_attention",
    "kvpress_criticaladakv_snapkv",
    "kvpress_keydiff",
)
PRESSES = (*SHARING, "kvpress_kvzip")
STAMP = "specpass-complete"


def python() -> Path:
    """The peers' Python, installing them on first use (some 1.5 GB).

    Raises: PeerError: pip failed.
    """
    digest = hashlib.sha256(PINS.read_bytes() + sys.version.encode()).hexdigest()[:12]
    folder = cache_dir() / "peers" / digest
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f"{digest}.lock"):
        if not (folder / STAMP).exists():
            shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed
            _install(folder)
            (folder / STAMP).touch()
    return folder / "bin" / "python"


def _install(folder: Path) -> None:
    print(f"installing the peers into {folder}", file=sys.stderr, flush=True)
    try:
        venv.create(folder, with_pip=True, symlinks=True)
        pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        torch = next(line for line in PINS.read_text().splitlines() if line.startswith("torch=="))
        for what in ([torch], ["-r", str(PINS)]):  # torch first: resolved with the rest, another build may come
            done = subprocess.run([*pip, *what], capture_output=True, text=True)
            if done.returncode:
                raise PeerError(
                    f"pip could not install {what[-1]}: {done.stderr.strip()[-400:]} "
                    "Give pip an index that has these packages, or leave peers out with --methods."
                )
    except (OSError, subprocess.CalledProcessError) as error:
        raise PeerError(
            f"{folder} cannot be made: {error}. Set SPECPASS_CACHE to a folder that you may write to, or "
            "leave peers out with --methods."
        ) from error


def run(job: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The worker's lines for a job (see worker.py); the worker ends when the iterator is closed.

    Raises: PeerError: it failed, with the end of what it said.
    """
    with tempfile.TemporaryDirectory(prefix="specpass-peers-") as scratch:
        file, log = Path(scratch) / "job.json", Path(scratch) / "log.txt"
        file.write_text(json.dumps(job))
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
        environment.pop("PYTHONPATH", None)
        with log.open("w") as stderr:
            worker = subprocess.Popen(
                [str(python()), "-P", str(WORKER), str(file)],
                env=environment,
                text=True,
                stdout=subprocess.PIPE,
                stderr=stderr,
            )
            try:
                assert worker.stdout is not None
                for line in worker.stdout:
                    if line.startswith("{"):
                        yield json.loads(line)
                if worker.wait():
                    raise PeerError(f"the kvpress worker failed: {log.read_text().strip()[-400:]}")
            finally:
                worker.kill()
                worker.wait()


def answers(pair: Pair, work: Iterable[tuple[Prompt, int, list[Variant]]]) -> Iterator[Answer]:
    """Answers of kvpress variants; those of SHARING share a prompt's prefill, and so do KVzip's. Raises: see `run`."""
    listed = list(work)
    jobs = [
        {
            "ids": prompt.ids,
            "seen": prompt.seen,
            "new_tokens": new_tokens,
            "presses": [{"name": variant.method, "budget": variant.budget} for variant in chosen],
        }
        for prompt, new_tokens, chosen in listed
    ]
    for line in run({"what": "answer", **_model(pair), "prompts": jobs}):
        prompt, _, chosen = listed[line["prompt"]]
        yield Answer(chosen[line["press"]], prompt, line["tokens"], line["seconds"], line["kept"])


def speed(pair: Pair, length: int, batch: int, budget: int, steps: int, prefills: int) -> dict[str, Any]:
    """kvpress's SnapKV, as in `worker.speed`. Raises: see `run`."""
    job = {
        "what": "speed",
        **_model(pair),
        "length": length,
        "batch": batch,
        "budget": budget,
        "steps": steps,
        "prefills": prefills,
    }
    found = list(run(job))
    if len(found) != 1:
        raise PeerError(f"the kvpress worker gave {len(found)} results for one measurement.")
    return found[0]


def _model(pair: Pair) -> dict[str, Any]:
    return {"model": str(model_path(pair.target_name)), "dtype": pair.dtype, "device": pair.device}
