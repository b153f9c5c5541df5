"""GEGLU (Shazeer, 2002.05202, eq. 6) as two products instead of one that is cut in half.

    a, g = Split(x W + b);  y = a Gelu(g)     =     y = (x W_a + b_a) BiasGelu(x W_g, b_g)

The cut copies both halves; two products write each where it is read.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ldm_export.graph.cpu.matching import CONTRIB, Writer, constant, made_by, only_reader, replace, sides
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
        product = None if add is None else made_by(add.inputs[0], "MatMul")
        weight = None if product is None else constant(product.inputs[1])
        bias = None if add is None else constant(add.inputs[1])
        if product is None or weight is None or bias is None or weight.ndim != 2:
            raise RefusedError("what is split is no product with a constant plus a bias")
        if weight.dtype != np.float32:
            raise RefusedError(f"its weights are {weight.dtype}, and the kernel is for float32")
        rank = len(sides(split.inputs[0]) or ())
        if axis.as_int() != -1 and axis.as_int() != rank - 1:
            return False
        sizes = constant(split.inputs[1]) if len(split.inputs) > 1 else None
        halves = weight.shape[1] % 2 == 0 and (sizes is None or sizes[0] == sizes[1])
        if bias.shape != weight.shape[1:] or not halves:
            raise RefusedError("its halves are not equal, or its bias is not one number a channel")
        writer = Writer(gate)
        (w_value, w_gate), (b_value, b_gate) = np.split(weight, 2, axis=1), np.split(bias, 2)
        (value,) = writer.node("MatMul", [product.inputs[0], writer.constant(w_value)])
        (value,) = writer.node("Add", [value, writer.constant(b_value)])
        (gated,) = writer.node("MatMul", [product.inputs[0], writer.constant(w_gate)])
        (gated,) = writer.node("BiasGelu", [gated, writer.constant(b_gate)], domain=CONTRIB)
        gated.type, gated.shape = gelu.outputs[0].type, gelu.outputs[0].shape
        (made,) = writer.node("Mul", [value, gated])
        replace(gate.outputs[0], made)
        return True
