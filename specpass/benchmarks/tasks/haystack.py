"""Text that every machine with Python has: prose of the language reference, source of the standard library.

Both follow the Python release, so a benchmark file names its Python version and the digest of each prompt.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import sysconfig
from dataclasses import dataclass
from pathlib import Path

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."

# Packages of several files come first: in them a line can be completed from what another file defines.
PACKAGES = (
    "asyncio",
    "concurrent/futures",
    "email",
    "http",
    "importlib",
    "json",
    "logging",
    "multiprocessing",
    "unittest",
    "urllib",
    "wsgiref",
    "xml/dom",
)
MODULES = (
    "argparse",
    "ast",
    "base64",
    "bisect",
    "calendar",
    "cmd",
    "codeop",
    "configparser",
    "contextlib",
    "copy",
    "csv",
    "dataclasses",
    "difflib",
    "dis",
    "doctest",
    "enum",
    "fileinput",
    "fnmatch",
    "fractions",
    "ftplib",
    "functools",
    "getopt",
    "gettext",
    "glob",
    "graphlib",
    "gzip",
    "heapq",
    "hmac",
    "imaplib",
    "inspect",
    "ipaddress",
    "linecache",
    "locale",
    "mailbox",
    "mimetypes",
    "netrc",
    "optparse",
    "pickle",
    "pickletools",
    "plistlib",
    "poplib",
    "pprint",
    "profile",
    "pstats",
    "queue",
    "quopri",
    "random",
    "sched",
    "selectors",
    "shelve",
    "shlex",
    "shutil",
    "smtplib",
    "socket",
    "socketserver",
    "statistics",
    "string",
    "subprocess",
    "tarfile",
    "tempfile",
    "textwrap",
    "threading",
    "timeit",
    "tokenize",
    "trace",
    "traceback",
    "types",
    "uuid",
    "warnings",
    "weakref",
    "webbrowser",
    "zipapp",
    "zipfile",
)
LONGEST_BLOCK = 60  # lines


@dataclass(frozen=True)
class Block:
    """A statement at the top level of a file: `lines` as written, `first` the number of its first line from 0."""

    file: str
    first: int
    lines: tuple[str, ...]

    @functools.cached_property
    def text(self) -> str:
        return "\n".join(self.lines)


@functools.cache
def sentences() -> tuple[str, ...]:
    """Sentences of the language reference that `help()` shows."""
    topics = importlib.import_module("pydoc_data.topics").topics
    found: dict[str, None] = {}
    for _, text in sorted(topics.items()):
        for paragraph in re.split(r"\n\s*\n", text):
            line = " ".join(paragraph.split())
            if re.match(r"[A-Z][a-z]+ [a-z]", line) and line.endswith("."):
                found |= dict.fromkeys(re.split(r"(?<=[a-z]\.) (?=[A-Z])", line))
    return tuple(sentence for sentence in found if 40 <= len(sentence) <= 240)


@functools.cache
def words() -> tuple[str, ...]:
    """Lower-case words of four to ten letters, from the prose and from the source, sorted."""
    texts = [*sentences(), *sources().values()]
    return tuple(sorted({word for text in texts for word in re.findall(r"\b[a-z]{4,10}\b", text)}))


@functools.cache
def sources() -> dict[str, str]:
    """ASCII source files of the standard library: name from its folder -> text."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = [path for package in PACKAGES for path in sorted((root / package).glob("*.py"))]
    files += [root / f"{name}.py" for name in MODULES]
    found = {}
    for path in files:
        if path.is_file():
            text = path.read_text("utf-8", errors="replace").expandtabs()
            if text.isascii():
                found[path.relative_to(root).as_posix()] = text
    return found


@functools.cache
def tree(file: str) -> ast.Module:
    return ast.parse(sources()[file])


@functools.cache
def blocks(file: str) -> tuple[Block, ...]:
    """The file's top-level functions, classes and assignments of at most LONGEST_BLOCK lines."""
    lines = sources()[file].splitlines()
    found = []
    for node in tree(file).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Assign | ast.AsyncFunctionDef):
            decorators = getattr(node, "decorator_list", [])
            first, end = min([node.lineno, *(d.lineno for d in decorators)]) - 1, node.end_lineno or node.lineno
            if end - first <= LONGEST_BLOCK:
                found.append(Block(file, first, tuple(lines[first:end])))
    return tuple(found)


def package_of(file: str) -> str:
    """The folder of a file, "" for a module of its own."""
    return file.rpartition("/")[0]
