"""int8 weights through ONNX Runtime's dynamic quantizer; both graphs go on sharing one data file for each model."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import onnx_ir as ir

from specpass.export.bind import WeightFile
from specpass.runtime.bundle import DECODE, PREFILL


def quantize(folder: Path) -> None:
    """Replace the graphs of `folder` by ones whose MatMul weights are int8, [in, out] with one scale a column."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    parts = {"target": "target.onnx_data", "draft": "draft.onnx_data"}
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as name:
        work, new = Path(name), Path(name) / "new"
        new.mkdir()
        files = {part: WeightFile(new / file) for part, file in parts.items()}
        for graph in (PREFILL, DECODE):
            quantize_dynamic(
                folder / graph,
                work / graph,
                weight_type=QuantType.QInt8,
                per_channel=True,
                use_external_data_format=True,
                extra_options={"MatMulConstBOnly": True, "EnableSubgraph": True},
            )
            model = ir.load(work / graph)
            for value in list(model.graph.initializers.values()):
                part = (value.name or "").partition(".")[0]
                if part in files and value.const_value is not None:
                    value.const_value = files[part].add_array(value.name or "", np.asarray(value.const_value.numpy()))
            ir.save(model, new / graph)
        for file in parts.values():
            (folder / file).unlink(missing_ok=True)
        for path in new.iterdir():
            path.replace(folder / path.name)
