"""Calibration data that lies, the measure of error, and graphs whose inner values are watched."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import helper

from ldm_export.errors import ExportError, InputError
from ldm_export.graph.base import GraphPass, check_calibration, spread
from ldm_export.graph.half import Half
from ldm_export.graph.quantize_weights import QuantizeWeights
from ldm_export.graph.running import outputs_of, session, watched, worst_error
from tests.graph.graphs import Array, copy_of, evaluate, graph_of, random

GRAPH = graph_of(
    [
        helper.make_node("Gather", ["table", "ids"], ["rows"]),
        helper.make_node("MatMul", ["x", "w"], ["product"]),
        helper.make_node("Add", ["product", "rows"], ["y"]),
    ],
    {"x": ["n", 32], "ids": ["n"]},
    {"y": ["n", 64]},
    {"table": random(1, 9, 64), "w": random(2, 32, 64)},
)
GOOD: dict[str, Array] = {"x": random(3, 4, 32), "ids": np.arange(4)}


def spoilt(value: float) -> Array:
    x = GOOD["x"].copy()
    x[2, 5] = value
    return x


@pytest.mark.parametrize(
    "step",
    [None, Half(), Half(format="bf16"), QuantizeWeights(bits=4)],
    ids=lambda step: step.name if step else "check",
)
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": random(0, 4, 33)}, r"Calibration data for 'x' has shape \(4, 33\); the graph takes \(any, 32\)\."),
        ({"x": random(0, 32)}, r"Calibration data for 'x' has shape \(32,\); the graph takes \(any, 32\)\."),
        ({"ids": np.zeros((4, 1), int)}, r"Calibration data for 'ids' has shape \(4, 1\); the graph takes \(any\)\."),
        ({"x": spoilt(np.nan)}, r"Calibration data for 'x' holds values that are no numbers\. Draw it anew\."),
        ({"x": spoilt(-np.inf)}, r"Calibration data for 'x' holds values that are no numbers\. Draw it anew\."),
        ({"x": random(0, 4, 32).astype(np.float64)}, r"Calibration data for 'x' is float64; the graph takes float32\."),
        ({"ids": np.arange(4.0)}, r"Calibration data for 'ids' is float64; the graph takes int64\."),
        ({"ids": None}, r"Calibration data has the inputs \['x'\]; the graph takes \['ids', 'x'\]\."),
        ({"z": spoilt(0)}, r"Calibration data has the inputs \['ids', 'x', 'z'\]; the graph takes \['ids', 'x'\]\."),
        (None, r"There is no calibration data; draw at least one picture for it\."),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_calibration_that_does_not_fit(
    step: GraphPass | None, changes: dict[str, Any] | None, message: str, first: bool
) -> None:
    wrong = {name: array for name, array in {**GOOD, **(changes or {})}.items() if array is not None}
    calls = [] if changes is None else [wrong, GOOD] if first else [GOOD, wrong]
    with pytest.raises(InputError, match=rf"^{message}$"):
        (step.apply if step else check_calibration)(copy_of(GRAPH), calls)


@pytest.mark.parametrize("rows", [1, 5])
def test_free_sizes_may_be_any(rows: int) -> None:
    check_calibration(GRAPH, [GOOD, {"x": random(0, rows, 32), "ids": np.zeros(rows, np.int64)}])


def test_calls_are_of_several_timesteps() -> None:
    calls = [{"step": np.array(step), "picture": np.array(picture)} for picture in range(8) for step in range(50)]
    for count in (2, 4, 8, 64):
        chosen = spread(calls, count)
        assert len(chosen) == count
        assert chosen[0] is calls[0]
        assert chosen[-1] is calls[-1]
        assert len({int(call["step"]) for call in chosen}) >= min(count, 25)
    assert spread(calls[:3], 4) == calls[:3]


# --- the measure ----------------------------------------------------------------------------------------------------


def test_the_error_is_that_of_the_worst_call() -> None:
    references = [[np.array([3, 4], np.float32)], [np.array([30, 0], np.float32), np.array([[40]], np.float32)]]
    results = [[np.array([3, 4.5], np.float32)], [np.array([30, 3], np.float32), np.array([[44]], np.float32)]]
    assert worst_error(references, results) == pytest.approx(0.1)
    assert worst_error(references[:1], results[:1]) == pytest.approx(0.1)
    assert worst_error(references[1:], results[1:]) == pytest.approx(0.1)
    assert worst_error(references, references) == 0


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_no_number_in_any_call_is_no_small_error(place: int, value: float) -> None:
    references = [[np.ones(4, np.float32)] for _ in range(3)]
    results = [[array.copy() for array in call] for call in references]
    results[place][0][1] = value
    assert not worst_error(references, results) <= 1e6


@pytest.mark.parametrize("size", [1e-12, 1e25])
def test_the_error_does_not_depend_on_the_size(size: float) -> None:
    reference = random(0, 50) * np.float32(size)
    assert worst_error([[reference]], [[reference * np.float32(1.01)]]) == pytest.approx(0.01, rel=1e-4)


def test_an_output_of_zeros_equals_itself() -> None:
    zeros = [[np.zeros(3, np.float32)]]
    assert worst_error(zeros, zeros) == 0
    assert worst_error(zeros, [[np.full(3, 1e-3, np.float32)]]) > 1


# --- running --------------------------------------------------------------------------------------------------------


def test_outputs_are_those_of_onnx() -> None:
    ((given,), (again,)) = outputs_of(GRAPH, [GOOD, GOOD])
    np.testing.assert_allclose(given, evaluate(GRAPH, GOOD), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(given, again)


def test_inner_values_are_watched_and_the_graph_is_left_as_it_was() -> None:
    model = copy_of(GRAPH)
    with watched(model, ["product", "y", "product", "x"]) as values:
        found = list(values(GOOD))
        assert model == GRAPH
    seen = dict(found)
    assert sorted(name for name, _ in found) == ["product", "x", "y"]
    np.testing.assert_array_equal(seen["x"], GOOD["x"])
    np.testing.assert_allclose(seen["product"], GOOD["x"] @ random(2, 32, 64), rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(seen["y"], seen["product"] + random(1, 9, 64)[:4])
    with watched(model, []) as values:
        assert list(values(GOOD)) == []


def test_a_graph_that_onnx_runtime_refuses() -> None:
    broken = copy_of(GRAPH)
    broken.graph.node[1].op_type = "MatMull"
    with pytest.raises(
        ExportError, match=r"^ONNX Runtime refuses what a pass made of the graph: .*MatMull.*Nothing was kept\.$"
    ):
        session(broken)
    before = copy_of(broken)
    with pytest.raises(ExportError), watched(broken, ["product"]):
        pass
    assert broken == before
