"""`python -m bench.fuzz --cases 5000 --seed 0`: ends with 1 where a case is wrong."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bench.common import RESULTS
from specpass.cache.worth import POLICIES


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=5000, help="cases 0 .. N - 1 of the seed (default 5000)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--resume", type=Path, default=RESULTS / "fuzz.json", help="file to go on from: what is wrong is tried again"
    )
    parser.add_argument("--restart", action="store_true", help="forget what the file holds")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no group of cases after so many")
    parser.add_argument("--jobs", type=int, default=1, help="processes (default 1)")
    parser.add_argument("--bits", type=int, nargs="+", choices=(8, 4, 2), help="caches in one of so many bits")
    parser.add_argument(
        "--evict", nargs="+", default=(), choices=POLICIES, help="long answers, of which one of these evicts"
    )
    parser.add_argument("--turns", action="store_true", help="turns, with dropped='host' where that can be had")
    parser.add_argument(
        "--prefix", action="store_true", help="prompts behind a document that was read once, where that can be had"
    )
    parser.add_argument(
        "--spread", action="store_true", help="methods whose heads share budgets, or whose scores weigh values"
    )
    parser.add_argument("--resample", action="store_true", help="particles: sequences chosen anew, by direct calls")
    arguments = parser.parse_args()
    from bench.fuzz.cases import SPREAD
    from bench.fuzz.run import quietly, run

    quietly()
    how = (arguments.minutes, arguments.restart, arguments.jobs)
    bits = (None,) if arguments.bits is None else tuple(arguments.bits)
    drawn = {"bits": bits, "policies": tuple(arguments.evict), "methods": tuple(SPREAD) if arguments.spread else ()}
    drawn |= {name: getattr(arguments, name) for name in ("turns", "prefix", "resample")}
    store = run(arguments.resume, arguments.seed, arguments.cases, *how, **drawn)
    store.save()
    print(f"wrote {arguments.resume}: {store.parts['summary']}")
    return int(store.parts["summary"]["wrong"] > 0)


if __name__ == "__main__":
    sys.exit(main())
