"""Weights of 8 and 4 bits against graphs whose weights were rounded by hand, in loops."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from ldm_export.errors import InputError
from ldm_export.graph.base import GraphChange
from ldm_export.graph.quantize_weights import QuantizeWeights
from tests.graph.graphs import Array, copy_of, count, evaluate, graph_of, off_by, random, run, weights_of, with_weights

SAME = 1e-5
"""Of two graphs that multiply the same numbers in fp32."""
ORT_TOLERANCE = 0.02
"""ONNX Runtime computes a MatMul by such weights on activations of 8 bits (its MatMulNBits)."""
ALL_COARSE = {"bits": 4, "layer_error": 0.9}


def applied(model: onnx.ModelProto, calls: list[Mapping[str, Array]] | None = None, **options: float) -> GraphChange:
    """The pass on a copy, checked; ``calls`` may be left out with 8 bits."""
    change = QuantizeWeights(**options).apply(copy_of(model), calls or [])  # type: ignore[arg-type]
    onnx.checker.check_model(change.model, full_check=True)
    return change


def matmul(x: str, weight: str, out: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", [x, weight], [out], f"node_{out}")


def network() -> onnx.ModelProto:
    """One of every operator that has weights: an embedding, a product, Gemm and a convolution, each with a bias."""
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        matmul("x", "matrix", "product"),
        helper.make_node("Add", ["product", "matrix_bias"], ["biased"]),
        helper.make_node("Tanh", ["biased"], ["tanh"]),
        helper.make_node("Gemm", ["tanh", "turned", "turned_bias"], ["gemm"], transB=1),
        helper.make_node("Reshape", ["gemm", "shape"], ["picture"]),
        helper.make_node("Conv", ["picture", "kernel", "kernel_bias"], ["y"], pads=[1, 1, 1, 1]),
    ]
    weights = {
        "table": random(1, 50, 64),
        "matrix": random(2, 64, 96) / 8,
        "matrix_bias": random(3, 96),
        "turned": random(4, 128, 96) / 10,
        "turned_bias": random(5, 128),
        "shape": np.array([-1, 32, 2, 2]),
        "kernel": random(6, 24, 32, 3, 3) / 17,
        "kernel_bias": random(7, 24),
    }
    return graph_of(nodes, {"ids": ["n"]}, {"y": ["n", 24, 2, 2]}, weights)


IDS = {"ids": np.array([3, 0, 49, 7, 7])}
OUTPUTS = {"table": 0, "matrix": 1, "turned": 0, "kernel": 0}
"""The axis of every weight that has a scale an index."""


def rounded_by_hand(weight: Array, axis: int, highest: int, block: int | None) -> Array:
    """One output, or one block of inputs of one output, after another."""
    rounded = weight.astype(np.float64)
    for channel in np.moveaxis(rounded, axis, 0):  # views, (inputs, ...)
        for start in range(0, len(channel), block or len(channel)):
            part = channel[start : start + (block or len(channel))]
            for own in part.reshape(len(part), -1).T if block else [part]:
                largest = np.abs(own).max() or 1.0
                own[...] = np.rint(own / largest * highest) * largest / highest
    return rounded


def test_rounding_by_hand_is_what_it_says() -> None:
    weight = np.array([[7, 3.4, -1, 0], [0.7, 0.34, 100, 49]])
    np.testing.assert_allclose(rounded_by_hand(weight, 0, 7, 2), [[7, 3, -1, 0], [0.7, 0.3, 100, 300 / 7]])
    np.testing.assert_allclose(rounded_by_hand(weight, 0, 7, None), [[7, 3, -1, 0], [0, 0, 100, 300 / 7]])
    kernel = random(0, 2, 4, 3, 3)
    np.testing.assert_array_equal(
        rounded_by_hand(kernel, 0, 7, 2)[:, :, 1, 2], rounded_by_hand(kernel[:, :, 1, 2], 0, 7, 2)
    )


@pytest.mark.parametrize(("bits", "highest", "block"), [(8, 127, None), (4, 7, 32), (4, 7, 16)])
def test_a_graph_computes_what_weights_rounded_by_hand_compute(bits: int, highest: int, block: int | None) -> None:
    model = network()
    change = applied(model, [IDS], bits=bits, layer_error=0.9, block=block or 32, smallest=1000)
    number = {8: change.report["weights_of_8_bits"], 4: change.report["weights_of_4_bits"]}
    assert number == {bits: 4, 12 - bits: 0}
    by_hand = {name: rounded_by_hand(weights_of(model)[name], axis, highest, block) for name, axis in OUTPUTS.items()}
    reference = evaluate(with_weights(model, by_hand), IDS)
    assert off_by(evaluate(change.model, IDS), reference) < SAME
    assert off_by(run(change.model, IDS, optimised=False), reference) < SAME
    assert off_by(run(change.model, IDS), reference) < ORT_TOLERANCE
    assert off_by(reference, evaluate(model, IDS)) > 1e-3  # the judges can tell rounded weights from others


@pytest.mark.parametrize(("bits", "block"), [(8, 32), (4, 32), (4, 64), (4, 256)])
def test_bytes_fall_to_a_quarter_and_an_eighth(bits: int, block: int) -> None:
    """With 4 bits a block has a scale of 32 bits beside its weights."""
    nodes = [matmul("x" if k == 0 else f"x{k}", f"w{k}", f"x{k + 1}") for k in range(4)]
    weights = {f"w{k}": random(k, 256, 256) / 16 for k in range(4)}
    model = graph_of(nodes, {"x": ["n", 256]}, {"x4": ["n", 256]}, weights)
    result = applied(model, [{"x": random(9, 4, 256)}], bits=bits, layer_error=0.9, block=block).model
    share = (bits + 32 / (block if bits == 4 else 256)) / 32
    assert result.ByteSize() / model.ByteSize() == pytest.approx(share, rel=0.01)
    assert share < 1 / 6 if bits == 4 else share < 0.26


@pytest.mark.parametrize(
    ("options", "opset", "expected"),
    [
        ({"bits": 8}, 20, 20),
        (ALL_COARSE, 20, 21),
        (ALL_COARSE, 22, 22),
        ({"bits": 4, "layer_error": 1e-6}, 20, 20),
        ({"bits": 4, "layer_error": 0.9, "block": 48}, 20, 20),  # no block fits into 64 inputs
    ],
)
def test_opset_21_is_asked_for_only_where_weights_have_4_bits(
    options: dict[str, float], opset: int, expected: int
) -> None:
    model = graph_of([matmul("x", "w", "y")], {"x": [2, 64]}, {"y": [2, 32]}, {"w": random(1, 64, 32)}, opset=opset)
    change = applied(model, [{"x": random(2, 2, 64)}], **options)
    assert change.model.opset_import[0].version == expected
    assert change.report["weights_of_4_bits"] == (expected > 20)
    kind = next(tensor.data_type for tensor in change.model.graph.initializer if tensor.name == "w.integer")
    assert kind == (TensorProto.INT4 if expected > 20 else TensorProto.INT8)


def test_a_weight_that_moves_the_output_too_much_keeps_8_bits() -> None:
    """The output is all of one product and a thousandth of the other."""
    nodes = [
        matmul("x", "strong", "a"),
        matmul("x", "faint", "b"),
        helper.make_node("Mul", ["b", "thousandth"], ["c"]),
        helper.make_node("Add", ["a", "c"], ["y"]),
    ]
    weights = {"strong": random(1, 64, 64), "faint": random(2, 64, 64), "thousandth": np.float32(1e-3)}
    model = graph_of(nodes, {"x": [8, 64]}, {"y": [8, 64]}, weights)
    x = {"x": random(3, 8, 64)}
    change = applied(model, [x], bits=4, layer_error=0.02)
    stored = weights_of(change.model)
    assert (stored["strong.integer"].dtype, stored["faint.integer"].dtype) == (np.int8, ml_dtypes.int4)
    assert change.report == {"weights_of_8_bits": 1, "weights_of_4_bits": 1}
    assert off_by(run(change.model, x, optimised=False), run(model, x)) < 0.02
    assert off_by(run(applied(model, [x], **ALL_COARSE).model, x, optimised=False), run(model, x)) > 0.02


def test_a_weight_that_spoils_one_call_of_many_keeps_8_bits() -> None:
    """Fine on the first call, whose inputs meet only weights that 4 bits hold exactly."""
    weight = random(1, 64, 64)
    weight[:32] = np.sign(weight[:32])
    model = graph_of([matmul("x", "w", "y")], {"x": ["n", 64]}, {"y": ["n", 64]}, {"w": weight})
    easy, hard = random(2, 4, 64), random(3, 4, 64)
    easy[:, 32:], hard[:, :32] = 0, 0
    for calls, expected in (([easy], 1), ([easy, hard], 0), ([hard, easy], 0)):
        change = applied(model, [{"x": x} for x in calls], bits=4, layer_error=0.05)
        assert change.report["weights_of_4_bits"] == expected


@pytest.mark.parametrize("options", [{"bits": 8}, ALL_COARSE])
def test_a_weight_that_several_operators_share_is_stored_once(options: dict[str, float]) -> None:
    nodes = [
        helper.make_node("Gather", ["table", "ids"], ["x"]),
        helper.make_node("Gemm", ["x", "table"], ["scores"], transB=1),
        matmul("scores", "table", "mixed"),
        helper.make_node("ReduceMax", ["table"], ["largest"], keepdims=0),
        helper.make_node("Div", ["mixed", "largest"], ["y"]),
    ]
    model = graph_of(nodes, {"ids": ["n"]}, {"y": ["n", 64]}, {"table": random(1, 64, 64)})
    result = applied(model, [IDS], **options).model
    assert sorted(weights_of(result)) == ["table.integer", "table.scale"]
    assert count(result, "DequantizeLinear") == 1
    assert off_by(evaluate(result, IDS), evaluate(model, IDS)) < (0.01 if options["bits"] == 8 else 0.15)


@pytest.mark.parametrize("options", [{"bits": 8}, ALL_COARSE])
@pytest.mark.parametrize(
    ("op_type", "inputs", "weight", "x", "y"),
    [
        pytest.param("MatMul", "xw", (1023, 1), [4, 1023], [4, 1], id="small"),
        pytest.param("MatMul", "xw", (2048,), [4, 2048], [4], id="vector"),
        pytest.param("MatMul", "wx", (64, 64), [64, 4], [64, 4], id="first factor"),
        pytest.param("Add", "xw", (2048,), [4, 2048], [4, 2048], id="bias"),
        pytest.param("Mul", "xw", (64, 64), [64, 64], [64, 64], id="scale"),
    ],
)
def test_what_is_no_large_matrix_is_left(
    options: dict[str, float], op_type: str, inputs: str, weight: tuple[int, ...], x: list[int], y: list[int]
) -> None:
    model = graph_of([helper.make_node(op_type, list(inputs), ["y"])], {"x": x}, {"y": y}, {"w": random(1, *weight)})
    change = applied(model, [{"x": random(2, *x)}], **options)
    assert change.report == {"weights_of_8_bits": 0, "weights_of_4_bits": 0}
    assert change.model == model


@pytest.mark.parametrize("options", [{"bits": 8}, ALL_COARSE])
@pytest.mark.parametrize(
    "table", [random(1, 2048), np.arange(4096).reshape(2048, 2)], ids=["of numbers", "of integers"]
)
def test_a_table_of_numbers_is_left(options: dict[str, float], table: Array) -> None:
    gather = helper.make_node("Gather", ["table", "ids"], ["rows"])
    cast = helper.make_node("Cast", ["rows"], ["y"], to=TensorProto.FLOAT)
    model = graph_of([gather, cast], {"ids": ["n"]}, {"y": ["n", *table.shape[1:]]}, {"table": table})
    assert applied(model, [IDS], **options).model == model


@pytest.mark.parametrize("options", [{"bits": 8}, ALL_COARSE])
def test_applied_twice_equals_once(options: dict[str, float]) -> None:
    once = applied(network(), [IDS], **options)
    twice = applied(once.model, [IDS], **options)
    assert twice.report == {"weights_of_8_bits": 0, "weights_of_4_bits": 0}
    assert twice.model == once.model


def test_the_given_graph_is_not_touched() -> None:
    model = network()
    before = copy_of(model)
    QuantizeWeights(**ALL_COARSE).apply(model, [IDS])  # type: ignore[arg-type]
    assert model == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 6}, r"bits = 6 is not supported; allowed are 4 and 8"),
        ({"layer_error": 0.0}, r"layer_error = 0\.0 must be between 0 and 1, without these"),
        ({"layer_error": 1.0}, r"layer_error = 1\.0 must be between"),
        ({"layer_error": float("nan")}, r"layer_error = nan must be between"),
        ({"block": 1}, r"block = 1 must be at least 2"),
        ({"smallest": 0}, r"smallest = 0 must be at least 1"),
    ],
)
def test_options_out_of_range(options: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        QuantizeWeights(**options)  # type: ignore[arg-type]
