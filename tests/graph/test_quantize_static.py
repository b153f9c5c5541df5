"""Static int8: what is quantized and what is not, by ONNX's checker and evaluator, ONNX Runtime and brute force."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ldm_export.errors import InputError
from ldm_export.graph import quantize_static
from ldm_export.graph.base import GraphChange
from ldm_export.graph.quantize_static import QuantizeStatic, best_range, split_concatenations
from tests.graph.graphs import (
    Array,
    copy_of,
    count,
    evaluate,
    graph_of,
    off_by,
    random,
    run,
    weights_of,
    with_weights,
)
from tests.graph.small_graph import CALLS, CONVS, INPUTS, MATRICES, conv, network, node

ALL = {"only_faster": False, "layer_error": 0.5}
"""Options that leave nothing out."""


def changed(model: onnx.ModelProto, calls: Any = None, **options: Any) -> GraphChange:
    """A copy with the pass applied, checked."""
    change = QuantizeStatic(**{**ALL, **options}).apply(copy_of(model), calls or CALLS)
    onnx.checker.check_model(change.model, full_check=True)
    return change


def integers_of(model: onnx.ModelProto) -> set[str]:
    """Convolutions and products whose input and weight are integers and whose output becomes one, by that output."""
    made = {name: node for node in model.graph.node for name in node.output}
    read = {name: node for node in model.graph.node for name in node.input}
    found = set()
    for one in model.graph.node:
        sides = [made[name].op_type if name in made else "" for name in one.input]
        if one.op_type in ("Conv", "MatMul") and "DequantizeLinear" in sides[1:]:
            assert set(sides) == {"DequantizeLinear"}
            assert read[one.output[0]].op_type == "QuantizeLinear"
            found.add(read[read[one.output[0]].output[0]].output[0])
    return found


# --- what is quantized ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("operators", "expected"), [(("Conv",), CONVS), (("MatMul",), MATRICES), (("Conv", "MatMul"), CONVS | MATRICES)]
)
def test_exactly_the_operators_that_are_asked_for(operators: tuple[str, ...], expected: set[str]) -> None:
    change = changed(network(), operators=operators)
    assert integers_of(change.model) == expected
    split = 2 if "Conv" in operators else 0  # for no other reason than integers
    assert change.report == {"quantized": len(expected), "not_faster": [], "not_accurate": [], "split": split}
    assert {node.domain for node in change.model.graph.node} == {""}
    assert count(change.model, "Conv") == 5 + 2 * split
    assert count(change.model, "MatMul") == 4


def test_weights_have_seven_bits_and_a_scale_an_output_channel() -> None:
    model = network()
    split = copy_of(model)
    split_concatenations(split)
    before, after = weights_of(split), weights_of(changed(model).model)
    for name in CONVS | MATRICES:
        weight = before[next(node.input[1] for node in split.graph.node if node.output[0] == name)]
        axis = 1 if name in MATRICES else 0
        whole, scale = after[f"{name}.weight"], after[f"{name}.weight_scale"]
        assert whole.dtype == np.int8
        assert whole.shape == weight.shape
        assert scale.shape == (weight.shape[axis],)
        others = tuple(k for k in range(weight.ndim) if k != axis)
        np.testing.assert_array_equal(np.abs(whole.astype(int)).max(axis=others), 63)
        np.testing.assert_allclose(scale, np.abs(weight).max(axis=others) / 63, rtol=1e-6)
        wide = scale.reshape([-1 if k == axis else 1 for k in range(weight.ndim)])
        assert (np.abs(whole * wide - weight) <= 0.501 * wide).all()
    biases = {"inner", "deep", "shortcut.part_0"}
    assert {name.removesuffix(".bias") for name, array in after.items() if array.dtype == np.int32} == biases
    assert not {"inner.w", "second.w", "query.w", "deep.b"} & after.keys()


def test_the_graph_is_near_fp32_and_every_judge_says_so() -> None:
    model = network()
    result = changed(model).model
    for call in CALLS:
        exact = evaluate(model, call)
        by_the_book, fused, plain = evaluate(result, call), run(result, call), run(result, call, optimised=False)
        assert 0 < off_by(by_the_book, exact) < 0.1  # of a product of two that are off by a half of it
        assert off_by(plain, by_the_book) < 1e-2  # a value halfway between two integers goes either way
        assert off_by(fused, by_the_book) < 2e-2


def test_one_matrix_is_what_integers_in_64_bits_give() -> None:
    weight, x = random(1, 24, 10), random(2, 40, 24)
    model = graph_of([node("MatMul", ["x", "w"], "y")], {"x": ["n", 24]}, {"y": ["n", 10]}, {"w": weight})
    result = changed(model, [{"x": x}]).model
    (scale_x, zero_x), (scale_y, zero_y) = best_range([x]), best_range([x @ weight])
    scale_w = np.abs(weight).max(axis=0) / 63
    bytes_of_x = np.clip(np.rint(x / scale_x) + zero_x, 0, 255).astype(np.int64)
    sums = (bytes_of_x - zero_x) @ np.rint(weight / scale_w).astype(np.int64) * scale_w * scale_x
    exact = (np.clip(np.rint(sums / scale_y) + zero_y, 0, 255) - zero_y) * scale_y
    for judge in (evaluate, run):
        assert np.abs(judge(result, {"x": x}) - exact).max() <= 1.01 * scale_y
        assert (np.abs(judge(result, {"x": x}) - exact) < 1e-4 * scale_y).mean() > 0.98


def test_quantized_twice_changes_nothing_more() -> None:
    once = changed(network()).model
    again = changed(once)
    assert again.report == {"quantized": 0, "not_faster": [], "not_accurate": [], "split": 0}
    assert again.model.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)
    first = changed(network(), operators=("Conv",)).model
    assert integers_of(changed(first).model) == CONVS | MATRICES  # and the other kind may follow


def test_an_operator_that_would_lose_too_much_stays_and_is_named() -> None:
    """A loud channel that ``skip`` does not listen to takes all of its input's range."""
    nodes = [
        conv("x", "even"),
        conv("loud", "skip"),
        node("Add", ["even", "skip"], "y"),
        node("Mul", ["x", "by"], "loud"),
    ]
    nodes = [nodes[3], *nodes[:3]]
    weights = {name: random(seed, 8, 4, 1, 1) for seed, name in enumerate(("even.w", "skip.w"))}
    weights["skip.w"][:, 0] = 0
    weights |= {f"{name}.b": random(3, 8) for name in ("even", "skip")}
    weights["by"] = np.array([1e4, 1, 1, 1], np.float32).reshape(1, 4, 1, 1)
    model = graph_of(nodes, INPUTS, {"y": ["batch", 8, 6, 6]}, weights)
    change = changed(model, layer_error=0.05)
    assert change.report == {"quantized": 1, "not_faster": [], "not_accurate": ["skip"], "split": 0}
    assert integers_of(change.model) == {"even"}
    assert off_by(run(change.model, CALLS[0]), run(model, CALLS[0])) < 0.05
    assert integers_of(changed(model, layer_error=0.999).model) == {"even", "skip"}
    quiet = with_weights(model, {"by": np.ones((1, 4, 1, 1))})
    assert integers_of(changed(quiet, layer_error=0.05).model) == {"even", "skip"}


def test_what_cannot_be_quantized_is_left() -> None:
    """A weight or a bias that is computed, a weight in fp16."""
    nodes = [
        node("Relu", ["w"], "computed"),
        node("Relu", ["b"], "computed_bias"),
        helper.make_node("Conv", ["x", "computed"], ["first"]),
        helper.make_node("Conv", ["first", "w2", "computed_bias"], ["second"]),
        node("Cast", ["second"], "half", to=TensorProto.FLOAT16),
        helper.make_node("Conv", ["half", "w16"], ["third"]),
        node("Cast", ["third"], "y", to=TensorProto.FLOAT),
    ]
    weights = {"w": random(1, 4, 4, 1, 1), "w2": random(2, 4, 4, 1, 1), "b": random(3, 4)}
    weights["w16"] = random(4, 4, 4, 1, 1).astype(np.float16)
    model = graph_of(nodes, INPUTS, {"y": ["batch", 4, 6, 6]}, weights)
    change = changed(model)
    assert change.report["quantized"] == 0
    assert change.model == model


# --- speed ------------------------------------------------------------------------------------------------------------


def test_what_is_not_faster_is_left_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantize_static, "_is_faster", lambda *args: False)
    split = network()
    change = changed(network(), only_faster=True)
    split_concatenations(split)  # as they are tried
    assert change.report == {
        "quantized": 0,
        "not_faster": [one.output[0] for one in split.graph.node if one.output[0] in CONVS | MATRICES],
        "not_accurate": [],
        "split": 0,
    }
    assert change.model == network()
    monkeypatch.setattr(quantize_static, "_is_faster", lambda model, node, *args: node.output[0] != "deep")
    assert integers_of(changed(network(), only_faster=True).model) == (CONVS | MATRICES) - {"deep"}


@pytest.mark.parametrize(("seconds", "faster"), [((3.0, 2.0), True), ((2.0, 3.0), False), ((2.0, 2.0), False)])
def test_the_least_time_decides(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], faster: bool) -> None:
    clock, opened = [0.0], []

    class Stopwatch:
        def __init__(self, model: onnx.ModelProto):
            onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
            self.integers = count(model, "QuantizeLinear") > 0
            self.calls = 0
            opened.append(self)

        def run(self, names: None, call: dict[str, Array]) -> None:
            self.calls += 1
            assert call["x"].shape == (2, 4, 6, 6)
            clock[0] += seconds[self.integers] + 10 * (self.integers and self.calls % 2)  # disturbed now and then

    monkeypatch.setattr(quantize_static, "session", Stopwatch)
    monkeypatch.setattr(quantize_static.time, "perf_counter", lambda: clock[0])
    model = network()
    ranges = {"x": (0.02, 128), "inner": (0.02, 128)}
    assert quantize_static._is_faster(model, model.graph.node[0], ranges, {"x": (2, 4, 6, 6)}) is faster
    assert [one.calls for one in opened] == [quantize_static.TRIALS] * 2


def test_times_of_this_machine_are_taken() -> None:
    change = changed(network(), only_faster=True)
    assert change.report["quantized"] + len(change.report["not_faster"]) == len(CONVS | MATRICES)
    assert integers_of(change.model) == (CONVS | MATRICES) - {*change.report["not_faster"]}


# --- refusals, and a whole network ------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"operators": ()}, "operators = [] quantizes nothing; allowed are Conv, MatMul."),
    ({"operators": ("Gemm",)}, "operators = 'Gemm' is not supported; allowed are 'Conv', 'MatMul'."),
    ({"layer_error": 0.0}, "layer_error = 0.0 must be between 0 and 1, without these."),
    ({"layer_error": 1.0}, "layer_error = 1.0 must be between 0 and 1, without these."),
    ({"layer_error": float("nan")}, "layer_error = nan must be between 0 and 1, without these."),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_wrong_options_are_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as refused:
        QuantizeStatic(**options)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("calls", "message"),
    [
        ([], "There is no calibration data; draw at least one picture for it."),
        ([{"y": random(0, 1)}], r"Calibration data has the inputs ['y']; the graph takes ['x']."),
        (
            [*CALLS, {"x": random(0, 2, 5, 6, 6)}],
            "Calibration data for 'x' has shape (2, 5, 6, 6); the graph takes (any, 4, 6, 6).",
        ),
        (
            [{"x": np.full((1, 4, 6, 6), np.nan, np.float32)}],
            "Calibration data for 'x' holds values that are no numbers. Draw it anew.",
        ),
    ],
)
def test_calibration_that_does_not_fit(calls: list[dict[str, Array]], message: str) -> None:
    model = network()
    with pytest.raises(InputError) as refused:
        QuantizeStatic(**ALL).apply(model, calls)
    assert str(refused.value) == message
    assert model == network()


def test_convolutions_of_a_unet(tiny_bundle: Path) -> None:
    model = onnx.load(tiny_bundle / "unet" / "model.onnx")
    calls = [
        {
            "sample": random(seed, 1, 4, 8, 8),
            "timestep": np.array(900.0 - 400 * seed, np.float32),
            "encoder_hidden_states": random(seed + 9, 1, 16, 32),
        }
        for seed in range(2)
    ]
    change = changed(model, calls, operators=("Conv",))
    assert change.report["split"] == 4  # the shortcuts of the way up: two levels of two layers
    convs = count(model, "Conv") + 4
    assert change.report["quantized"] == convs == len(integers_of(change.model)) == count(change.model, "Conv")
    assert not any(one.op_type == "MatMul" and ".float" in one.output[0] for one in change.model.graph.node)
    for call in calls:
        assert 0 < off_by(run(change.model, call), run(model, call)) < QuantizeStatic.tolerance
