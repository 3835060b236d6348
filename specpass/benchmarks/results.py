"""Result files: machine and versions on top, one record per measurement, written after each so that a rerun goes on."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from specpass.errors import BenchmarkError
from specpass.files import write_file

Summarise = Callable[[Iterable[dict[str, Any]]], Any]

PACKAGES = ("torch", "transformers", "triton", "specpass")


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
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def write_json(path: Path, document: Any) -> None:
    """Write atomically: a reader, or a run that is cut off, never sees half a file."""
    write_file(path, json.dumps(document, indent=1) + "\n")


def read_results(path: Path) -> dict[str, Any]:
    """A result file's document.

    Raises: BenchmarkError: it cannot be read, or is not what a benchmark writes.
    """
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} is no result file: {error}. Name a file that `specpass bench` wrote.") from error
    if not isinstance(document, dict) or not {"settings", "results"} <= document.keys():
        raise BenchmarkError(f"{path} holds no settings and results: name a file that `specpass bench` wrote.")
    return document


class Store:
    """The records of a long run, by some of their fields.

    Args:
        path: JSON file. settings: what the records depend on; records made with others are refused.
        key: the fields that tell records apart. restart: forget what is stored.
        summarise: what "summary" says of the records, at every save.

    Raises: BenchmarkError: the file holds records of other settings, of another machine or of other versions.
    """

    def __init__(
        self,
        path: Path,
        settings: dict[str, Any],
        key: Sequence[str],
        restart: bool = False,
        summarise: Summarise | None = None,
    ) -> None:
        self.path, self.settings, self.key, self.summarise = path, settings, tuple(key), summarise
        self.records: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.parts: dict[str, Any] = {}  # more top-level fields
        if restart or not path.exists():
            return
        document = read_results(path)
        if document["settings"] != json.loads(json.dumps(settings)):
            raise BenchmarkError(
                f"{path} holds results of other settings, {document['settings']}: pass --restart to replace them, or "
                "name another file."
            )
        self.records = {self.key_of(record): record for record in document["results"]}
        made, here = ({**found.get("machine", {}), **found.get("versions", {})} for found in (document, self._head()))
        other = [
            f"{name} {made.get(name)} (here {here[name]})"
            for name in here
            if name != "memory_gib" and made.get(name) != here[name]
        ]
        if other:
            raise BenchmarkError(
                f"{path} holds results of another machine or of other versions, {', '.join(other)}: "
                "pass --restart to replace them, or name another file."
            )
        own = {"machine", "versions", "settings", "results"}
        self.parts = {name: part for name, part in document.items() if name not in own}

    def key_of(self, record: dict[str, Any]) -> tuple[Any, ...]:
        return tuple(record[name] for name in self.key)

    def __contains__(self, key: tuple[Any, ...]) -> bool:
        return key in self.records

    def __getitem__(self, key: tuple[Any, ...]) -> dict[str, Any]:
        return self.records[key]

    def add(self, record: dict[str, Any]) -> None:
        """Add or replace a record, and write the file."""
        self.records[self.key_of(record)] = record
        self.save()

    def save(self, **parts: Any) -> None:
        """Write the file, `parts` above the records."""
        if self.summarise is not None:
            self.parts["summary"] = self.summarise(self.records.values())
        self.parts |= parts
        write_json(
            self.path, {**self._head(), "settings": self.settings, **self.parts, "results": list(self.records.values())}
        )

    @staticmethod
    def _head() -> dict[str, dict[str, Any]]:
        return {"machine": machine(), "versions": versions()}
