"""A draft's captured graphs on disk, so that the next process does not trace the draft again.

Graphs are pickled by torch's own pickler of FX graphs, with their fake values and shape environment. A file's name is
a hash of the draft: its modules with their settings, its weights' shapes and dtypes, what is asked of the capture. In
its head stands a hash of who made it, sources and versions: what others made is a miss, and replaced. A draft that
cannot be described so (hooks, patched forwards, tensors that are no weights) is traced each time. The files are
pickles: as trustworthy as the cache folder that they lie in, which is the user's own, as Inductor's is.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import pickle
import sys
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import torch
import transformers
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx._graph_pickler import GraphPickler, Options
from torch.utils import _pytree as pytree

from specpass.errors import OutputFileError
from specpass.files import graphs_dir, write_file
from specpass.graph.fakes import symbolic_mode
from specpass.parallel.shards import Collective
from specpass.passes.pipeline import fingerprint

T = TypeVar("T")
Graphs = tuple[fx.GraphModule | None, ...]

DIGITS = 32
PLAIN = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.Size)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ATTENTION = ("sdpa", "eager")  # others may be anybody's
BARE = frozenset(vars(nn.Module())) - {"training"}
# Where a model came from and how it generates: the capture reads neither.
UNREAD = ("_name_or_path", "name_or_path", "transformers_version", "_commit_hash", "generation_config")
# What specpass.compile puts on a model; the draft may be one that is compiled (the target itself).
OURS = (
    "_compiled_call_impl",
    "_prepare_cache_for_generation",
    "_validate_model_kwargs",
    "create_masks_for_generate",
    "init_continuous_batching",
    "prepare_inputs_for_generation",
    "_specpass",
)
READ = ("val", "nn_module_stack")  # of nodes' meta
OPTIONS = Options(ops_filter=None, node_metadata_key_filter=lambda key: key in READ or key.startswith("specpass"))


class Undescribed(Exception):
    """A module has something that no hash tells."""


class Pickler(GraphPickler):
    """torch's own describes a fake tensor with the tensors that it is a view of; here sizes and strides are all."""

    def reducer_override(self, obj: object) -> Any:
        if isinstance(obj, FakeTensor):
            return _fake, (tuple(obj.shape), obj.stride(), obj.dtype, obj.device, self._unpickle_state)
        return super().reducer_override(obj)


def _fake(shape: Any, stride: Any, dtype: torch.dtype, device: torch.device, state: Any) -> torch.Tensor:
    with state.fake_mode:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device)


def share_values(gm: fx.GraphModule) -> None:
    """Let nodes whose fake values look alike hold one and the same, in place: of thousands some hundred are left.

    Making them is what reading a graph takes longest for. That two of them are one says nothing: no pass asks, and a
    region that is compiled gets fresh ones (lowering/restate.py). Inputs keep their own: who traces the graph once more
    (an export) would take two alike for one.
    """
    held: dict[Any, FakeTensor] = {}

    def shared(val: Any) -> Any:
        if not isinstance(val, FakeTensor):
            return val
        sizes = [size.node.expr if isinstance(size, torch.SymInt) else size for size in (*val.shape, *val.stride())]
        return held.setdefault((*sizes, val.dtype, val.device), val)

    for node in gm.graph.nodes:
        if "val" in node.meta and node.op != "placeholder":
            node.meta["val"] = pytree.tree_map(shared, node.meta["val"])


@dataclasses.dataclass(frozen=True)
class Key:
    """`name` of the file, by the draft; `maker`: by sources and versions. Both are hashes in hexadecimal digits."""

    name: str
    maker: str

    @property
    def path(self) -> Path:
        return graphs_dir() / f"{self.name}.graphs"


def key_of(draft: nn.Module, *options: Any) -> Key | None:
    """What decides the draft's graphs; None where it cannot be told.

    Args: options: of the capture, whose repr says all of them.
    """
    attention = getattr(draft.config, "_attn_implementation", None)
    if attention not in ATTENTION:
        return None
    modes = (torch.get_default_dtype(), torch.is_grad_enabled(), torch.is_inference_mode_enabled())
    lines = [attention, repr(options), repr(modes)]
    lines += [str(torch.get_autocast_dtype(kind)) for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]
    try:
        for path, module in draft.named_modules():
            own = {name: held for name, held in settings_of(module).items() if path or name not in OURS}
            lines.append(f"{path} {described(type(module))} {described(own)}")
        kinds = {type(module) for module in draft.modules()}
        modules = {name: sys.modules[name] for name in sorted({kind.__module__ for kind in kinds})}
        models = [text for module in modules.values() for text in (inspect.getsource(module), *functions_of(module))]
    except (Undescribed, OSError, KeyError, TypeError):  # the last three: a class made in a notebook, or by exec
        return None
    for path, weight in (*draft.named_parameters(), *draft.named_buffers()):
        lines.append(f"{path} {weight.dtype} {weight.device} {tuple(weight.shape)} {weight.stride()}")
    versions = (torch.__version__, transformers.__version__, sys.version)
    return Key(_hash(lines), _hash([*versions, fingerprint(), own_sources(), *models]))


def _hash(lines: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:DIGITS]


def functions_of(module: ModuleType) -> list[str]:
    """A module's functions as they are now: libraries put their own in the place of a model's (Liger-Kernel)."""
    return [f"{name} {code_of(held)}" for name, held in vars(module).items() if inspect.isfunction(held)]


def code_of(function: Any) -> str:
    """What a function does, besides its source, which may be another one's by now."""
    plain = inspect.unwrap(function)
    code = plain.__code__
    constants = [held for held in code.co_consts if isinstance(held, PLAIN)]
    return f"{plain.__module__}.{plain.__qualname__} {code.co_code.hex()} {code.co_names} {constants}"


def settings_of(module: nn.Module) -> dict[str, Any]:
    """A module's own attributes besides its weights and submodules, and what it does behind its class's forward.

    Raises: Undescribed: it does more than can be told.
    """
    hooks = {name: list(found.values()) for name in HOOKS if (found := getattr(module, name))}
    if not all(isinstance(hook, Collective) for found in hooks.values() for hook in found):
        raise Undescribed
    return hooks | {name: held for name, held in vars(module).items() if name not in BARE and name not in UNREAD}


def described(held: Any) -> str:
    """All that a setting says.

    Raises: Undescribed: it cannot be told (tensors that are no weights, objects with a state).
    """
    if isinstance(held, (*PLAIN, Collective)):
        return repr(held)
    if isinstance(held, (tuple, list)):
        return f"[{', '.join(map(described, held))}]"
    if isinstance(held, (set, frozenset)):
        return f"{{{', '.join(sorted(map(described, held)))}}}"
    if isinstance(held, dict):
        return f"{{{', '.join(f'{described(name)}: {described(item)}' for name, item in held.items())}}}"
    if isinstance(held, transformers.PretrainedConfig):
        return described({name: item for name, item in held.to_dict().items() if name not in UNREAD})
    if isinstance(held, type) and issubclass(held, nn.Module):
        forward: Any = held.forward  # type: ignore[attr-defined]  # which may have been put in another's place
        return f"{held.__module__}.{held.__qualname__} {described(forward)}"
    if isinstance(held, functools.partial):
        return f"{described(held.func)} {described(held.args)} {described(held.keywords)}"
    if inspect.isbuiltin(held):
        return f"{held.__module__}.{held.__qualname__}"
    closed = inspect.unwrap(held).__code__.co_freevars if inspect.isfunction(held) else ("anything",)
    if set(closed) <= {"__class__"}:  # super() is all that it closes over
        return code_of(held)
    raise Undescribed


@functools.cache
def own_sources() -> str:
    """Of the capture, and of what it reads besides the passes; of what a twin does, whose repr stands for it."""
    here = Path(__file__).parent
    beside = here.parent / "sizes.py", here.parent / "parallel" / "shards.py"
    return "".join(path.read_text() for path in (*sorted(here.glob("*.py")), *beside))


def load(key: Key) -> Graphs | None:
    """The graphs kept under `key`, with a shape environment of their own; None where there are none."""

    def parse(data: bytes) -> Graphs:
        graphs = GraphPickler.loads(data, symbolic_mode())
        for graph in graphs:
            if graph is not None:
                graph.recompile()  # a pickle holds no code, and not all callers compile a copy
        return graphs

    return read(key.path, key.maker, parse, "the draft")


def read(path: Path, maker: str, parse: Callable[[bytes], T], what: str) -> T | None:
    """What `parse` makes of a file that the same `maker` wrote; None where there is no such file.

    A file that cannot be read is a warning. Args: what: is traced anew then.
    """
    try:
        data = path.read_bytes()
    except OSError:
        return None
    if data[:DIGITS] != maker.encode():
        return None
    try:
        return parse(data[DIGITS:])
    except Exception as error:  # of whatever kind: a damaged pickle may raise any
        warnings.warn(
            f"specpass: {path} cannot be read ({type(error).__name__}: {error}), so {what} is traced anew and the file "
            "replaced.",
            stacklevel=3,
        )
        return None


def save(key: Key, graphs: Graphs) -> None:
    """Keep the graphs under `key`, where they can be: without tensors of their own, in a folder that can be written."""
    if any(graph.graph.find_nodes(op="get_attr") for graph in graphs if graph is not None):
        return
    try:
        write_file(key.path, key.maker.encode() + Pickler.dumps(graphs, OPTIONS))
    except (OutputFileError, AssertionError, NotImplementedError, TypeError, AttributeError, pickle.PicklingError):
        return  # no folder for caches, or a value that torch's pickler does not know: traced each time
