"""What Dynamo and the passes made of a call, kept on disk: in the next process such a call begins at the lowering.

A file holds the code by which Dynamo calls its graph and writes the results back, the graph behind the last pass, and
what it takes for granted of its inputs. Its name is a hash of the model, the draft, the method and the form of the call
(see unchanged.py), sizes apart; in its head stands a hash of all sources and versions. What cannot be told, pickled
or checked so is traced each time. Files are pickles, as a draft's graphs are (see capture/stored.py).
"""

from __future__ import annotations

import contextlib
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

import torch
from torch import Tensor, nn
from torch._dynamo.convert_frame import register_bytecode_hook

from specpass.backend.compile import Backend
from specpass.backend.inputs import Inputs, Unfit
from specpass.backend.packed import packed, unpacked
from specpass.backend.pruned import Pruned
from specpass.backend.unchanged import SHARED, Watch, form_of, registered
from specpass.cache.budget import BudgetCache
from specpass.capture import stored
from specpass.capture.model import weights_of
from specpass.errors import OutputFileError
from specpass.files import write_file
from specpass.graph.walk import value
from specpass.observe import progress
from specpass.reports.record import GraphRecord

NOTE = "its graph was kept by an earlier process"


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
