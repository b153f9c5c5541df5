"""The rule ``upsample``: four small convolutions where pixels are repeated, and only there; torch is the judge."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
import torch

from tests.graph.graphs import Array, graph_of, random, run
from tests.graph.rules import assert_applied, assert_left, kinds_of, rewritten
from tests.graph.small_graph import node

FOLDED = {"Resize": -1, "Conv": 3, "Unsqueeze": 4, "Concat": 4, "Shape": 1, "Mul": 1, "Reshape": 1}
IN, OUT = 3, 6


def upsampled(
    *,
    scales: tuple[float, ...] | None = (1, 1, 2, 2),
    nearest_mode: str = "floor",
    coordinates: str = "asymmetric",
    mode: str = "nearest",
    kernel: int = 3,
    bias: str | None = "constant",
    outputs: tuple[str, ...] = (),
    **conv: Any,
) -> onnx.ModelProto:
    """A convolution of a resized picture, by constant scales or to the sizes of another input, as the exports have."""
    resize = {"mode": mode, "nearest_mode": nearest_mode, "coordinate_transformation_mode": coordinates}
    given = {"constant": ["b"], "computed": ["b.made"], None: []}[bias]
    nodes = [
        *([node("Relu", ["b"], "b.made")] if bias == "computed" else []),
        node("Resize", ["x", "", *(["scales"] if scales else ["", "to.ids"])], "big", **resize),
        node("Conv", ["big", "w", *given], "y", **{"pads": [kernel // 2] * 4, **conv}),
    ]
    weights = {"w": random(1, OUT, IN // conv.get("group", 1), kernel, kernel)}
    weights |= {"scales": np.array(scales, np.float32)} if scales else {}
    weights |= {"b": random(2, OUT)} if bias else {}
    sides = {name: [f"{name}{k}" for k in range(4)] for name in ("y", *outputs)}
    inputs: dict[str, list[int | str]] = {"x": ["B", IN, "H", "W"]}
    return graph_of(nodes, inputs | ({} if scales else {"to.ids": [4]}), sides, weights)


def pictures(*sizes: tuple[int, int, int]) -> list[dict[str, Array]]:
    return [{"x": random(9, batch, IN, height, width)} for batch, height, width in sizes]


def by_torch(model: onnx.ModelProto, x: Array, size: tuple[int, int]) -> Array:
    weights = {each.name: torch.from_numpy(onnx.numpy_helper.to_array(each).copy()) for each in model.graph.initializer}
    big = torch.nn.functional.interpolate(torch.from_numpy(x), size=size, mode="nearest")
    return torch.nn.functional.conv2d(big, weights["w"], weights.get("b"), padding=1).numpy()


@pytest.mark.parametrize("bias", ["constant", None])
def test_doubled_by_scales(bias: str | None) -> None:
    plain = upsampled(bias=bias)
    calls = pictures((1, 3, 5), (2, 4, 4), (1, 1, 1))
    made = assert_applied(plain, "upsample", FOLDED, calls)
    assert {tuple(each.dims) for each in made.graph.initializer if len(each.dims) == 4} == {(OUT, IN, 2, 2)}
    for call in calls:
        expected = by_torch(plain, call["x"], tuple(2 * side for side in call["x"].shape[2:]))  # type: ignore[arg-type]
        np.testing.assert_allclose(run(made, call), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "to", [(6, 10), (5, 9), (6, 9), (5, 10), (7, 11)], ids=["doubled", "odd", "odd width", "odd height", "more"]
)
def test_doubled_to_the_sizes_of_a_skip_connection(to: tuple[int, int]) -> None:
    plain = upsampled(scales=None)
    made, reports = rewritten(plain)
    assert reports["upsample"].applied == 1
    assert kinds_of(made)["Conv"] == 0
    (branching,) = [each for each in made.graph.node if each.op_type == "If"]
    counts = {
        attribute.name: len([n for n in attribute.g.node if n.op_type == "Conv"]) for attribute in branching.attribute
    }
    assert counts == {"then_branch": 4, "else_branch": 1}
    onnx.checker.check_model(made, full_check=True)
    call = {"x": random(9, 2, IN, 3, 5), "to.ids": np.array([2, IN, *to])}
    np.testing.assert_allclose(run(made, call), by_torch(plain, call["x"], to), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(run(made, call), run(plain, call), rtol=1e-5, atol=1e-5)


MARGIN = "big: its convolution has groups, another margin than 1, or a bias that is computed"


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        ({"scales": (1, 1, 3, 3)}, ()),
        ({"scales": (1, 1, 2, 1)}, ()),
        ({"mode": "linear"}, ()),
        ({"nearest_mode": "ceil"}, ()),
        ({"coordinates": "half_pixel"}, ()),
        ({"kernel": 1}, ()),
        ({"kernel": 5}, ()),
        ({"outputs": ("big",)}, ()),
        ({"pads": [0, 0, 1, 1]}, (MARGIN,)),
        ({"group": 3}, (MARGIN,)),
        ({"bias": "computed"}, (MARGIN,)),
        ({"strides": [2, 2]}, ("big: its convolution skips pixels",)),
        ({"dilations": [2, 2]}, ("big: its convolution skips pixels",)),
    ],
    ids=str,
)
def test_a_resized_picture_that_is_left(options: dict[str, Any], refused: tuple[str, ...]) -> None:
    assert_left(upsampled(**options), "upsample", refused)
