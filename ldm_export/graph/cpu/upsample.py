"""A convolution of a picture that was doubled in size, as four of the small picture.

Doubled by repeating pixels, rows 2i and 2i + 1 of a 3 x 3 convolution read only two rows of the small picture:

    y[2i]     =  w_0 x[i-1] + (w_1 + w_2) x[i]
    y[2i + 1] =  (w_0 + w_1) x[i] + w_2 x[i+1]

and columns likewise, so that each of the four kinds of pixels is a 2 x 2 convolution: 16 products instead of 36 (the
sub-pixel view of Shi et al., 1609.05158). A UNet that is given the size of its skip connection may double to an odd
size, one row or column less, where the last row reads a margin of zeros instead: then the graph does as before.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ldm_export.graph.base import Array
from ldm_export.graph.cpu.matching import Branch, Writer, constant, ints, only_reader, replace
from ldm_export.graph.cpu.rule import RefusedError

DOUBLED = np.array([1, 1, 2, 2])
"""How often a pixel is repeated along each axis of (B, C, h, w)."""


@dataclass(frozen=True)
class FoldUpsample:
    name = "upsample"
    op_type = "Resize"

    def rewrite(self, resize: ir.Node) -> bool:
        conv = only_reader(resize.outputs[0], "Conv")
        weight = None if conv is None else constant(conv.inputs[1])
        if conv is None or weight is None or weight.shape[2:] != (3, 3) or not _repeats_pixels(resize):
            return False
        bias = constant(conv.inputs[2]) if len(conv.inputs) > 2 else np.zeros(len(weight), weight.dtype)
        group = conv.attributes.get("group")
        if bias is None or (group is not None and group.as_int() != 1) or ints(conv, "pads") != (1, 1, 1, 1):
            raise RefusedError("its convolution has groups, another margin than 1, or a bias that is computed")
        if any(ints(conv, name) not in ((), (1, 1)) for name in ("strides", "dilations")):
            raise RefusedError("its convolution skips pixels")
        x, sizes = resize.inputs[0], resize.inputs[3] if len(resize.inputs) > 3 else None
        assert x is not None
        writer = Writer(conv)
        if sizes is None:
            replace(conv.outputs[0], folded(writer, x, weight, bias))
            return True
        four, one = Branch(conv, "doubled"), Branch(conv, "as_before")
        (big,) = one.node("Resize", resize.inputs, resize.attributes)
        (as_before,) = one.node("Conv", [big, one.constant(weight), one.constant(bias)], conv.attributes)
        branches = {"then_branch": four.graph(folded(four, x, weight, bias)), "else_branch": one.graph(as_before)}
        (made,) = writer.node("If", [_doubles(writer, x, sizes)], branches)
        replace(conv.outputs[0], made)
        return True


def folded(writer: Writer, x: ir.Value, weight: Array, bias: Array) -> ir.Value:
    """Four convolutions of ``x``, and their pixels put side by side."""
    given = writer.constant(bias)
    rows: list[ir.Value] = []
    for down in (0, 1):
        pixels: list[ir.Value] = []
        for right in (0, 1):
            kernel = writer.constant(_two_of_three(_two_of_three(weight, down, axis=2), right, axis=3))
            pads = [1 - down, 1 - right, down, right]
            (one,) = writer.node("Conv", [x, kernel, given], {"kernel_shape": [2, 2], "pads": pads})
            pixels += writer.node("Unsqueeze", [one, writer.constant(np.array([3, 5]))])  # (B, C, h, 1, w, 1)
        rows += writer.node("Concat", pixels, {"axis": 5})
    (made,) = writer.node("Concat", rows, {"axis": 3})  # (B, C, h, 2, w, 2)
    (sides,) = writer.node("Shape", [x], {"start": 2})
    (sides,) = writer.node("Mul", [sides, writer.constant(DOUBLED[2:])])
    (shape,) = writer.node("Concat", [writer.constant(np.array([0, len(weight)])), sides], {"axis": 0})
    (made,) = writer.node("Reshape", [made, shape])
    return made


def _two_of_three(weight: Array, second: int, axis: int) -> Array:
    """A kernel's three taps along an axis as the two that the first or the second of a pair of pixels has."""
    before, here, after = np.split(weight, 3, axis=axis)
    return np.concatenate([before + here, after] if second else [before, here + after], axis=axis)


def _repeats_pixels(resize: ir.Node) -> bool:
    """Whether pixel i of the result is pixel i // 2 of the input, if the sizes are double."""
    wanted = {"mode": "nearest", "nearest_mode": "floor", "coordinate_transformation_mode": "asymmetric"}
    found = {name: attribute.as_string() for name in wanted if (attribute := resize.attributes.get(name)) is not None}
    scales = constant(resize.inputs[2]) if len(resize.inputs) > 2 else None
    known = scales is not None and np.array_equal(scales, DOUBLED)
    given = len(resize.inputs) > 3 and resize.inputs[3] is not None
    return found == wanted and "axes" not in resize.attributes and (known or given)


def _doubles(writer: Writer, x: ir.Value, sizes: ir.Value) -> ir.Value:
    """Whether ``sizes`` are those of ``x``, height and width doubled."""
    (shape,) = writer.node("Shape", [x])
    (doubled,) = writer.node("Mul", [shape, writer.constant(DOUBLED)])
    (equal,) = writer.node("Equal", [doubled, sizes])
    (equal,) = writer.node("Cast", [equal], {"to": ir.DataType.INT32})
    (equal,) = writer.node("ReduceMin", [equal], {"keepdims": 0})
    return writer.node("Cast", [equal], {"to": ir.DataType.BOOL})[0]
