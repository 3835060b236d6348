"""Emit a kernel as a module of its own for one site: constants bound, branches that they decide gone, what is done to
its logits (logits.py) spliced in.

The kernels' own source is the template: parameters of type tl.constexpr become constants at the top of the module,
and leave signatures and calls. The module is what a person reads to see what runs, and it compiles as it stands.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from specpass.kernels.shapes import Shapes
from specpass.kernels.spec import FOLDER, Kernel
from specpass.kernels.tiles import Tile

PACKAGE = "specpass.kernels"


def emit(kernel: Kernel, shapes: Shapes, tile: Tile) -> str:
    """Python source of the kernel's launches for these shapes and this tile."""
    plan = kernel.plan(shapes, tile)
    constants: dict[str, Any] = {}
    for launch in plan:
        for name, value in launch.constants.items():
            if constants.setdefault(name, value) != value:
                raise ValueError(f"{kernel.name}: {name} is {constants[name]} in one launch and {value} in another")
    body = _with_imported(kernel.folder / "jit.py")
    functions = {node.name: node for node in body if isinstance(node, ast.FunctionDef)}
    bind = _Bind(constants, functions)
    bound = {name: ast.fix_missing_locations(bind.visit(node)) for name, node in functions.items()}
    wanted = _reached([launch.function for launch in plan], bound)
    text = "\n\n\n".join(ast.unparse(bound[name]) for name in bound if name in wanted)
    shared = [
        ast.unparse(node)
        for node in body
        if isinstance(node, ast.Assign) and _is_constexpr(node.value) and _mentions(text, ast.unparse(node.targets[0]))
    ]
    used = [f"{name} = tl.constexpr({value!r})" for name, value in constants.items() if _mentions(text, name)]
    launches = "\n".join(f"    {launch.function}: {launch.warps} warps, {launch.stages} stages" for launch in plan)
    head = f'"""{kernel.name}, emitted by specpass for one attention site.\n\n{_describe(shapes)}\n{launches}\n"""'
    imports = "import triton\nimport triton.language as tl"
    return "\n\n".join([head, imports, "\n".join([*shared, *used])]) + "\n\n\n" + text + "\n"


def _with_imported(file: Path) -> list[ast.stmt]:
    """A module's statements behind those of the modules here that it takes functions from, each once."""
    bodies: dict[Path, list[ast.stmt]] = {}

    def add(path: Path) -> None:
        if path in bodies:
            return
        body = ast.parse(path.read_text()).body
        for node in body:
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith(f"{PACKAGE}."):
                add(FOLDER / f"{node.module.removeprefix(PACKAGE + '.').replace('.', '/')}.py")  # type: ignore[union-attr]
        bodies[path] = body

    add(file)
    return [node for body in bodies.values() for node in body]


def _describe(shapes: Shapes) -> str:
    names = {
        "batch": "B",
        "kv_heads": "K",
        "group": "G",
        "dim": "D",
        "value_dim": "Dv",
        "rows": "R",
        "window": "W",
        "budget": "C",
        "room": "N",
    }
    sizes = ", ".join(f"{short} {getattr(shapes, name)}" for name, short in names.items() if getattr(shapes, name))
    return f"    {shapes.dtype}: {sizes}"


def _is_constexpr(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "tl.constexpr"


def _mentions(text: str, name: str) -> bool:
    return any(isinstance(node, ast.Name) and node.id == name for node in ast.walk(ast.parse(text)))


def _reached(names: list[str], functions: dict[str, ast.FunctionDef]) -> set[str]:
    """The launched functions and the helpers that they call."""
    found: set[str] = set()
    while names:
        name = names.pop()
        if name not in found:
            found.add(name)
            names += [
                node.id for node in ast.walk(functions[name]) if isinstance(node, ast.Name) and node.id in functions
            ]
    return found


class _Bind(ast.NodeTransformer):
    """Take constants out of signatures and calls, and keep only the branches that they choose."""

    def __init__(self, constants: dict[str, Any], functions: dict[str, ast.FunctionDef]) -> None:
        self.constants = constants
        self.parameters = {name: [arg.arg for arg in node.args.args] for name, node in functions.items()}
        self.bound = {
            name: {arg.arg for arg in node.args.args if arg.annotation is not None and arg.arg in constants}
            for name, node in functions.items()
        }
        for call in (
            node
            for function in functions.values()
            for node in ast.walk(function)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in self.bound
        ):
            # A helper that is given something else under this name (copy_rows' D is DV for values) keeps its argument.
            for name, arg in zip(self.parameters[call.func.id], call.args, strict=True):  # type: ignore[attr-defined]
                if not (isinstance(arg, ast.Name) and arg.id == name):
                    self.bound[call.func.id].discard(name)  # type: ignore[attr-defined]

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.args.args = [arg for arg in node.args.args if arg.arg not in self.bound[node.name]]
        self.generic_visit(node)
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id in self.bound:
            pairs = zip(self.parameters[node.func.id], node.args, strict=True)
            node.args = [arg for name, arg in pairs if name not in self.bound[node.func.id]]
        return node

    def visit_If(self, node: ast.If) -> Any:
        self.generic_visit(node)
        chosen, test = self._decide(node.test)
        if chosen is None:
            node.test = test
            return node
        return node.body if chosen else node.orelse

    def visit_IfExp(self, node: ast.IfExp) -> ast.expr:
        self.generic_visit(node)
        chosen = self._value(node.test)
        return node if chosen is None else node.body if chosen else node.orelse

    def _decide(self, test: ast.expr) -> tuple[bool | None, ast.expr]:
        """Whether the constants decide a test, and what is left of it if they do not."""
        if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
            left = [part for part in test.values if self._value(part) is None]
            if any(self._value(part) is False for part in test.values):
                return False, test
            if left and len(left) < len(test.values):
                return None, left[0] if len(left) == 1 else ast.BoolOp(ast.And(), left)
        return self._value(test), test

    def _value(self, test: ast.expr) -> bool | None:
        names = {node.id for node in ast.walk(test) if isinstance(node, ast.Name)}
        if not names <= self.constants.keys():
            return None
        return bool(eval(compile(ast.Expression(test), "<constants>", "eval"), {}, dict(self.constants)))
