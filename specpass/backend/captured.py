"""The draft's graphs, captured when they are first asked for."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import nn

from specpass.backend import checks
from specpass.cache.states import recurrent_layer
from specpass.capture.devices import device_of
from specpass.capture.draft import capture_draft
from specpass.capture.model import untraceable
from specpass.capture.rope import following
from specpass.errors import SpecpassError
from specpass.kernels.cpu.build import Unbuilt
from specpass.kernels.cpu.linear8 import rows8
from specpass.lowering.eight_bits import eight_bits
from specpass.methods.base import Method
from specpass.passes.draft import DraftGraphs
from specpass.reports.report import Report
from specpass.rewrite import Refusal
from specpass.rewrite.base import Unspliced


class CapturedDraft:
    """A draft's graphs for a backend's method: one set for each dtype of autocast, which changes what they compute.

    Args: bits: 8: its steps read copies of its weights in 8 bits; report: told of that, and of the time.
    """

    def __init__(self, draft: nn.Module, method: Method, bits: int | None, report: Report) -> None:
        self.draft, self.method, self.bits, self.report = draft, method, bits, report
        self.known: dict[torch.dtype | None, DraftGraphs] = {}
        self._refused = ""

    def graphs(self, goes_on: bool) -> DraftGraphs:
        """Those of this call's autocast. Args: goes_on: also those by which it goes on behind what it has read.

        Raises: Refusal: they cannot be had.
        """
        if self._refused:
            raise Unspliced(self._refused)
        device = device_of(self.draft).type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        known = self.known.get(dtype)
        if known is None or (goes_on and known.extend is None):
            checks.check_draft(self.draft, self.method)  # train() may have been called since
            start = time.perf_counter()
            try:
                known = self.known[dtype] = capture(self.draft, self.method, goes_on)
            except Refusal as refusal:
                self._refused = f"the draft cannot be captured: {refusal}"
                raise Unspliced(self._refused) from refusal
            if self.bits:
                self._copy_weights(known)
            self.report.draft_seconds = time.perf_counter() - start
        return known

    def _copy_weights(self, graphs: DraftGraphs) -> None:
        """Let the draft's steps read weights in 8 bits, where this machine can."""
        library = rows8()
        if isinstance(library, Unbuilt):
            self.report.note(f"draft_bits=8: the draft's weights are read as they are: {library}")
            return
        steps = {id(gm): gm for gm in (graphs.step, graphs.extend, graphs.plain_step) if gm is not None}
        size = eight_bits(steps.values(), [graphs.prefill], graphs.params)
        self.report.note(f"the draft's steps read copies of its weights in 8 bits, {size / 2**20:,.0f} MiB")


def capture(draft: Any, method: Method, goes_on: bool = False) -> DraftGraphs:
    """The draft's graphs. Args: goes_on: see capture_draft.

    Raises: Refusal: also where tracing itself fails, whatever it raises (foreign tensors, loops over values).
    """
    if recurrent_layer(draft.config):
        raise Refusal("it has layers with a state")
    if "dynamic" in following(draft):
        raise Refusal("its rotary frequencies follow the length (rope_type 'dynamic')")
    if untraceable(draft):
        raise Refusal(untraceable(draft))
    try:
        return capture_draft(draft, method, goes_on)
    except (Refusal, SpecpassError):
        raise
    except Exception as error:
        raise Refusal(f"tracing failed ({type(error).__name__}: {str(error).splitlines()[0][:200]})") from error
