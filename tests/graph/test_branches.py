"""Branches beside layers, one graph at a time, against the layer with the change in its weight."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes.common import ShapeInferencePass

from ldm_export.errors import ExportError
from ldm_export.graph.branches import add_branches
from ldm_export.graph.layers import layers_of
from tests.graph.graphs import graph_of, random

LAYERS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...], dict[str, Any]]] = {
    "linear": ("MatMul", (2, 5, 6), (6, 4), {}),
    "linear of rows": ("Gemm", (2, 6), (4, 6), {"transB": 1}),
    "linear of four axes": ("MatMul", (2, 3, 5, 6), (6, 4), {}),
    "convolution": ("Conv", (2, 6, 7, 8), (4, 6, 3, 3), {"pads": [1, 1, 1, 1], "strides": [2, 2]}),
    "convolution of a pixel": ("Conv", (2, 6, 7, 8), (4, 6, 1, 1), {}),
}


def model_of(kind: str) -> tuple[onnx.ModelProto, np.ndarray]:
    """One layer, with a bias where its operator takes one, and what it is fed with."""
    operator, shape, weight, attributes = LAYERS[kind]
    name = "network.layer.weight" + (".transposed" if operator == "MatMul" else "")
    weights = {name: random(1, *weight)}
    inputs = ["x", name]
    if operator != "MatMul":
        weights["bias"] = random(2, 4)
        inputs.append("bias")
    node = helper.make_node(operator, inputs, ["y"], **attributes)
    free: list[int | str] = ["batch", *shape[1:]]
    model = graph_of([node], {"x": free}, {"y": ["batch", *"abc"[: len(shape) - 1]]}, weights)
    return model, random(3, *shape)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_row_has_its_own_change(kind: str, tmp_path: Path) -> None:
    proto, x = model_of(kind)
    onnx.save(proto, tmp_path / "plain.onnx")
    model = ir.load(tmp_path / "plain.onnx")
    ShapeInferencePass()(model)
    assert [*layers_of(model)] == ["layer"]
    specs = {spec.name: spec.shape for spec in add_branches(model, ["layer"])}
    ir.save(model, tmp_path / "branches.onnx")
    onnx.checker.check_model(str(tmp_path / "branches.onnx"), full_check=True)
    sizes = {"batch": 2, "layer.rows": 2, "layer.rank": 3}
    given = {
        name: random(number, *(sizes[size] if isinstance(size, str) else size for size in shape))
        for number, (name, shape) in enumerate(specs.items())
    }
    results = ReferenceEvaluator(str(tmp_path / "branches.onnx")).run(None, {"x": x, **given})[0]
    down, up = given["lora.layer.down"], given["lora.layer.up"]
    for row in range(2):
        changed = onnx.ModelProto()
        changed.CopyFrom(proto)
        stored = changed.graph.initializer[0]
        weight = onnx.numpy_helper.to_array(stored)
        if "lora.layer.scale" in given:
            scale = given["lora.layer.scale"][row].reshape(-1)
            if "convolution" in kind:
                change = np.einsum("or,r,rikl->oikl", up[:, :, 0, 0], scale, down)
            else:
                change = ((down * scale) @ up).T
        else:
            change = (down[row] @ up[row]).reshape(weight.shape)
        stored.CopyFrom(onnx.numpy_helper.from_array((weight + change).astype(np.float32), stored.name))
        expected = ReferenceEvaluator(changed).run(None, {"x": x[row : row + 1]})[0]
        np.testing.assert_allclose(results[row : row + 1], expected, atol=2e-5)


def test_a_layer_that_reads_another_reads_what_that_gives_with_its_branch(tmp_path: Path) -> None:
    weights = {f"network.{name}.weight.transposed": random(number, 4, 4) for number, name in enumerate("ab")}
    nodes = [
        helper.make_node("MatMul", ["x", "network.a.weight.transposed"], ["between"]),
        helper.make_node("MatMul", ["between", "network.b.weight.transposed"], ["y"]),
    ]
    proto = graph_of(nodes, {"x": ["batch", 3, 4]}, {"y": ["batch", 3, 4]}, weights)
    onnx.save(proto, tmp_path / "plain.onnx")
    model = ir.load(tmp_path / "plain.onnx")
    ShapeInferencePass()(model)
    add_branches(model, ["a", "b"])
    ir.save(model, tmp_path / "branches.onnx")
    x = random(5, 2, 3, 4)
    given = {f"lora.{name}.{role}": random(7, *shape) for name in "ab" for role, shape in
             {"down": (1, 4, 2), "up": (1, 2, 4)}.items()}  # fmt: skip
    results = ReferenceEvaluator(str(tmp_path / "branches.onnx")).run(None, {"x": x, **given})[0]
    first, second = (
        weights[f"network.{name}.weight.transposed"] + given[f"lora.{name}.down"][0] @ given[f"lora.{name}.up"][0]
        for name in "ab"
    )
    np.testing.assert_allclose(results, x @ first @ second, atol=1e-4)


def test_a_layer_that_is_not_there_is_refused(tmp_path: Path) -> None:
    onnx.save(model_of("linear")[0], tmp_path / "plain.onnx")
    with pytest.raises(ExportError, match="no layer 'other'"):
        add_branches(ir.load(tmp_path / "plain.onnx"), ["layer", "other"])
