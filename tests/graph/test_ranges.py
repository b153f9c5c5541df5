"""Before static int8: concatenations that are split, and ranges, by ONNX Runtime, ONNX's evaluator and brute force."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from ldm_export.graph.quantize_static import best_range, split_concatenations
from tests.graph.graphs import Array, copy_of, count, evaluate, graph_of, random, run
from tests.graph.small_graph import CALLS, INPUTS, conv, network, node

# --- concatenations ---------------------------------------------------------------------------------------------------


def test_concatenations_are_split_once_and_numerically_the_same() -> None:
    model, split = network(), network()
    assert len(split_concatenations(split)) == 2
    onnx.checker.check_model(split, full_check=True)
    assert [count(split, kind) for kind in ("Conv", "Sum", "Concat")] == [9, 2, 1]
    assert not any("both" in one.input for one in split.graph.node)
    for call in CALLS:
        exact = run(model, call)
        assert np.abs(run(split, call) - exact).max() < 1e-5 * np.abs(exact).max()
    once = copy_of(split)
    assert len(split_concatenations(split)) == 0
    assert split == once


def test_concatenations_that_cannot_be_split_stay() -> None:
    """Along the height, of a part of unknown width or not, and into a grouped convolution; a graph that reads the
    concatenation elsewhere keeps it."""
    nodes = [
        node("Concat", ["x", "x"], "tall", axis=2),
        conv("tall", "of_tall", bias=False),
        node("Reshape", ["x", "shape"], "free"),
        node("Concat", ["x", "free"], "taller", axis=2),
        conv("taller", "of_taller", bias=False),
        node("Concat", ["x", "x"], "wide", axis=1),
        conv("wide", "of_groups", bias=False, group=2),
        conv("wide", "of_wide", bias=False),
        *(node("GlobalMaxPool", [name], f"{name}.max") for name in ("of_tall", "of_taller", "of_groups", "of_wide")),
        node("Sum", [f"{name}.max" for name in ("of_tall", "of_taller", "of_groups", "of_wide")], "most"),
        node("Mul", ["most", "wide"], "y"),
    ]
    weights = {f"of_{name}.w": random(k, 8, 4, 1, 1) for k, name in enumerate(("tall", "taller", "groups"))}
    weights["of_wide.w"] = random(9, 8, 8, 1, 1)
    model = graph_of(nodes, INPUTS, {"y": ["batch", 8, 6, 6]}, {**weights, "shape": np.array([0, 4, 6, -1])})
    model.graph.input.append(helper.make_tensor_value_info("shape", TensorProto.INT64, [4]))
    del model.graph.initializer[[one.name for one in model.graph.initializer].index("shape")]
    calls = {**CALLS[0], "shape": np.array([0, 4, 6, -1])}
    split = copy_of(model)
    assert len(split_concatenations(split)) == 1
    assert {one.output[0] for one in split.graph.node if one.op_type == "Conv"} == {
        "of_tall",
        "of_taller",
        "of_groups",
        "of_wide.part_0",
        "of_wide.part_1",
    }
    assert count(split, "Concat") == 3
    np.testing.assert_allclose(run(split, calls), run(model, calls), rtol=1e-5, atol=1e-5)


# --- ranges -----------------------------------------------------------------------------------------------------------


def rounded(part: Array, scale: float, zero: int) -> Array:
    """By ONNX's evaluator."""
    constants = {"s": np.float32(scale), "z": np.uint8(zero)}
    nodes = [node("QuantizeLinear", ["x", "s", "z"], "q"), node("DequantizeLinear", ["q", "s", "z"], "y")]
    return evaluate(graph_of(nodes, {"x": ["n"]}, {"y": ["n"]}, constants), {"x": part})


def error_of(parts: Sequence[Array], scale: float, zero: int) -> float:
    """Each timestep's against its own power."""
    return sum(
        float(np.square(rounded(part, scale, zero) - part).mean() / max(np.square(part).mean(), 1e-12))
        for part in parts
    )


@settings(max_examples=25, deadline=None, derandomize=True, database=None)
@given(
    st.lists(
        st.tuples(st.floats(0.01, 100), st.floats(-3, 3, allow_subnormal=False), st.sampled_from([1.0, 8.0])),
        min_size=1,
        max_size=3,
    ),
    st.integers(0, 1000),
)
def test_no_range_of_the_grid_is_better(kinds: list[tuple[float, float, float]], seed: int) -> None:
    parts = []
    for number, (size, shift, outlier) in enumerate(kinds):
        values = random(seed + number, 200) + np.float32(shift)
        values[:2] *= np.float32(outlier)
        parts.append(values * np.float32(size))
    scale, zero = best_range(parts)
    assert 0 <= zero <= 255  # so 0 is a byte
    assert rounded(np.zeros(1, np.float32), scale, zero).tolist() == [0]
    low, high = min(0, *(p.min() for p in parts)), max(0, *(p.max() for p in parts))
    found = error_of(parts, scale, zero)
    for shrink in np.arange(50, 101, 2) / 100:
        step = float((high - low) * shrink / 255)
        assert found <= error_of(parts, step, round(float(-low * shrink / step))) * (1 + 1e-4)


def test_quiet_timesteps_count_as_much_as_loud_ones() -> None:
    """The loud one would have its outlier cut off; the quiet one, beside it, needs the finest steps it can get."""
    loud, quiet = random(1, 400) * 10, random(2, 400)
    (alone, _), (both, _) = best_range([loud]), best_range([loud, quiet])
    assert both < alone
    spread = [(loud.max() - loud.min()) / 255 * share for share in (0.5, 1.0)]
    assert spread[0] * 0.99 <= both <= spread[1]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        ([np.zeros(9, np.float32)], (1.0, 0)),
        ([np.array([0, 255], np.float32)], (1.0, 0)),
        ([np.array([-255, 0], np.float32)], (1.0, 255)),
        ([np.array([100, 127.5], np.float32)] * 2, (0.5, 0)),
        ([np.array([-1, 254], np.float32)], (1.0, 1)),
    ],
)
def test_ranges_in_closed_form(parts: list[Array], expected: tuple[float, int]) -> None:
    assert best_range(parts) == expected
