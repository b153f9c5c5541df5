"""Static int8: what is quantized and what is not, by ONNX's checker and evaluator, ONNX Runtime and brute force."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ldm_export.errors import InputError
from ldm_export.graph import quantize_static
from ldm_export.graph.base import GraphChange
from ldm_export.graph.quantize_static import QuantizeStatic, best_range, split_concatenations
from ldm_export.graph.weights import check_weights
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

ALL = {"only_faster": False, "layer_error": 0.5, "graph_error": 0.9}
"""Options that leave nothing out."""


def changed(model: onnx.ModelProto, calls: Any = None, **options: Any) -> GraphChange:
    """A copy with the pass applied, checked."""
    change = QuantizeStatic(**{**ALL, **options}).apply(copy_of(model), calls or CALLS)
    onnx.checker.check_model(change.model, full_check=True)
    return change


def decided(change: GraphChange) -> dict[str, Any]:
    """What a report says, but for what is empty and the whole graph's error."""
    return {name: value for name, value in change.report.items() if value not in ([], 0) and name != "error"}


def worst_of_calls(result: onnx.ModelProto, model: onnx.ModelProto) -> float:
    return max(off_by(run(result, call), run(model, call)) for call in CALLS)


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
    assert decided(change) == {"quantized": len(expected), **({"split": split} if split else {})}
    assert change.report["error"] == pytest.approx(worst_of_calls(change.model, network()), rel=1e-2)
    assert {node.domain for node in change.model.graph.node} == {""}
    assert count(change.model, "Conv") == 5 + 2 * split
    assert count(change.model, "MatMul") == 4


def test_weights_have_seven_bits_and_a_scale_an_output_channel() -> None:
    model = network()
    split = copy_of(model)
    split_concatenations(split)
    before, after = weights_of(split), weights_of(changed(model).model)
    for name in CONVS | MATRICES:
        stored = next(node.input[1] for node in split.graph.node if node.output[0] == name)
        weight, axis = before[stored], 1 if name in MATRICES else 0
        whole, scale = after[f"{stored}.integer"], after[f"{stored}.scale"]
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


def test_a_bias_beyond_32_bits_leaves_its_operator_in_fp32() -> None:
    """As a channel with next to no weights has it, whose products are counted in next to nothing."""
    weights = weights_of(network())
    quiet = weights["inner.w"].copy()
    quiet[0] *= 1e-12
    model = with_weights(network(), {"inner.w": quiet})
    change = changed(model)
    assert change.report["bias_beyond_32_bits"] == ["inner"]
    assert integers_of(change.model) == (CONVS | MATRICES) - {"inner"}
    check_weights(ir.from_proto(model), ir.from_proto(change.model), "small")
    assert worst_of_calls(change.model, model) < 0.1


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
    assert again.report == {
        "quantized": 0,
        "not_faster": [],
        "not_accurate": [],
        "bias_beyond_32_bits": [],
        "put_back": [],
        "split": 0,
        "error": 0.0,
    }
    assert again.model.SerializeToString(deterministic=True) == once.SerializeToString(deterministic=True)
    first = changed(network(), operators=("Conv",)).model
    assert integers_of(changed(first).model) == CONVS | MATRICES  # and the other kind may follow


def shouting(loudness: Sequence[float], quiet: float = 1.0) -> onnx.ModelProto:
    """A sum of convolutions named ``c0``, ``c1`` …, each with a channel among its inputs that it does not listen to and
    that is so much louder than the others: it takes all of the range that they share."""
    names = [f"c{number}" for number in range(len(loudness))]
    weights = {"quiet": np.array(quiet, np.float32)}
    nodes = []
    for number, (name, loud) in enumerate(zip(names, loudness, strict=True)):
        weights |= {f"{name}.w": random(number, 8, 4, 1, 1), f"{name}.b": random(number + 50, 8)}
        weights[f"{name}.w"][:, 0] = 0
        weights[f"{name}.by"] = np.array([loud, 1, 1, 1], np.float32).reshape(1, 4, 1, 1)
        nodes += [node("Mul", ["x", f"{name}.by"], f"{name}.x"), conv(f"{name}.x", name)]
    nodes += [node("Sum", names, "sum"), node("Mul", ["sum", "quiet"], "y")]
    return graph_of(nodes, INPUTS, {"y": ["batch", 8, 6, 6]}, weights)


@pytest.mark.parametrize("quiet", [1.0, 1e-6])
def test_an_operator_that_would_lose_too_much_stays_and_is_named(quiet: float) -> None:
    """However little of it comes through to the graph's output."""
    model = shouting([1, 100, 1], quiet)
    change = changed(model, layer_error=0.05)
    assert decided(change) == {"quantized": 2, "not_accurate": ["c1"]}
    assert integers_of(change.model) == {"c0", "c2"}
    assert off_by(run(change.model, CALLS[0]), run(model, CALLS[0])) < 0.05
    assert integers_of(changed(model, layer_error=0.999).model) == {"c0", "c1", "c2"}
    assert integers_of(changed(shouting([1, 1, 1]), layer_error=0.05).model) == {"c0", "c1", "c2"}


def test_a_weight_that_one_number_takes_the_range_of_is_refused() -> None:
    model = shouting([1, 1, 1])
    weight = weights_of(model)["c2.w"].copy()
    weight[:, 0, 0, 0] = 300.0  # of a channel that is always 0
    muted = {"c2.w": weight, "c2.by": np.array([0, 1, 1, 1]).reshape(1, 4, 1, 1)}
    assert decided(changed(with_weights(model, muted), layer_error=0.05)) == {"quantized": 2, "not_accurate": ["c2"]}


def test_the_least_accurate_are_put_back_until_the_whole_graph_is_near(monkeypatch: pytest.MonkeyPatch) -> None:
    """As few as that takes, found with a few sessions of the whole graph."""
    loudness = [2.0 ** (number * 3 % 7) for number in range(7)]  # in no order
    model, tried = shouting(loudness), list[onnx.ModelProto]()
    real = quantize_static.outputs_of
    monkeypatch.setattr(quantize_static, "outputs_of", lambda trial, calls: tried.append(trial) or real(trial, calls))
    assert decided(changed(model, layer_error=0.999)) == {"quantized": 7}
    assert len(tried) == 1
    del tried[:]
    change = changed(model, layer_error=0.999, graph_error=0.05)
    assert len(tried) <= 1 + 3  # halving 7
    kept = change.report["quantized"]
    assert 0 < kept < 6
    by_loudness = sorted(range(7), key=lambda number: loudness[number])
    assert change.report["put_back"] == [f"c{number}" for number in by_loudness[kept:]]
    assert integers_of(change.model) == {f"c{number}" for number in by_loudness[:kept]}
    assert change.report["error"] == pytest.approx(worst_of_calls(change.model, model), rel=1e-2)
    assert change.report["error"] <= 0.05
    (one_more,) = [trial for trial in tried if len(integers_of(trial)) == kept + 1]
    assert worst_of_calls(one_more, model) > 0.05


def test_nothing_is_left_of_what_cannot_be_near_at_all() -> None:
    model = shouting([1, 1, 1])
    change = changed(model, graph_error=1e-6)
    assert sorted(change.report["put_back"]) == ["c0", "c1", "c2"]
    assert (change.report["quantized"], change.report["error"]) == (0, 0.0)
    assert change.model == model


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
    assert decided(change) == {
        "not_faster": [one.output[0] for one in split.graph.node if one.output[0] in CONVS | MATRICES]
    }
    assert change.model == network()
    monkeypatch.setattr(quantize_static, "_is_faster", lambda plain, *args: plain.get_outputs()[0].name != "deep")
    assert integers_of(changed(network(), only_faster=True).model) == (CONVS | MATRICES) - {"deep"}


def test_operators_of_one_kind_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind has a type, sizes and attributes."""
    model = shouting([1] * 5)
    model.graph.node[3].attribute.append(helper.make_attribute("kernel_shape", [1, 1]))
    timed = []

    def is_faster(plain: onnxruntime.InferenceSession, *args: Any) -> bool:
        timed.append(plain.get_outputs()[0].name)
        return timed[-1] != "c0"

    monkeypatch.setattr(quantize_static, "_is_faster", is_faster)
    assert decided(changed(model, only_faster=True)) == {"quantized": 1, "not_faster": ["c0", "c2", "c3", "c4"]}
    assert timed == ["c0", "c1"]
    small = [{"x": call["x"][:1]} for call in CALLS]
    changed(model, [*CALLS, *small], only_faster=True)
    assert timed == ["c0", "c1"] * 3  # again for each of two batches


@pytest.mark.parametrize(("seconds", "faster"), [((3.0, 2.0), True), ((2.0, 3.0), False), ((2.0, 2.0), False)])
def test_the_least_time_decides(monkeypatch: pytest.MonkeyPatch, seconds: tuple[float, float], faster: bool) -> None:
    clock = [0.0]

    class Stopwatch:
        def __init__(self, takes: float, disturbed: float):
            self.takes, self.disturbed, self.calls = takes, disturbed, 0

        def run(self, names: None, call: dict[str, Array]) -> None:
            self.calls += 1
            assert call.keys() == {"x"}
            clock[0] += self.takes + self.disturbed * (self.calls % 2)  # now and then

    monkeypatch.setattr(quantize_static.time, "perf_counter", lambda: clock[0])
    plain, integer = Stopwatch(seconds[0], 0.0), Stopwatch(seconds[1], 10.0)
    assert quantize_static._is_faster(plain, integer, CALLS[0]) is faster
    assert plain.calls == integer.calls == quantize_static.TRIALS


def test_times_of_this_machine_are_taken() -> None:
    change = changed(network(), only_faster=True)
    assert change.report["quantized"] + len(change.report["not_faster"]) == len(CONVS | MATRICES)
    assert integers_of(change.model) == (CONVS | MATRICES) - {*change.report["not_faster"]}


# --- refusals, and a whole network ------------------------------------------------------------------------------------

WRONG: list[tuple[dict[str, Any], str]] = [
    ({"operators": ()}, "operators = [] quantizes nothing; allowed are Conv, MatMul."),
    ({"operators": ("Gemm",)}, "operators = 'Gemm' is not supported; allowed are 'Conv', 'MatMul'."),
    ({"graph_error": 0.0}, "graph_error = 0.0 must be between 0 and 1, without these."),
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
            "timestep": np.full(1, 900.0 - 400 * seed, np.float32),
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
