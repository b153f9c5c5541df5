"""Runs a graph in ONNX Runtime on the CPU, with any of its inner tensors as outputs."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from ldm_export.errors import ExportError
from ldm_export.graph.base import Array, Inputs

LARGE_BYTES = 2_000_000_000
"""A graph beyond this is more than one message of protobuf can hold, and goes to ONNX Runtime by a file."""


def session(model: onnx.ModelProto, *, optimised: bool = True) -> onnxruntime.InferenceSession:
    """Raises ExportError if ONNX Runtime refuses the graph."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    try:
        if model.ByteSize() < LARGE_BYTES:
            return onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            onnx.save(model, path, save_as_external_data=True, location="weights")  # takes them out of the model
            onnx.load_external_data_for_model(model, folder)
            return onnxruntime.InferenceSession(path, options, ["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise ExportError(f"ONNX Runtime refuses what a pass made of the graph: {error}. Nothing was kept.") from error


def outputs_of(model: onnx.ModelProto, calls: Sequence[Inputs]) -> list[list[Array]]:
    """The graph's own outputs for each call."""
    opened = session(model)
    return [opened.run(None, dict(call)) for call in calls]


@contextmanager
def watched(model: onnx.ModelProto, names: Iterable[str]) -> Iterator[Any]:
    """The graph with inner tensors as further outputs: gives a function from inputs to their values by name."""
    asked = list(dict.fromkeys(names))
    own, count = {value.name for value in model.graph.output}, len(model.graph.output)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in asked if name not in own)
    try:
        opened = session(model, optimised=False)
    finally:
        del model.graph.output[count:]

    def values(call: Inputs) -> dict[str, Array]:
        return dict(zip(asked, opened.run(asked, dict(call)), strict=True)) if asked else {}

    yield values


def worst_error(references: Sequence[Sequence[Array]], results: Sequence[Sequence[Array]]) -> float:
    """Root mean square of the difference over that of the reference, of the worst call; NaN if a call's is."""
    errors = []
    for reference, result in zip(references, results, strict=True):
        exact = [array.astype(np.float64) for array in reference]  # squares of large values leave float32
        power = sum(float((array**2).sum()) for array in exact)
        off = sum(float(((array - other) ** 2).sum()) for array, other in zip(exact, result, strict=True))
        errors.append((off / max(power, 1e-30)) ** 0.5)
    return float(np.max(errors))  # NaN if any is, which max() is not
