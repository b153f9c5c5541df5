"""GEGLU (Shazeer, 2002.05202, eq. 6) as two products instead of one that is cut in half.

    a, g = Split(x W + b);  y = a Gelu(g)     =     y = (x W_a + b_a) Gelu(x W_g + b_g)

The cut copies both halves; two products write each where it is read. The product may be one of integers, as
quantize-dynamic writes it; both halves then read the same integers of x.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ldm_export.graph.base import Array
from ldm_export.graph.cpu.matching import CONTRIB, Writer, constant, made_by, only_reader, replace, static_shape
from ldm_export.graph.cpu.rule import RefusedError


@dataclass(frozen=True)
class SplitGated:
    name = "gated"
    op_type = "Split"

    def rewrite(self, split: ir.Node) -> bool:
        axis = split.attributes.get("axis")
        if len(split.outputs) != 2 or axis is None or axis.as_int() not in (-1, 2):
            return False
        gelu = only_reader(split.outputs[1], "Gelu")
        gate = None if gelu is None else only_reader(gelu.outputs[0], "Mul")
        if gelu is None or gate is None or split.outputs[0] not in gate.inputs:
            return False
        approximate = gelu.attributes.get("approximate")
        if approximate is not None and approximate.as_string() != "none":
            raise RefusedError("its Gelu is the approximate one")
        add = made_by(split.inputs[0], "Add")
        product = None if add is None else product_from(add.inputs[0])
        bias = None if add is None else constant(add.inputs[1])
        if product is None or bias is None:
            raise RefusedError("what is split is no product with a constant plus a bias")
        if product.scale is None and product.weight.dtype != np.float32:
            raise RefusedError(f"its weights are {product.weight.dtype}, and the kernel is for float32")
        rank = len(static_shape(split.inputs[0]) or ())
        if axis.as_int() != -1 and axis.as_int() != rank - 1:
            return False
        sizes = constant(split.inputs[1]) if len(split.inputs) > 1 else None
        halves = product.weight.shape[1] % 2 == 0 and (sizes is None or sizes[0] == sizes[1])
        if bias.shape != product.weight.shape[1:] or not halves:
            raise RefusedError("its halves are not equal, or its bias is not one number a channel")
        writer = Writer(gate)
        value, gated = product.halves(writer)
        b_value, b_gate = (writer.constant(half) for half in np.split(bias, 2))
        (value,) = writer.node("Add", [value, b_value])
        if product.scale is None:
            (gated,) = writer.node("BiasGelu", [gated, b_gate], domain=CONTRIB)
            gated.type, gated.shape = gelu.outputs[0].type, gelu.outputs[0].shape
        else:  # of integers, ONNX Runtime makes one kernel of a product and its bias
            (gated,) = writer.node("Gelu", writer.node("Add", [gated, b_gate]))
        (made,) = writer.node("Mul", [value, gated])
        replace(gate.outputs[0], made)
        return True


@dataclass(frozen=True)
class Product:
    """x W, or (s_x s_W) (x_q - z_x) W_q where there is a ``scale``.

    Attributes
    ----------
    x : the one input; of integers x_q, s_x, z_x
    weight : (inputs, outputs)
    scale : s_W, one number an output
    """

    x: tuple[ir.Value | None, ...]
    weight: Array
    scale: Array | None = None

    def halves(self, writer: Writer) -> tuple[ir.Value, ir.Value]:
        """The products with either half of the outputs."""
        weights = [writer.constant(half) for half in np.split(self.weight, 2, axis=1)]
        if self.scale is None:
            value, gated = (writer.node("MatMul", [*self.x, weight])[0] for weight in weights)
            return value, gated
        made: list[ir.Value] = []
        for weight, scale in zip(weights, np.split(self.scale, 2), strict=True):
            whole, scale_x, zero_x = self.x
            zero = writer.constant(np.zeros(scale.shape, np.int8))
            (sums,) = writer.node("MatMulInteger", [whole, weight, zero_x, zero])
            (numbers,) = writer.node("Cast", [sums], {"to": ir.DataType.FLOAT})
            (scales,) = writer.node("Mul", [scale_x, writer.constant(scale)])
            made += writer.node("Mul", [numbers, scales])
        return made[0], made[1]


def product_from(value: ir.Value | None) -> Product | None:
    """The product with a constant matrix that a value is; one of integers has no zero points of weights."""
    matmul = made_by(value, "MatMul")
    if matmul is not None:
        weight = constant(matmul.inputs[1])
        return None if weight is None or weight.ndim != 2 else Product(tuple(matmul.inputs[:1]), weight)
    scaled = made_by(value, "Mul")
    numbers = None if scaled is None else made_by(scaled.inputs[0], "Cast")
    scales = None if scaled is None else made_by(scaled.inputs[1], "Mul")
    sums = None if numbers is None else made_by(numbers.inputs[0], "MatMulInteger")
    if sums is None or scales is None or len(sums.inputs) != 4:
        return None
    weight, zero, scale = (constant(one) for one in (sums.inputs[1], sums.inputs[3], scales.inputs[1]))
    if weight is None or zero is None or scale is None or zero.any() or scale.shape != weight.shape[1:]:
        return None
    return Product((sums.inputs[0], scales.inputs[0], sums.inputs[2]), weight, scale)
