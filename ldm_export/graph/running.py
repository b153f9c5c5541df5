"""Runs a graph in ONNX Runtime on the CPU, with any of its inner tensors as outputs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from ldm_export.errors import ExportError
from ldm_export.graph.base import Array, Inputs
from ldm_export.graph.files import as_in_a_file


def session_options() -> onnxruntime.SessionOptions:
    """Options of a session on the CPU that computes what the runtime's do: with rounded weights in fp32."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
    return options


def session(model: onnx.ModelProto, *, optimised: bool = True) -> onnxruntime.InferenceSession:
    """Open a graph; if not ``optimised``, as it stands and without a second, packed copy of its weights.

    Raises
    ------
    ExportError
        If ONNX Runtime refuses the graph.
    """
    options = session_options()
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.enable_cpu_mem_arena = False
    given, folder = as_in_a_file(model)
    if folder is not None:
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    try:
        return onnxruntime.InferenceSession(given.SerializeToString(), options, ["CPUExecutionProvider"])
    except Exception as error:  # its exceptions have no common base class
        raise ExportError(f"ONNX Runtime refuses what a pass made of the graph: {error}. Nothing was kept.") from error


def outputs_of(model: onnx.ModelProto, calls: Sequence[Inputs]) -> list[list[Array]]:
    """The graph's own outputs for each call."""
    opened = session(model)
    return [opened.run(None, dict(call)) for call in calls]


@contextmanager
def watched(model: onnx.ModelProto, names: Iterable[str]) -> Iterator[Callable[[Inputs], Iterator[tuple[str, Array]]]]:
    """The graph with inner tensors as further outputs: gives a function from inputs to names and values.

    Of the values, which may take gigabytes, one at a time is given as an array; hold no more of them than you need.
    """
    asked, inputs = list(dict.fromkeys(names)), {value.name for value in model.graph.input}
    made = [name for name in asked if name not in inputs]
    own, count = {value.name for value in model.graph.output}, len(model.graph.output)
    model.graph.output.extend(helper.make_empty_tensor_value_info(name) for name in made if name not in own)
    try:
        opened = session(model, optimised=False)
    finally:
        del model.graph.output[count:]

    def values(call: Inputs) -> Iterator[tuple[str, Array]]:
        yield from ((name, call[name]) for name in asked if name in inputs)
        if made:
            given = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in call.items()}
            found = zip(made, opened.run_with_ort_values(made, given), strict=True)
            yield from ((name, value.numpy()) for name, value in found)

    yield values


@np.errstate(invalid="ignore")  # infinities, which make it NaN
def worst_error(references: Sequence[Sequence[Array]], results: Sequence[Sequence[Array]]) -> float:
    """Root mean square of the difference over that of the reference, of the worst call; NaN if a call's is."""
    errors = []
    for reference, result in zip(references, results, strict=True):
        exact = [array.astype(np.float64) for array in reference]  # squares of large values leave float32
        power = sum(float((array**2).sum()) for array in exact)
        off = sum(float(((array - other) ** 2).sum()) for array, other in zip(exact, result, strict=True))
        errors.append((off / max(power, 1e-30)) ** 0.5)
    return float(np.max(errors))  # NaN if any is, which max() is not
