"""Two processes (gloo) that run the same cases side by side, and what became of each case."""

from __future__ import annotations

import datetime
import json
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path

import torch.distributed as dist
import transformers

from specpass.capture import stored

ROOT = Path(__file__).parents[2]
GRAPHS = "SPECPASS_TEST_GRAPHS"  # the folder of kept graphs, one for all processes of a run of the tests


def started(script: Path, folder: Path, codes: tuple[int, int] = (0, 0), limit: int = 1200) -> list[dict[str, str]]:
    """Run `script RANK FOLDER` twice; of each rank what each case raised, "" where it passed.

    Args: codes: with which they end. limit: seconds.
    """
    paths = [str(ROOT), str(ROOT / "tests" / "helpers"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", GRAPHS: str(stored.graphs_dir())}
    logs = [folder / f"{rank}.log" for rank in range(2)]
    ranks = []
    for rank, log in enumerate(logs):
        with log.open("w") as out:
            command = [sys.executable, str(script), str(rank), str(folder)]
            ranks.append(subprocess.Popen(command, env=env, stdout=out, stderr=out))
    try:
        ended = tuple(process.wait(limit) for process in ranks)
    finally:
        for process in ranks:
            process.kill()
    assert ended == codes, "\n".join(log.read_text()[-3000:] for log in logs)
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]


def run_cases(rank: int, folder: Path, cases: Callable[[Path], Iterable[tuple[str, Callable[[], None]]]]) -> None:
    """In one of the two: join the group, run what `cases(folder)` names, write FOLDER/RANK.json after each."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    graphs = Path(os.environ[GRAPHS])
    stored.graphs_dir = lambda: graphs
    transformers.utils.logging.disable_progress_bar()
    limit = datetime.timedelta(seconds=180)  # for one that waits while the other compiles on a slow machine
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2, timeout=limit)
    results = {}
    for name, case in cases(folder):
        start = time.perf_counter()
        try:
            case()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
        print(rank, name, "failed" if results[name] else "passed", f"{time.perf_counter() - start:.1f} s", flush=True)
        (folder / f"{rank}.json").write_text(json.dumps(results))
