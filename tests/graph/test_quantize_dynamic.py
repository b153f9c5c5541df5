"""Dynamic int8 against the fp32 graph, exact integer arithmetic and PyTorch's ``quantize_dynamic``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import helper

from ldm_export.errors import InputError
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from tests.graph.graphs import Array, copy_of, count, evaluate, graph_of, off_by, random, run, weights_of

Judge = Callable[..., Array]
BYTE_MAX, INT16_MAX = 255, 32767
FP32_TOLERANCE = 0.025
"""Against fp32, for one matrix of normal values. Rounding is off by 0.29 of a step: one of weights is 3 / 63 of their
deviation, one of activations 7 / 255, together about 0.016; a single row strays further."""


def matmul(x: str, weight: str, out: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [x, weight], [out], f"node_{out}")


def attention() -> onnx.ModelProto:
    """Attention behind a convolution: five matrices of at least 4096 weights, one smaller, and what is no such
    product: two of activations, one whose constant comes first, one with a stack of matrices."""
    nodes = [
        helper.make_node("Conv", ["picture", "kernel"], ["features"], pads=[1, 1, 1, 1]),
        helper.make_node("Reshape", ["features", "tokens"], ["x"]),
        *(matmul("x", f"w_{name}", name) for name in "qkv"),
        helper.make_node("Transpose", ["k"], ["k_turned"], perm=[0, 2, 1]),
        matmul("q", "k_turned", "scores"),
        helper.make_node("Softmax", ["scores"], ["shares"]),
        matmul("shares", "v", "mixed"),
        matmul("mixed", "w_up", "up"),
        matmul("up", "w_down", "down"),
        matmul("down", "w_small", "small"),
        matmul("w_first", "small", "first"),
        matmul("first", "w_stack", "y"),
    ]
    weights = {
        "kernel": random(1, 64, 4, 3, 3) / 6,
        "tokens": np.array([0, -1, 64]),
        **{f"w_{name}": random(seed, 64, 64) / 8 for seed, name in enumerate("qkv", 2)},
        "w_up": random(5, 64, 96) / 8,
        "w_down": random(6, 96, 64) / 10,
        "w_small": random(7, 64, 32) / 8,
        "w_first": random(8, 16, 16) / 4,
        "w_stack": random(9, 1, 32, 128) / 6,
    }
    return graph_of(nodes, {"picture": ["batch", 4, 4, 4]}, {"y": ["batch", 16, 128]}, weights)


PICTURES = {"picture": random(0, 3, 4, 4, 4)}


def one_matrix(weight: Array) -> onnx.ModelProto:
    return graph_of(
        [matmul("x", "w", "y")], {"x": ["n", weight.shape[0]]}, {"y": ["n", weight.shape[1]]}, {"w": weight}
    )


def changed(model: onnx.ModelProto, smallest: int = 1) -> onnx.ModelProto:
    """A copy with the pass applied, checked."""
    result = QuantizeDynamic(smallest=smallest).apply(copy_of(model), []).model
    onnx.checker.check_model(result, full_check=True)
    return result


def test_exactly_the_large_constant_matrices_are_replaced() -> None:
    model = attention()
    change = QuantizeDynamic(smallest=64 * 64).apply(copy_of(model), [])
    onnx.checker.check_model(change.model, full_check=True)
    assert change.report["quantized"] == 5
    assert change.report["left"] == 5
    assert [count(change.model, kind) for kind in ("MatMulInteger", "MatMul", "Conv", "ConvInteger")] == [5, 5, 1, 0]
    left = {node.output[0] for node in change.model.graph.node if node.op_type == "MatMul"}
    assert left == {"scores", "mixed", "small", "first", "y"}
    kept = {"kernel", "tokens", "w_small", "w_first", "w_stack"}
    assert {name for name, array in weights_of(change.model).items() if array.dtype != np.int8} - kept == {
        f"w_{name}.scale" for name in ("q", "k", "v", "up", "down")
    }


def test_activations_that_several_matrices_share_are_quantized_once() -> None:
    result = changed(attention(), 64 * 64)
    assert count(result, "DynamicQuantizeLinear") == 3  # of x, read by q, k and v, of mixed and of up
    readers = [node.input[0] for node in result.graph.node if node.op_type == "MatMulInteger"]
    assert sorted(readers.count(name) for name in set(readers)) == [1, 1, 3]


def test_a_matrix_that_several_products_share_is_stored_once() -> None:
    nodes = [matmul("x", "w", "once"), matmul("once", "w", "twice"), helper.make_node("Add", ["twice", "w"], ["y"])]
    model = graph_of(nodes, {"x": [32, 32]}, {"y": [32, 32]}, {"w": random(1, 32, 32) / 6})
    result = changed(model)
    assert count(result, "MatMulInteger") == 2
    assert sorted(weights_of(result)) == ["w", "w.quantized", "w.scale", "w.zero_point"]  # the sum still reads fp32
    x = {"x": random(0, 32, 32)}
    assert off_by(run(result, x), run(model, x)) < FP32_TOLERANCE


@pytest.mark.parametrize("size", [1e-20, 1.0, 1e20])
def test_weights_have_seven_bits_and_never_saturate(size: float) -> None:
    weight = random(1, 40, 24) * np.float32(size)
    weight[:, 3] = 0
    weight[:, 4] = weight[0, 4]  # all the same: every number of the column is the largest
    weights = weights_of(changed(one_matrix(weight)))
    whole = weights["w.quantized"].astype(int)
    assert weights["w.quantized"].dtype == np.int8
    assert np.abs(whole).max() == 63
    assert not weights["w.zero_point"].any()
    pairs = np.abs(whole[:-1]) + np.abs(whole[1:])
    assert BYTE_MAX * pairs.max() <= INT16_MAX  # what a processor without VNNI adds in 16 bits
    largest = np.abs(weight).max(axis=0)
    moved = np.abs(weight - whole * weights["w.scale"].astype(np.float64))
    assert (moved <= 0.5001 * largest / 63).all()


def by_hand(x: Array, weight: Array) -> Array:
    """The product of integers in 64 bits."""
    low, high = min(x.min(), 0), max(x.max(), 0)
    step = (high - low) / BYTE_MAX
    zero = np.rint(-low / step)
    bytes_of_x = np.clip(np.rint(x / step) + zero, 0, BYTE_MAX).astype(np.int64)
    scale = np.abs(weight).max(axis=0) / 63
    return (bytes_of_x - int(zero)) @ np.rint(weight / scale).astype(np.int64) * scale * step


SIGNS = np.where(random(1, 64, 16) > 0, 1, -1).astype(np.float32)
ENDS = np.where(random(2, 8, 64) > 0, 1, 0).astype(np.float32)


@pytest.mark.parametrize("judge", [evaluate, run, partial(run, optimised=False)])
@pytest.mark.parametrize(
    ("x", "weight"),
    [
        pytest.param(ENDS, SIGNS, id="ends of both ranges"),
        pytest.param(np.ones((1, 64), np.float32), np.ones((64, 16), np.float32), id="largest sums"),
        pytest.param(random(3, 5, 64), random(4, 64, 16), id="normal"),
        pytest.param(abs(random(3, 5, 64)), random(4, 64, 16), id="not negative"),
        pytest.param(random(3, 1, 64) - 9, random(4, 64, 16), id="all negative"),
    ],
)
def test_the_integers_are_those_computed_by_hand(judge: Judge, x: Array, weight: Array) -> None:
    exact = by_hand(x, weight)
    np.testing.assert_allclose(
        judge(changed(one_matrix(weight)), {"x": x}), exact, rtol=0, atol=1e-5 * abs(exact).max()
    )


@pytest.mark.parametrize("judge", [evaluate, run])
@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize(("shift", "size"), [(0.0, 1.0), (3.0, 1.0), (0.0, 1e4), (-2.0, 1e-4)])
def test_one_matrix_is_near_fp32(judge: Judge, rows: int, shift: float, size: float) -> None:
    weight, x = random(1, 128, 48), (random(2, rows, 128) + shift) * size
    result = judge(changed(one_matrix(weight)), {"x": x.astype(np.float32)})
    exact = x.astype(np.float64) @ weight
    assert 0 < off_by(result, exact) < FP32_TOLERANCE


def test_zero_activations_give_zero() -> None:
    result = changed(one_matrix(random(1, 32, 32)))
    np.testing.assert_array_equal(run(result, {"x": np.zeros((2, 32), np.float32)}), np.zeros((2, 32), np.float32))


@pytest.mark.filterwarnings("ignore:.*quantiz:DeprecationWarning", "ignore:.*quantize_per_tensor:UserWarning")
@pytest.mark.parametrize("qconfig", ["default_dynamic_qconfig", "per_channel_dynamic_qconfig"])
def test_pytorch_does_the_same_to_linear(qconfig: str) -> None:
    torch.manual_seed(0)
    linear = torch.nn.Linear(256, 128, bias=False)
    inputs = random(3, 64, 256)
    with torch.no_grad():
        exact = linear(torch.from_numpy(inputs)).numpy()
        kinds = {torch.nn.Linear: getattr(torch.ao.quantization, qconfig)}
        theirs_net = torch.ao.quantization.quantize_dynamic(torch.nn.Sequential(linear), kinds)
        assert type(theirs_net[0]) is torch.ao.nn.quantized.dynamic.Linear
        theirs = theirs_net(torch.from_numpy(inputs)).numpy()
        weight = linear.weight.numpy().T
    ours = run(changed(one_matrix(np.ascontiguousarray(weight))), {"x": inputs})
    assert off_by(theirs, exact) < FP32_TOLERANCE
    assert off_by(ours, exact) < FP32_TOLERANCE
    assert off_by(ours, theirs) < 2**0.5 * FP32_TOLERANCE  # both stray, on their own
    assert off_by(ours, exact) < 1.5 * off_by(theirs, exact)  # 7 bits of weights for 8, 8 of activations for 7


def test_a_whole_graph_is_near_fp32() -> None:
    model = attention()
    result = changed(model, 64 * 64)
    exact = evaluate(model, PICTURES)
    for judge in (evaluate, run):
        assert 0 < off_by(judge(result, PICTURES), exact) < 0.06  # products one after another, and of one another


def test_applied_twice_equals_once() -> None:
    once = changed(attention(), 64 * 64)
    change = QuantizeDynamic(smallest=64 * 64).apply(copy_of(once), [])
    assert change.report["quantized"] == 0
    assert change.model.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)


def test_weights_that_are_not_float32_are_left() -> None:
    nodes = [
        helper.make_node("Cast", ["x"], ["x16"], to=onnx.TensorProto.FLOAT16),
        matmul("x16", "w", "y16"),
        helper.make_node("Cast", ["y16"], ["y"], to=onnx.TensorProto.FLOAT),
    ]
    model = graph_of(nodes, {"x": [4, 32]}, {"y": [4, 32]}, {"w": random(1, 32, 32).astype(np.float16)})
    assert changed(model) == model


@pytest.mark.parametrize("smallest", [4097, 4096, 1])
def test_small_weights_are_left(smallest: int) -> None:
    result = changed(one_matrix(random(1, 64, 64)), smallest)
    assert count(result, "MatMulInteger") == (smallest <= 64 * 64)


def test_onnx_runtime_fuses_what_is_written(tmp_path: Path) -> None:
    """The speed that the pass is for: no integer product is left that gives its sums back in 32 bits."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(tmp_path / "fused.onnx")
    model = changed(attention(), 64 * 64)
    onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    fused = onnx.load(tmp_path / "fused.onnx")
    assert count(fused, "MatMulInteger") == 0
    assert count(fused, "MatMulIntegerToFloat") + count(fused, "DynamicQuantizeMatMul") == 5


@pytest.mark.parametrize("smallest", [0, -1, float("inf"), float("nan")])
def test_options_out_of_range(smallest: int) -> None:
    with pytest.raises(InputError, match=r"^smallest = \S+ must be at least 1\.$"):
        QuantizeDynamic(smallest=smallest)
