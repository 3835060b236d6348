"""Tasks on source of Python's own library: find a value in it, complete a line from what another file defines.

The haystack is blocks (functions, classes, assignments) of many files under their names; the block that matters stands
at a depth that the seed chooses.
"""

from __future__ import annotations

import ast
import functools
import keyword
import re
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from specpass.benchmarks.tasks import haystack
from specpass.benchmarks.tasks.haystack import Block
from specpass.benchmarks.tasks.prompts import Question

Writer = Callable[[int], Question | None]

CONTEXT_LINES = 24  # of the file that is being completed, right before the line
SHORTEST_LINE = 24  # characters of a line worth completing


def _shown(block: Block) -> list[str]:
    return [f"# file: {block.file}", *block.lines, ""]


def code_around(rng: Random, block: Block, avoid: re.Pattern[str]) -> Callable[[int], str | None]:
    """count -> `block` among that many lines of other files' blocks, none of which matches `avoid`."""
    others = [item for file in haystack.sources() for item in haystack.blocks(file) if not avoid.search(item.text)]
    rng.shuffle(others)
    depth, starts = rng.random(), []
    lines: list[str] = []
    for item in others:
        starts.append(len(lines))
        lines += _shown(item)

    def write(count: int) -> str | None:
        if count > len(lines):
            return None
        at = max(start for start in starts if start <= depth * count)
        return "\n".join([*lines[:at], *_shown(block), *lines[at:count]])

    return write


# -- retrieval


@dataclass(frozen=True)
class Fact:
    """A number in a block: the text before and after it, and how to ask for it."""

    block: Block
    name: str
    line: int
    start: int
    end: int
    ask: str


@functools.cache
def facts() -> tuple[Fact, ...]:
    """Module constants and default arguments that are plain numbers."""
    found = []
    for file in haystack.sources():
        by_line = {block.first + index: block for block in haystack.blocks(file) for index in range(len(block.lines))}
        for node in haystack.tree(file).body:
            if isinstance(node, ast.Assign) and len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
                name = node.targets[0].id
                pairs = [(name, node.value, f"What is the value of the constant {name} in {file}?")]
            elif isinstance(node, ast.FunctionDef):
                defaults = node.args.defaults
                given = [*node.args.posonlyargs, *node.args.args][-len(defaults) :] if defaults else []
                pairs = [
                    (
                        node.name,
                        value,
                        f"What is the default value of the argument {arg.arg} of the function {node.name} in {file}?",
                    )
                    for arg, value in zip(given, defaults, strict=True)
                ]
            else:
                continue
            for name, value, ask in pairs:
                block = by_line.get(value.lineno - 1)
                if block and len(name) > 2 and isinstance(value, ast.Constant) and type(value.value) in (int, float):
                    end = value.end_col_offset or value.col_offset
                    found.append(Fact(block, name, value.lineno - 1 - block.first, value.col_offset, end, ask))
    return tuple(found)


def code_retrieval(rng: Random) -> Writer:
    """A constant or a default argument. Its number is replaced by one of the seed's: no model knows it by heart."""
    fact = rng.choice(facts())
    number = str(rng.randint(100_000, 999_999))
    lines = list(fact.block.lines)
    lines[fact.line] = lines[fact.line][: fact.start] + number + lines[fact.line][fact.end :]
    block = Block(fact.block.file, fact.block.first, tuple(lines))
    around = code_around(rng, block, re.compile(rf"\b{re.escape(fact.name)}\b"))

    def write(count: int) -> Question | None:
        source = around(count)
        if source is None:
            return None
        return Question(
            f"Read this source code. I will ask about a number in it.\n\n{source}\n",
            f"{fact.ask} Answer with the number.",
            f"According to the source code above, the value of {fact.name} is"
            if "constant" in fact.ask
            else "According to the source code above, the default value is",
            (number,),
        )

    return write


# -- completion


@dataclass(frozen=True)
class Gap:
    """A line of `file` that uses what `block`, of another file in the same package, defines."""

    file: str
    line: int
    block: Block
    name: str


@functools.cache
def gaps() -> tuple[Gap, ...]:
    """Lines that use a name which the file imports from a sibling; only names that one block of the package defines."""
    defined: dict[tuple[str, str], list[Block]] = {}
    for file in haystack.sources():
        for block in haystack.blocks(file):
            head = re.search(r"^(?:async def|def|class) (\w+)|^(\w+) =", block.text, flags=re.M)
            if head:
                defined.setdefault((haystack.package_of(file), head[1] or head[2]), []).append(block)
    found = []
    for file in haystack.sources():
        package = haystack.package_of(file)
        if not package:
            continue
        for number, line in enumerate(haystack.sources()[file].splitlines()):
            text = line.strip()
            plain = not re.match(r"#|import |from |def |class |async def |@|['\"]", text) and '"""' not in text
            if number < CONTEXT_LINES or len(text) < SHORTEST_LINE or not plain:
                continue
            for name in re.findall(r"\b[A-Za-z_]\w{4,}\b", text):
                home = defined.get((package, name), [])
                if len(home) == 1 and home[0].file != file and not keyword.iskeyword(name):
                    found.append(Gap(file, number, home[0], name))
                    break
    return tuple(found)


def code_completion(rng: Random) -> Writer:
    """The next line of a file, which uses something that another file of the package defines (as in RepoBench)."""
    gap = rng.choice(gaps())
    lines = haystack.sources()[gap.file].splitlines()
    line = lines[gap.line]
    before = "\n".join(lines[gap.line - CONTEXT_LINES : gap.line])
    around = code_around(rng, gap.block, re.compile(rf"\b{re.escape(gap.name)}\b|{re.escape(line.strip())}"))

    def write(count: int) -> Question | None:
        source = around(count)
        if source is None:
            return None
        return Question(
            f"Please complete the code given below.\n\n{source}\n",
            f"# file: {gap.file}\n{before}\n\nNext line of code:",
            "```python\n",
            (line,),
        )

    return write
