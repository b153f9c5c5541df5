"""Convolutions of one pixel beside the transposes around transformer blocks, as products with tokens.

    Transpose(Reshape(Conv_1x1(x; W, b)))  =  Transpose(Reshape(x)) W^T + b          on the way in
    Conv_1x1(Reshape(Transpose(y)); W, b)  =  Reshape(Transpose(y W^T + b))          on the way out

ONNX Runtime's convolutions want their channels in blocks, so that a convolution between two transposes costs two more
changes of layout; a product needs none.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ldm_export.graph.base import Array
from ldm_export.graph.cpu.matching import (
    Writer,
    constant,
    ints,
    made_by,
    may_be,
    only_reader,
    replace,
    static_shape,
    transposed,
)


@dataclass(frozen=True)
class PointwiseToProduct:
    name = "pointwise"
    op_type = "Conv"

    def rewrite(self, conv: ir.Node) -> bool:
        weight = constant(conv.inputs[1])
        if weight is None or weight.shape[2:] != (1, 1) or ints(conv, "strides") not in ((), (1, 1)):
            return False
        group = conv.attributes.get("group")
        if any(ints(conv, "pads")) or (group is not None and group.as_int() != 1):
            return False
        given = conv.inputs[2] if len(conv.inputs) > 2 else None
        bias = constant(given)
        if given is not None and bias is None:
            return False
        return on_the_way_in(conv, weight[:, :, 0, 0], bias) or on_the_way_out(conv, weight[:, :, 0, 0], bias)


def on_the_way_in(conv: ir.Node, weight: Array, bias: Array | None) -> bool:
    reshape = only_reader(conv.outputs[0], "Reshape")
    transpose = None if reshape is None else only_reader(reshape.outputs[0], "Transpose")
    if reshape is None or transpose is None or transposed(transpose.outputs[0], 0, 2, 1) is None:
        return False
    before, after = static_shape(conv.outputs[0]), static_shape(reshape.outputs[0])
    if before is None or after is None or before[1] != after[1] or not may_be(before[0], after[0]):
        return False
    writer = Writer(transpose)
    shape = writer.constant(np.array([0, weight.shape[1], -1], np.int64))
    (flat,) = writer.node("Reshape", [conv.inputs[0], shape])
    (tokens,) = writer.node("Transpose", [flat], {"perm": [0, 2, 1]})
    replace(transpose.outputs[0], product(writer, tokens, weight, bias))
    return True


def on_the_way_out(conv: ir.Node, weight: Array, bias: Array | None) -> bool:
    reshape = made_by(conv.inputs[0], "Reshape")
    tokens = None if reshape is None else transposed(reshape.inputs[0], 0, 2, 1)
    if reshape is None or tokens is None or only_reader(reshape.outputs[0], "Conv") is not conv:
        return False
    parts = made_by(reshape.inputs[1], "Concat")
    before, after = static_shape(tokens), static_shape(reshape.outputs[0])
    if parts is None or before is None or after is None or not len(parts.inputs) == len(after) == 4:
        return False
    if before[2] != weight.shape[1] or not may_be(before[0], after[0]):
        return False
    writer = Writer(conv)
    (turned,) = writer.node("Transpose", [product(writer, tokens, weight, bias)], {"perm": [0, 2, 1]})
    channels = writer.constant(np.array([weight.shape[0]], np.int64))
    (shape,) = writer.node("Concat", [parts.inputs[0], channels, *parts.inputs[2:]], {"axis": 0})
    (picture,) = writer.node("Reshape", [turned, shape])
    replace(conv.outputs[0], picture)
    return True


def product(writer: Writer, tokens: ir.Value, weight: Array, bias: Array | None) -> ir.Value:
    (made,) = writer.node("MatMul", [tokens, writer.constant(weight.T)])
    if bias is not None:
        (made,) = writer.node("Add", [made, writer.constant(bias)])
    return made
