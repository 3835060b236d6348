"""A prompt's graph on a CPU has its large values where the last layer's lay (kernels/cpu/blocks.py).

before: buf3 = empty_strided_cpu(...)           in the generated code of a region, malloc's
after:  the same name is blocks.empty_strided, and the graph runs as  with reused(): run(ids, mask, ...)
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._inductor.codegen import common
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from specpass.kernels.cpu.blocks import reused


def reuse_blocks(run: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(run)
    def reusing(*args: Any) -> Any:
        with reused():
            return run(*args)

    return reusing


def is_prompts(values: Sequence[Any]) -> bool:
    """Whether a region's first hidden states are [B, S, E] on a CPU, of any number S of tokens."""
    states = next((val for val in values if isinstance(val, Tensor) and val.dim() == 3), None)
    return states is not None and states.device.type == "cpu" and isinstance(states.shape[1], torch.SymInt)


class _Wrapper(PythonWrapperCodegen):
    @staticmethod
    def create(
        is_subgraph: bool, subgraph_name: str | None, parent_wrapper: Any, partition_signatures: Any = None
    ) -> PythonWrapperCodegen:
        if is_subgraph:
            return PythonWrapperCodegen.create(is_subgraph, subgraph_name, parent_wrapper, partition_signatures)
        return _Wrapper()

    def write_header(self) -> None:
        super().write_header()
        self.header.writeline("from specpass.kernels.cpu.blocks import empty_strided as empty_strided_cpu")


@contextlib.contextmanager
def reusing_code() -> Iterator[None]:
    """Inductor's code for a CPU that is made inside takes its memory from blocks.empty_strided."""
    common.init_backend_registration()
    own = common.device_codegens["cpu"]
    common.device_codegens["cpu"] = dataclasses.replace(own, wrapper_codegen=_Wrapper)
    try:
        yield
    finally:
        common.device_codegens["cpu"] = own
