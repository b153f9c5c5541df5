"""Dynamic int8 matrix multiplication: weights are integers, activations become integers when they are met.

    x W ~ (s_x s_W) ((x_q - z_x) W_q),   x_q, s_x, z_x = DynamicQuantizeLinear(x)

with standard operators (DynamicQuantizeLinear, MatMulInteger), which ONNX Runtime fuses into one. Only MatMul by a
constant: a convolution made so (ConvInteger) is several times slower than in fp32. Weights have 7 bits, since whole
bytes saturate the products of AVX2. Judge: PyTorch's ``quantize_dynamic`` does the same to Linear.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper

from ldm_export.graph.base import GraphChange, Inputs, Purpose
from ldm_export.graph.integers import SAFE_MAX, array, initializers, quantized, remove_unused, tensor
from ldm_export.reading.options import check_least


@dataclass(frozen=True)
class QuantizeDynamic:
    """Options.

    Attributes
    ----------
    smallest : weights with fewer elements stay as they are
    """

    name: ClassVar[str] = "quantize-dynamic"
    purpose: ClassVar[Purpose] = "speed"
    targets: ClassVar[tuple[str, ...]] = ("cpu",)  # TensorRT's parser has no DynamicQuantizeLinear
    tolerance: ClassVar[float] = 0.1

    smallest: int = 16384
    graphs: tuple[str, ...] = ("denoiser",)

    def __post_init__(self) -> None:
        check_least("smallest", self.smallest, 1)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        """Quantize every MatMul whose second factor is a constant matrix."""
        constants = initializers(model)
        nodes, integers, done, left = [], {}, 0, 0
        for node in model.graph.node:
            weight = constants.get(node.input[1]) if node.op_type == "MatMul" else None
            if (
                weight is None
                or weight.data_type != TensorProto.FLOAT
                or len(weight.dims) != 2
                or np.prod(weight.dims) < self.smallest
            ):
                left += node.op_type == "MatMul"
                nodes.append(node)
                continue
            done += 1
            x = node.input[0]
            if x not in integers:  # projections of the same activations share their integers
                integers[x] = [f"{x}.{part}" for part in ("quantized", "scale", "zero_point")]
                nodes.append(helper.make_node("DynamicQuantizeLinear", [x], integers[x], f"{x}.quantize"))
            nodes += _integer_matmul(model, node, array(weight), integers[x])
        del model.graph.node[:]
        model.graph.node.extend(nodes)
        remove_unused(model)
        return GraphChange(model, {"quantized": done, "left": left, "why": "no constant factor, or a small one"})


def _integer_matmul(
    model: onnx.ModelProto, node: onnx.NodeProto, weight: np.ndarray, x: list[str]
) -> list[onnx.NodeProto]:
    """What takes the place of one MatMul; a weight that several share is stored once."""
    names = [f"{node.input[1]}.{part}" for part in ("quantized", "scale", "zero_point")]
    if names[0] not in initializers(model):
        whole, scale = quantized(weight, 1, SAFE_MAX)
        parts = (whole, scale, np.zeros(len(scale), np.int8))
        model.graph.initializer.extend(tensor(values, name) for values, name in zip(parts, names, strict=True))
    out = node.output[0]
    return [
        helper.make_node("MatMulInteger", [x[0], names[0], x[2], names[2]], [f"{out}.integer"], f"{out}.matmul"),
        helper.make_node("Cast", [f"{out}.integer"], [f"{out}.cast"], f"{out}.to_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", [x[1], names[1]], [f"{out}.scales"], f"{out}.multiply_scales"),  # .scale is its own
        helper.make_node("Mul", [f"{out}.cast", f"{out}.scales"], [out], f"{out}.scaled"),
    ]
