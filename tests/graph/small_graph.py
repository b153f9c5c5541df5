"""A UNet in small as a graph, whose operators are those that static quantization has to tell apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper

from tests.graph.graphs import graph_of, random

INPUTS = {"x": ["batch", 4, 6, 6]}


def conv(x: str, out: str, *, bias: bool = True, **attributes: Any) -> onnx.NodeProto:
    inputs = [x, f"{out}.w", *([f"{out}.b"] if bias else [])]
    return helper.make_node("Conv", inputs, [out], f"node_{out}", **attributes)


def node(kind: str, inputs: Sequence[str], out: str, **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(kind, list(inputs), [out], f"node_{out}", **attributes)


def network() -> onnx.ModelProto:
    """A UNet in small: convolutions, one of them grouped, two that read concatenations, matrices, and products that
    have no constant matrix."""
    nodes = [
        conv("x", "inner", pads=[1, 1, 1, 1]),
        node("Relu", ["inner"], "skip"),
        conv("skip", "grouped", group=4, bias=False),
        conv("skip", "deep", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Resize", ["deep", "", "scales"], "wide", mode="nearest"),
        node("Concat", ["wide", "skip", "x"], "both", axis=1),
        conv("both", "shortcut"),
        conv("both", "second", bias=False, pads=[1, 1, 1, 1], dilations=[1, 1]),
        node("Add", ["shortcut", "second"], "sum"),
        node("Reshape", ["sum", "tokens"], "flat"),
        node("Transpose", ["flat"], "rows", perm=[0, 2, 1]),
        node("MatMul", ["rows", "query.w"], "query"),
        node("MatMul", ["query", "flat"], "products"),
        node("MatMul", ["stack", "products"], "stacked"),
        node("MatMul", ["stacked", "last.w"], "last"),
        node("GlobalAveragePool", ["grouped"], "mean"),
        node("Flatten", ["mean"], "means"),
        node("ReduceMean", ["means"], "one", keepdims=0),
        node("Add", ["last", "one"], "y"),
    ]
    weights = {
        "inner.w": random(1, 8, 4, 3, 3) / 4,
        "inner.b": random(2, 8),
        "grouped.w": random(3, 8, 2, 1, 1),
        "deep.w": random(4, 12, 8, 3, 3) / 6,
        "deep.b": random(5, 12),
        "scales": np.array([1, 1, 2, 2], np.float32),
        "shortcut.w": random(6, 8, 24, 1, 1) / 4,
        "shortcut.b": random(7, 8),
        "second.w": random(8, 8, 24, 3, 3) / 12,
        "tokens": np.array([0, 8, -1]),
        "query.w": random(9, 8, 8) / 3,
        "stack": random(10, 1, 36, 36) / 6,
        "last.w": random(11, 36, 5) / 6,
    }
    return graph_of(nodes, INPUTS, {"y": ["batch", 36, 5]}, weights)


CALLS = [{"x": random(seed, 2, 4, 6, 6) * np.float32(size)} for seed, size in ((0, 1), (1, 0.5), (2, 2))]
CONVS = {"inner", "grouped", "deep", "shortcut.part_0", "shortcut.part_1", "shortcut.part_2"} | {
    f"second.part_{k}" for k in range(3)
}
MATRICES = {"query", "last"}
