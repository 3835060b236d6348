"""The parts of bench/gpu.py that put attention and selection beside what else there is, over sizes."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

import specpass.ops  # noqa: F401  (binds the operators)
from bench.gpu_kernels import LARGE, SMALL, time_or_why
from bench.gpu_peers import peers
from specpass.dialect.define import SPEC
from specpass.kernels import measure
from specpass.kernels.registry import REGISTRY
from specpass.kernels.shapes import Shapes

if TYPE_CHECKING:
    from bench.gpu import Run


def decode_table(run: Run) -> None:
    """Decode attention at three budgets and batches, beside what other libraries have."""
    rate = run.document["rates"]["device"].get("copy_bytes_s")
    for budget, batch in itertools.product((256, 1024, 4096), (1, 8, 64)):
        shapes = SMALL if run.tiny else dataclasses.replace(LARGE, budget=budget, batch=batch, room=64)

        def compare(shapes: Shapes = shapes) -> dict[str, Any]:
            case = measure.make_case(REGISTRY["decode"], shapes, run.device)
            ours = measure.time_us(lambda: measure.run(case), run.device, cold=True)
            moved = 2 * shapes.heads * shapes.slots * shapes.dim * shapes.itemsize
            others = {
                name: time_or_why(call, run.device, lambda: None)
                for name, call in peers(case).items()
                if name != "aten"
            }
            share = None if rate is None else 1e6 * moved / rate / ours
            return {"ours_us": ours, "peers_us": others, "bandwidth_share": share}

        run.step("decode", f"C {budget}, batch {batch}", compare)


def selection(run: Run) -> None:
    """Importance with the log-sum-exp given, and select, of one layer: bytes over time against the copy's."""
    rate = run.document["rates"]["device"].get("copy_bytes_s")
    for columns in (64,) if run.tiny else (32768, 131072):
        shapes = SMALL if run.tiny else dataclasses.replace(LARGE, batch=1, columns=columns)

        def score(shapes: Shapes = shapes) -> dict[str, Any]:
            case = measure.make_case(REGISTRY["importance_given_lse"], shapes, run.device)
            moved = shapes.heads * shapes.columns * (shapes.dim * shapes.itemsize + 4)
            return timed(lambda: measure.run(case), moved)

        def choose(shapes: Shapes = shapes) -> dict[str, Any]:
            scores = torch.rand(shapes.batch, shapes.kv_heads, shapes.columns, device=run.device)
            lengths = torch.full((shapes.batch,), shapes.columns, device=run.device)
            sizes = (shapes.budget, shapes.window, 7, "max")
            return timed(lambda: SPEC.select(scores, lengths, *sizes), 4 * scores.numel())

        def timed(call: Callable[[], Any], moved: int) -> dict[str, Any]:
            spent = measure.time_us(call, run.device, cold=True)
            return {"us": spent, "bandwidth_share": None if rate is None else 1e6 * moved / rate / spent}

        run.step("selection", f"importance_given_lse, T {shapes.columns}", score)
        run.step("selection", f"select, T {shapes.columns}", choose)


def sparse_table(run: Run) -> None:
    """Sparse prefill of one layer with 2,048 columns, in aten and over all columns beside it."""
    for columns in (64,) if run.tiny else (8192, 32768, 131072):
        shapes = SMALL if run.tiny else dataclasses.replace(LARGE, batch=1, columns=columns, budget=2048)

        def compare(shapes: Shapes = shapes) -> dict[str, Any]:
            case = measure.make_case(REGISTRY["sparse_prefill"], shapes, run.device)
            ways = {"specpass": lambda: measure.run(case), **peers(case)}
            return {"us": {name: time_or_why(call, run.device, lambda: None) for name, call in ways.items()}}

        run.step("sparse", f"T {columns}", compare)


def prefill_table(run: Run) -> None:
    """Prefill attention of one layer by each of torch's backends, and what a log-sum-exp of it saves importance."""
    for columns in (64,) if run.tiny else (8192, 32768):
        shapes = SMALL if run.tiny else dataclasses.replace(LARGE, batch=1, columns=columns)

        def compare(shapes: Shapes = shapes) -> dict[str, Any]:
            kind, heads = getattr(torch, shapes.dtype), shapes.kv_heads * shapes.group
            query, key, value = (
                torch.randn(1, count, shapes.columns, shapes.dim, device=run.device, dtype=kind)
                for count in (heads, shapes.kv_heads, shapes.kv_heads)
            )
            rows = torch.arange(shapes.columns - shapes.rows, shapes.columns, device=run.device)[None]
            scale = 1 / math.sqrt(shapes.dim)

            def sdpa(*backends: SDPBackend) -> Callable[[], Any]:
                def call() -> Any:
                    with sdpa_kernel(list(backends)):
                        return scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

                return call

            ways = {
                "specpass": lambda: SPEC.prefill_attention(query, key, value, scale),
                "specpass, with log-sum-exp": lambda: SPEC.prefill_attention_lse(query, key, value, rows, scale),
                "flash": sdpa(SDPBackend.FLASH_ATTENTION),
                "cudnn": sdpa(SDPBackend.CUDNN_ATTENTION),
            }
            found = {name: time_or_why(call, run.device, lambda: None) for name, call in ways.items()}
            for name in ("importance", "importance_given_lse"):
                case = measure.make_case(REGISTRY[name], dataclasses.replace(shapes, batch=1), run.device)
                found[name] = time_or_why(lambda case=case: measure.run(case), run.device, lambda: None)
            return {"us": found, "flop": 2 * heads * shapes.columns**2 * shapes.dim}

        run.step("prefill", f"T {columns}", compare)
