"""Integer weights against ONNX's own DequantizeLinear and packing of 4 bits."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from onnx import TensorProto, helper, numpy_helper

from ldm_export.graph.integers import (
    INT4_MAX,
    INT8_MAX,
    SAFE_MAX,
    quantized,
    quantized_in_blocks,
    remove_unused,
    tensor_of_4_bits,
)
from tests.graph.graphs import Array, evaluate, graph_of, random

HALF_A_SCALE = 0.5 * (1 + 1e-4)
"""What rounding may lose; the quotient w / scale is itself a float32."""
RANGES = [INT4_MAX, SAFE_MAX, INT8_MAX]
SIZES = st.floats(2**-100, 2**100, width=32)
WEIGHTS = st.one_of(
    st.just(0.0), SIZES, SIZES.map(lambda size: -size), st.floats(-4, 4, width=32, allow_subnormal=False).map(round)
)


def dequantized(whole: Array, scale: Array, **attributes: Any) -> Array:
    """By ONNX's evaluator."""
    node = helper.make_node("DequantizeLinear", ["whole", "scale"], ["y"], **attributes)
    model = graph_of([node], {}, {"y": whole.shape}, {"whole": whole, "scale": scale}, opset=21)
    return evaluate(model, {})


@given(
    weight=arrays.arrays(np.float32, arrays.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=WEIGHTS),
    axis=st.integers(-2, 1),
    highest=st.sampled_from(RANGES),
)
@settings(max_examples=60, deadline=None)
def test_a_weight_moves_by_half_a_scale_at_most(weight: Array, axis: int, highest: int) -> None:
    whole, scale = quantized(weight, axis, highest)
    assert (whole.dtype, whole.shape) == (np.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (np.float32, (weight.shape[axis],))
    assert (scale > 0).all()
    assert np.abs(whole.astype(int)).max() <= highest
    shape = [-1 if k == axis % weight.ndim else 1 for k in range(weight.ndim)]
    moved = np.abs(weight.astype(np.float64) - dequantized(whole, scale, axis=axis))
    assert (moved <= HALF_A_SCALE * scale.reshape(shape)).all()
    np.testing.assert_array_equal(quantized(-weight, axis, highest)[0], -whole)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_a_weight_of_a_block_moves_by_half_a_scale_at_most(data: st.DataObject) -> None:
    axis, block, blocks = (data.draw(st.integers(low, 4)) for low in (0, 2, 1))
    axis %= 2
    highest = data.draw(st.sampled_from(RANGES))
    shape = [3, 3, *data.draw(arrays.array_shapes(min_dims=1, max_dims=2, max_side=3))]
    shape[axis] = block * blocks
    weight = data.draw(arrays.arrays(np.float32, shape, elements=WEIGHTS))
    whole, scale = quantized_in_blocks(weight, axis, block, highest)
    assert (whole.dtype, whole.shape) == (np.int8, weight.shape)
    assert (scale.dtype, scale.shape) == (np.float32, (*shape[:axis], blocks, *shape[axis + 1 :]))
    assert np.abs(whole.astype(int)).max() <= highest
    moved = np.abs(weight.astype(np.float64) - dequantized(whole, scale, axis=axis, block_size=block))
    assert (moved <= HALF_A_SCALE * scale.repeat(block, axis)).all()


@pytest.mark.parametrize("highest", RANGES)
@pytest.mark.parametrize("size", [2.0**-100, 1.0, 1e38])
def test_the_largest_weight_of_every_channel_is_exact(highest: int, size: float) -> None:
    weight = np.array([[1, -0.5, 0.25], [-1e-3, 1e-3, 0], [0, 0, 0]], np.float32) * np.float32(size)
    whole, scale = quantized(weight, 0, highest)
    assert whole[:, 0].tolist() == [highest, -highest, 0]
    np.testing.assert_allclose(dequantized(whole, scale, axis=0)[:, 0], weight[:, 0], rtol=1e-6)
    assert whole[2].tolist() == [0, 0, 0]
    in_blocks, scales = quantized_in_blocks(weight, 1, 3, highest)
    np.testing.assert_array_equal(in_blocks, whole)
    np.testing.assert_array_equal(scales[:, 0], scale)


@pytest.mark.parametrize("axis", [0, 1])
def test_one_large_channel_costs_the_others_nothing(axis: int) -> None:
    weight = random(0, 6, 8)
    spoilt = weight.copy()
    spoilt.swapaxes(0, axis)[2] *= 1e6
    ours, theirs = (np.delete(quantized(array, axis, INT8_MAX)[0], 2, axis) for array in (weight, spoilt))
    np.testing.assert_array_equal(ours, theirs)


@given(
    arrays.arrays(
        np.int8,
        arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=7),
        elements=st.integers(-8, 7),
    )
)
@settings(max_examples=60, deadline=None)
def test_four_bits_are_packed_as_onnx_packs_them(values: Array) -> None:
    tensor = tensor_of_4_bits(values, "weight")
    onnx.checker.check_tensor(tensor)
    assert (tensor.data_type, list(tensor.dims)) == (TensorProto.INT4, list(values.shape))
    assert len(tensor.raw_data) == (values.size + 1) // 2
    np.testing.assert_array_equal(numpy_helper.to_array(tensor).astype(np.int8), values)
    assert tensor.raw_data == numpy_helper.from_array(values.astype(ml_dtypes.int4)).raw_data


def test_only_weights_that_nothing_reads_are_removed() -> None:
    nodes = [helper.make_node("Add", ["x", "read"], ["y"])]
    weights = {name: np.ones(2, np.float32) for name in ("read", "unread", "given")}
    model = graph_of(nodes, {"x": [2]}, {"y": [2], "given": [2]}, weights)
    remove_unused(model)
    assert [tensor.name for tensor in model.graph.initializer] == ["read", "given"]
    onnx.checker.check_model(model, full_check=True)
