"""Small graphs written by hand, and judges that run any graph without a line of ``ldm_export``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

Array = npt.NDArray[Any]
Shape = Sequence[int | str]


def random(seed: int, *shape: int) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def graph_of(
    nodes: Sequence[onnx.NodeProto],
    inputs: Mapping[str, Shape],
    outputs: Mapping[str, Shape],
    weights: Mapping[str, Array],
    *,
    opset: int = 20,
) -> onnx.ModelProto:
    """A checked graph; inputs are float32, but int64 where the name ends in ``ids``."""

    def value(name: str, shape: Shape) -> onnx.ValueInfoProto:
        kind = TensorProto.INT64 if name.endswith("ids") else TensorProto.FLOAT
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        list(nodes),
        "graph",
        [value(*item) for item in inputs.items()],
        [value(*item) for item in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


def copy_of(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def weights_of(model: onnx.ModelProto) -> dict[str, Array]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def with_weights(model: onnx.ModelProto, weights: Mapping[str, Array]) -> onnx.ModelProto:
    """The graph with other numbers in these weights."""
    copy = copy_of(model)
    for tensor in copy.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights[tensor.name].astype(np.float32), tensor.name))
    return copy


def count(model: onnx.ModelProto, op_type: str) -> int:
    return sum(node.op_type == op_type for node in model.graph.node)


def evaluate(model: onnx.ModelProto, inputs: Mapping[str, Array]) -> Array:
    """The first output by ONNX's own evaluator: numpy, every operator in the type that the graph gives it."""
    with np.errstate(all="ignore"):
        return np.asarray(ReferenceEvaluator(model).run(None, dict(inputs))[0])


def run(model: onnx.ModelProto, inputs: Mapping[str, Array], *, optimised: bool = True) -> Array:
    """The first output by ONNX Runtime, its rewriting of the graph on or off."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 1
    if not optimised:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    opened = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    return np.asarray(opened.run(None, dict(inputs))[0])


def off_by(result: Array, reference: Array) -> float:
    """Root mean square of the difference as a share of the reference's; NaN or infinite if a value is."""
    result, reference = result.astype(np.float64), reference.astype(np.float64)
    with np.errstate(all="ignore"):
        return float(np.sqrt(np.square(result - reference).sum() / np.square(reference).sum()))
