"""Integer weights: symmetric, a scale for every output channel or for every block of inputs.

w ~ scale q, with scale = max |w| / q_max, so that w - scale q is at most half a scale.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

from ldm_export.graph.base import Array

SAFE_MAX = 63
"""Highest weight of 7 bits: sums of two products of these with unsigned bytes never saturate 16 bits, as those of
whole bytes do on processors with AVX2 or AVX-512 and without VNNI."""
INT8_MAX, INT4_MAX = 127, 7


def quantized(weight: Array, axis: int, highest: int) -> tuple[Array, Array]:
    """Whole numbers (int8) from -highest to highest, of the weight's shape, and scales (float32), one an index of
    ``axis``."""
    others = tuple(k for k in range(weight.ndim) if k != axis % weight.ndim)
    scale = np.abs(weight).max(axis=others, keepdims=True) / highest
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    return np.clip(np.rint(weight / scale), -highest, highest).astype(np.int8), scale.reshape(-1)


def quantized_in_blocks(weight: Array, axis: int, block: int, highest: int) -> tuple[Array, Array]:
    """Quantize as :func:`quantized`, with a scale for every ``block`` weights along ``axis``, which it must divide; the
    scales have the weight's shape with that axis shorter."""
    size = weight.shape[axis]
    split = (*weight.shape[:axis], size // block, block, *weight.shape[axis + 1 :])
    scale = np.abs(weight.reshape(split)).max(axis=axis + 1) / highest
    scale = np.where(scale > 0, scale, 1.0).astype(np.float32)
    whole = np.clip(np.rint(weight / scale.repeat(block, axis=axis)), -highest, highest)
    return whole.astype(np.int8), scale


def initializers(model: onnx.ModelProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in model.graph.initializer}


def array(tensor: TensorProto) -> Array:
    """Its values; those of one that lies outside are mapped from its file, not read."""
    return ir.serde.deserialize_tensor(tensor, "").numpy()


def tensor(values: Array, name: str) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, order="C"), name)  # of no axes, too


def tensor_of_4_bits(values: Array, name: str) -> TensorProto:
    """Whole numbers from -8 to 7, two a byte, the first in the lower half."""
    flat = values.reshape(-1).astype(np.int8) & 0x0F
    flat = np.concatenate([flat, np.zeros(len(flat) % 2, np.int8)]).astype(np.uint8)
    return helper.make_tensor(name, TensorProto.INT4, values.shape, (flat[0::2] | flat[1::2] << 4).tobytes(), raw=True)


def remove_unused(model: onnx.ModelProto) -> None:
    """Drop initializers that no node reads any more."""
    read = {name for node in model.graph.node for name in node.input} | {value.name for value in model.graph.output}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
