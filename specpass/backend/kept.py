"""What Dynamo and the passes made of a call, kept on disk: in the next process such a call begins at the lowering.

A file holds the code by which Dynamo calls its graph and writes the results back, the graph behind the last pass, and
what it takes for granted of its inputs. Its name is a hash of the model, the draft, the method and the form of the call
(see unchanged.py), sizes apart; in its head stands a hash of all sources and versions. What cannot be told, pickled
or checked so is traced each time. Files are pickles, as a draft's graphs are (see capture/stored.py).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import marshal
import pickle
import sys
import time
import types
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import Tensor, fx, nn
from torch._dynamo.convert_frame import register_bytecode_hook
from torch._dynamo.source import TensorPropertySource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv, ValueRangesSLoc

from specpass.backend.compile import Backend
from specpass.backend.pruned import Pruned
from specpass.backend.unchanged import SHARED, Watch, form_of, registered
from specpass.cache.budget import BudgetCache
from specpass.capture import stored
from specpass.capture.model import weights_of
from specpass.errors import OutputFileError
from specpass.files import write_file
from specpass.graph.edit import copy_module
from specpass.graph.walk import value
from specpass.lowering.guards import Guards
from specpass.lowering.restate import Place, sizes_at
from specpass.observe import progress
from specpass.reports.record import GraphRecord

NOTE = "its graph was kept by an earlier process"
ENV = ("var_to_range", "backed_var_to_val", "var_to_val", "replacements", "divisible", "size_like", "counter")


class Unfit(Exception):
    """A kept graph's inputs are others than it was made for."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a graph takes for granted of its inputs.

    Attributes:
        fixed: of each tensor dtype, device, sizes (None where they are symbols) and strides (None: contiguous).
        places: of all symbolic sizes. guards: over these.
    """

    fixed: list[tuple[torch.dtype, str, tuple[int | None, ...], tuple[int, ...] | None] | None]
    places: list[Place]
    guards: Guards

    @classmethod
    def of(cls, values: list[Any]) -> Inputs:
        """Raises: Undescribed: a layout, or a condition over something else than these inputs."""
        fixed: list[Any] = []
        sizes: list[tuple[Any, Place]] = []
        env: ShapeEnv | None = None
        for index, val in enumerate(values):
            dims: list[tuple[Any, int | None]] = [(val, None)] if isinstance(val, torch.SymInt) else []
            if isinstance(val, Tensor):
                dims = [(dim, axis) for axis, dim in enumerate(val.shape) if isinstance(dim, torch.SymInt)]
                shape = tuple(None if isinstance(dim, torch.SymInt) else dim for dim in val.shape)
                if not val.is_contiguous() and dims:
                    raise stored.Undescribed
                fixed.append((val.dtype, str(val.device), shape, None if val.is_contiguous() else val.stride()))
            elif dims:
                fixed.append(None)
            else:
                raise stored.Undescribed
            for dim, axis in dims:
                sizes.append((dim.node.expr, (index, axis)))
                env = dim.node.shape_env
        return cls(fixed, [place for _, place in sizes], _guards(env, [expr for expr, _ in sizes]))

    def check(self, args: tuple[Any, ...], passed: set[tuple[int, ...]]) -> None:
        """Raises: Unfit. Args: passed: sizes that are known to fit; more are added."""
        for arg, fixed in zip(args, self.fixed, strict=False):
            if fixed is None:
                continue
            dtype, device, shape, strides = fixed
            fits = arg.dtype == dtype and str(arg.device) == device and arg.dim() == len(shape)
            fits = fits and all(own is None or own == size for own, size in zip(shape, arg.shape, strict=True))
            if not fits or not (arg.is_contiguous() if strides is None else arg.stride() == strides):
                raise Unfit
        sizes = sizes_at(self.places, args)
        if sizes not in passed:
            if self.guards.broken(sizes) is not None:
                raise Unfit
            passed.add(sizes)


def _guards(env: ShapeEnv | None, exprs: list[sympy.Expr]) -> Guards:
    """Conditions over sizes that a graph calls `exprs`.

    Raises: Undescribed: one over a symbol that is none of them.
    """
    names = tuple(sympy.Symbol(f"size_{index}", integer=True) for index in range(len(exprs)))
    if env is None:
        return Guards((), ())
    if env.deferred_runtime_asserts:
        raise stored.Undescribed
    first: dict[sympy.Expr, sympy.Expr] = {}
    for expr, name in zip(exprs, names, strict=True):
        if expr.is_Symbol:
            first.setdefault(expr, name)
    stated = [sympy.Eq(name, expr.xreplace(first)) for expr, name in zip(exprs, names, strict=True)]
    for symbol, name in first.items():
        span = env.var_to_range[symbol]
        stated += [name >= span.lower] if span.lower.is_number and span.lower.is_finite else []
        stated += [name <= span.upper] if span.upper.is_Integer else []
    stated += [env.replace(guard.expr).xreplace(_numbers(env) | first) for guard in env.guards]
    conditions = tuple(dict.fromkeys(each for each in stated if each != sympy.true))
    if not set().union(*(each.free_symbols for each in conditions)) <= set(names):
        raise stored.Undescribed
    return Guards(names, conditions)


def _numbers(env: ShapeEnv) -> dict[sympy.Expr, sympy.Expr]:
    """Symbols that stand for Python's numbers: the form of a call tells them, if they are no inputs of the graph."""
    hints = env.backed_var_to_val if hasattr(env, "backed_var_to_val") else env.var_to_val
    sources = {symbol: env.var_to_sources.get(symbol, []) for symbol in hints}
    plain = [each for each, own in sources.items() if own and not any(isinstance(s, TensorPropertySource) for s in own)]
    return {symbol: hints[symbol] for symbol in plain}


class _Pickler(stored.Pickler):
    """A graph of Dynamo's: of its shape environment what a graph's further way asks for."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, ShapeEnv):
            return _env, ({name: getattr(obj, name) for name in ENV if name in vars(obj)}, self._unpickle_state)
        return super().reducer_override(obj)


def _env(held: dict[str, Any], state: Any) -> ShapeEnv:
    env = state.fake_mode.shape_env
    vars(env).update(held)
    env.var_to_range_sloc = {symbol: ValueRangesSLoc(None, None) for symbol in env.var_to_range}
    return env


def _dumps(held: Any) -> bytes:
    return _Pickler.dumps(held, stored.OPTIONS)


def _loads(data: bytes) -> Any:
    return stored.Pickler.loads(data, FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True))


def packed(pruned: Pruned) -> bytes:
    """A rewritten graph; the draft's, whose symbols are others, beside it.

    Raises: Undescribed: it holds tensors of its own.
    """
    children = {name: child for name, child in pruned.graph.named_children() if isinstance(child, fx.GraphModule)}
    copies = {name: copy_module(child) for name, child in children.items()}
    for name, child in children.items():
        copies[name].meta["specpass_symbols"] = child.meta.get("specpass_symbols")
    graph = copy_module(pruned.graph)
    if any(each.graph.find_nodes(op="get_attr") for each in (graph, *copies.values())):
        raise stored.Undescribed
    for each in (graph, *copies.values()):
        stored.share_values(each)
    for name in children:
        del graph._modules[name]
    return pickle.dumps((_dumps(copies), _dumps(dataclasses.replace(pruned, graph=graph))))


def unpacked(data: bytes) -> Pruned:
    drafts, own = pickle.loads(data)
    pruned = _loads(own)
    for name, child in _loads(drafts).items():
        pruned.graph.add_submodule(name, child)
    return dataclasses.replace(
        pruned, graph=copy_module(pruned.graph)
    )  # whose code is written once, when it is lowered


class KeptCalls:
    """The calls of one compiled model that an earlier process kept, and those that the next will find."""

    def __init__(self, target: nn.Module, forward: types.FunctionType, backend: Backend) -> None:
        self.target, self.forward, self.backend = target, forward, backend
        self.found: dict[Hashable, Callable[..., Any] | None] = {}  # by the form of a call
        self.traced: set[Hashable] = set()  # coarse forms that Dynamo serves in this process
        self.watch: Watch | None = None
        self.key: stored.Key | None = None

    @property
    def usable(self) -> bool:
        """Whether graphs are what model and method make of them, and nobody looks on."""
        backend = self.backend
        odd = backend.observers or backend.keep_stages or backend.skip_passes or backend.full_verify
        return backend.lowering == "inductor" and not odd and backend.draft_bits is None

    def call(self, coarse: Hashable, kwargs: dict[str, Any], trace: Callable[..., Any]) -> Any:
        """The model's output, by a kept graph or by `trace`. Args: coarse: the form that decides Dynamo's graph."""
        if coarse in self.traced or not self.usable:
            return trace(**kwargs)
        form, run = self._find(coarse, kwargs["past_key_values"], kwargs)
        if run is not None:
            with contextlib.suppress(Unfit):
                return run(**kwargs)
        self.traced.add(coarse)
        if form is None or run is not None:
            return trace(**kwargs)
        with self._keeping(form):
            return trace(**kwargs)

    def _find(
        self, coarse: Hashable, cache: BudgetCache, kwargs: dict[str, Any]
    ) -> tuple[Hashable | None, Callable[..., Any] | None]:
        try:
            form = coarse, form_of(cache, kwargs)
        except stored.Undescribed:
            return None, None
        if self.watch is None or not self.watch.same():
            self._name()
        if self.key is None:
            return None, None
        if form not in self.found:
            self.found[form] = self._load(form)
        return form, self.found[form]

    def _name(self) -> None:
        """Say anew what model and draft are; graphs of another model are forgotten."""
        before, backend = self.key, self.backend
        attention = getattr(self.target.config, "_attn_implementation", None) or ""
        try:
            functions = registered(attention)
        except stored.Undescribed:
            functions = []
        key = stored.key_of(self.target, functions)
        draft = None if backend.draft is None else stored.key_of(backend.draft, functions)
        self.watch = Watch.of(self.target)
        if key is None or (draft is None) != (backend.draft is None):
            self.key = None
        else:
            parts = [
                key.name,
                draft.name if draft else "",
                backend.draft is self.target,
                backend.method,
                backend.speculate,
                backend.eos_of_text,
            ]
            ranks = backend.ranks  # a graph's collectives name the group, and may say which process they are of
            parts += [None if ranks is None else (ranks.name, ranks.size, ranks.rank)]
            parts += [backend.second_way, backend.cudagraphs, getattr(self.target.config, "eos_token_id", None)]
            parts += [None if backend.draft is None else vars(backend.draft.generation_config).get("eos_token_id")]
            maker = [key.maker, draft.maker if draft else "", sources()]
            for name in SHARED:
                maker += stored.functions_of(sys.modules[name]) if name in sys.modules else []
            self.key = stored.Key(_hash(repr(parts)), _hash(repr(maker)))
        if self.key != before:
            self.found.clear()

    def _path(self, form: Hashable) -> Path:
        assert self.key is not None
        return stored.graphs_dir() / f"{_hash(self.key.name + repr(form))}.call"

    def _load(self, form: Hashable) -> Callable[..., Any] | None:
        assert self.key is not None
        start = time.perf_counter()

        def parse(data: bytes) -> tuple[Any, ...]:
            code, modules, name, inputs, graph = pickle.loads(data)
            pruned = unpacked(graph)
            named = {} if self.backend.draft is None else weights_of(self.backend.draft)
            tensors = {"draft_" + own.replace(".", "_"): tensor for own, tensor in named.items()}
            lifted = tuple(tensors[each] for each in pruned.lifted)
            space: dict[str, Any] = {own: sys.modules[module] for own, module in modules.items()}
            return marshal.loads(code), name, inputs, pruned, lifted, space

        held = stored.read(self._path(form), self.key.maker, parse, "the call")
        if held is None:
            return None
        code, name, inputs, pruned, lifted, space = held
        read = time.perf_counter() - start
        passed: set[tuple[int, ...]] = set()
        lowered: list[Callable[..., Any]] = []

        def checked(*args: Any) -> Any:
            inputs.check(args, passed)
            if not lowered:
                lowered.append(self._lower(pruned, lifted, read))
            return lowered[0](*args)

        cells = dict(zip(self.forward.__code__.co_freevars, self.forward.__closure__ or (), strict=True))
        closure = tuple(cells[each] for each in code.co_freevars)
        space |= {"__builtins__": __builtins__, name: checked}
        return torch._dynamo.disable(types.FunctionType(code, space, "forward", None, closure))

    def _lower(self, pruned: Pruned, lifted: tuple[Tensor, ...], read: float) -> Callable[..., Any]:
        """Args: read: seconds that it took to read the file."""
        start, report = time.perf_counter(), self.backend.report
        record = GraphRecord(pruned.request.kind)
        report.saw(self.target.config.get_text_config(decoder=True))
        report.graphs.append(record)
        with torch.no_grad(), progress.task("compiling"):
            run = self.backend.lower(pruned, lifted, record)
        record.notes.append(NOTE)
        record.seconds = read + time.perf_counter() - start
        return run

    @contextlib.contextmanager
    def _keeping(self, form: Hashable) -> Iterator[None]:
        """Keep what is traced inside, if it is one whole graph."""
        seen: list[tuple[bytes, list[Any]] | None] = []

        def keep(pruned: Pruned) -> None:
            inputs = pruned.graph.graph.find_nodes(op="placeholder")
            values = [value(node) for node in inputs[: len(inputs) - len(pruned.lifted)]]
            try:
                seen.append((packed(pruned), values))
            except UNKEPT:
                seen.append(None)

        def hook(old: types.CodeType, new: types.CodeType) -> None:
            if old is self.forward.__code__ and seen and seen[-1] is not None:
                with contextlib.suppress(*UNKEPT):
                    self._save(form, new, *seen[-1])

        self.backend.keep = keep
        handle = register_bytecode_hook(hook)
        try:
            yield
        finally:
            handle.remove()
            self.backend.keep = None

    def _save(self, form: Hashable, code: types.CodeType, graph: bytes, values: list[Any]) -> None:
        """Raises: any of UNKEPT."""
        assert self.key is not None
        around = self.forward.__globals__
        used = {name: around[name] for name in _names(code) if name in around}
        modules = {name: held.__name__ for name, held in used.items() if isinstance(held, types.ModuleType)}
        (call,) = used.keys() - modules.keys()  # Dynamo's graph, and nothing else that it made in this process
        if not call.startswith("__compiled_fn") or any(sys.modules.get(name) is None for name in modules.values()):
            raise stored.Undescribed
        held = (marshal.dumps(code), modules, call, Inputs.of(values), graph)
        write_file(self._path(form), self.key.maker.encode() + pickle.dumps(held))


UNKEPT = (
    stored.Undescribed,
    OutputFileError,
    AssertionError,
    AttributeError,
    NotImplementedError,
    TypeError,
    ValueError,  # a constant that marshal does not know; several globals
    pickle.PicklingError,
)


def _names(code: types.CodeType) -> set[str]:
    inside = [each for each in code.co_consts if isinstance(each, types.CodeType)]
    return set(code.co_names).union(*map(_names, inside))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[: stored.DIGITS]


@functools.cache
def sources() -> str:
    """A hash of all of specpass."""
    root, digest = Path(__file__).parent.parent, hashlib.sha256()
    folders = [root, *(root / name for name in ("kernels", "lowering"))]  # the last two may be links
    for path in sorted(
        {path for folder in folders for path in folder.rglob("*") if path.suffix in (".py", ".cpp", ".h")}
    ):
        digest.update(path.read_bytes())
    return digest.hexdigest()
