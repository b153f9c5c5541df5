"""Branches beside the layers of a graph, for adapters that are given when it runs (LoRA, 2106.09685, equation 3).

    y = W x  becomes  y = W x + up (down x)

The factors are inputs of the graph, so that what one session draws changes with what it is given, and each row of a
call has its own mixture of adapters. The names of a layer's inputs are `ldm_export.contract.branch_input`'s; their
shapes

    of a linear layer   down (rows or 1, ..., in, rank)   up (rows or 1, ..., rank, out)

with as many axes as what the layer reads, the strength being in ``down``. Where that has two axes, and of convolutions,
which take one weight for all rows, the adapters of all rows lie side by side along the rank, and each row has a scale
for every rank: y = W x + up (scale * (down x)),

    of a linear layer   down (in, rank)           up (rank, out)        scale (rows, rank)
    of a convolution    down (rank, in, kh, kw)   up (out, rank, 1, 1)  scale (rows, rank, 1, 1)

A layer that some adapter scales (DoRA, 2402.09353) also has an input gain, (rows or 1, ..., out), or of a convolution
(rows or 1, out, 1, 1), 1 where none does: y' = gain * y, but for the bias.

Everything is in standard operators and float32.
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import onnx_ir as ir

from ldm_export.contract import TensorSpec, branch_input, is_branch_input
from ldm_export.errors import ExportError
from ldm_export.graph.layers import LayerProduct, layers_of

FLOAT = ir.DataType.FLOAT


def add_branches(model: ir.Model, layers: Collection[str], scaled: Collection[str] = ()) -> list[TensorSpec]:
    """Put a branch beside each of these layers, in place; gives the graph's new inputs.

    Parameters
    ----------
    scaled : those among them that have a gain

    Raises
    ------
    ExportError
        If one of them is not in the graph, or reads something whose axes are not known.
    """
    found = layers_of(model)
    if missing := sorted(set(layers) - found.keys()):
        raise ExportError(f"The graph has no layer {missing[0]!r} that a branch can be put beside.")
    specs = []
    for name in sorted(layers):
        specs += _add_branch(model.graph, name, found[name], gain=name in scaled)
    return specs


def branch_specs(file: Path) -> list[TensorSpec]:
    """The inputs of branches that a graph's file has."""
    inputs = ir.load(file).graph.inputs
    return [
        TensorSpec(
            str(value.name),
            "float32",
            tuple(size if isinstance(size, int) else str(size.value) for size in value.shape or ()),
        )
        for value in inputs
        if is_branch_input(str(value.name))
    ]


def _add_branch(graph: ir.Graph, name: str, layer: LayerProduct, *, gain: bool) -> list[TensorSpec]:
    x, y, nodes = layer.x, layer.y, list[ir.Node]()  # branches that were put in before may have changed them
    if x is None or y is None or x.shape is None:
        raise ExportError(f"What {name} reads has axes that are not known. Export the bundle anew.")
    out, into, *kernel = layer.shape
    rank, axes = f"{name}.rank", len(x.shape)
    shapes: dict[str, tuple[int | str, ...]]
    if kernel:
        shapes = {"down": (rank, into, *kernel), "up": (out, rank, 1, 1), "scale": ("batch", rank, 1, 1)}
    elif axes == 2:
        shapes = {"down": (into, rank), "up": (rank, out), "scale": ("batch", rank)}
    else:
        leading: tuple[int | str, ...] = (f"{name}.rows", *[1] * (axes - 3))
        shapes = {"down": (*leading, into, rank), "up": (*leading, rank, out)}
    if gain:
        shapes["gain"] = (f"{name}.gains", out, 1, 1) if kernel else (f"{name}.gains", *[1] * (axes - 2), out)
    inputs = {role: _input(graph, branch_input(name, role), shape) for role, shape in shapes.items()}

    def node(op_type: str, *values: ir.Value, **attributes: int) -> ir.Value:
        made = ir.node(op_type, list(values), attributes, name=f"{name}.{op_type}_{len(nodes)}")
        made.outputs[0].name = f"{made.name}.out"
        nodes.append(made)
        return made.outputs[0]

    own_type = x.dtype or FLOAT
    if own_type != FLOAT:
        x = node("Cast", x, to=int(FLOAT))
    product = "Conv" if kernel else "MatMul"
    change = node(product, x, inputs["down"])
    if kernel:
        nodes[-1].attributes.update(layer.node.attributes)
    if "scale" in inputs:
        change = node("Mul", change, inputs["scale"])
    change = node(product, change, inputs["up"])
    if own_type != FLOAT:
        change = node("Cast", change, to=int(own_type))
    readers = list(y.uses())
    bias = layer.node.inputs[2] if gain and len(layer.node.inputs) > 2 else None
    if bias is not None and kernel:
        shape = ir.Value(name=f"{name}.bias_shape", const_value=ir.tensor([1, -1, 1, 1]))
        graph.register_initializer(shape)
        bias = node("Reshape", bias, shape)
    total = node("Add", y if bias is None else node("Sub", y, bias), change)
    if gain:
        total = node("Mul", total, inputs["gain"])
    if bias is not None:
        total = node("Add", total, bias)
    total.shape, total.type = y.shape, y.type
    maker = y.producer()
    assert maker is not None
    graph.insert_after(maker, nodes)
    if y.is_graph_output():
        y.name, total.name = f"{y.name}.before", y.name
    for reader, index in readers:
        reader.replace_input_with(index, total)
    graph.outputs[:] = [total if value is y else value for value in graph.outputs]
    return [TensorSpec(value.name or "", "float32", tuple(shapes[role])) for role, value in inputs.items()]


def _input(graph: ir.Graph, name: str, shape: tuple[int | str, ...]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(shape), type=ir.TensorType(FLOAT))
    graph.inputs.append(value)
    return value
