"""What the rules share: walking a graph from a value to what made it, and putting nodes in its place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from ldm_export.graph.base import Array

CONTRIB = "com.microsoft"
"""Operators that ONNX Runtime has beside ONNX's."""


def made_by(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node of this type that a value comes from; None if something else made it."""
    node = None if value is None else value.producer()
    return node if node is not None and (node.op_type, node.domain) == (op_type, "") else None


def transposed(value: ir.Value | None, *permutation: int) -> ir.Value | None:
    """What a Transpose with this permutation makes ``value`` of."""
    node = made_by(value, "Transpose")
    return node.inputs[0] if node is not None and ints(node, "perm") == permutation else None


def constant(value: ir.Value | None) -> Array | None:
    """A value that is the same in every call."""
    tensor = None if value is None else value.const_value
    return None if tensor is None else tensor.numpy()


def number(value: ir.Value | None) -> float | None:
    """A constant of one element."""
    found = constant(value)
    return float(found.reshape(())) if found is not None and found.size == 1 else None


def static_shape(value: ir.Value | None) -> tuple[int | str | None, ...] | None:
    """A value's shape, as far as it is known: numbers, names, None; None if not even its rank is."""
    if value is None or value.shape is None:
        return None
    return tuple(side if isinstance(side, int) else side.value for side in value.shape)


def may_be(found: int | str | None, wanted: int | str | None) -> bool:
    """Whether two sides can be the same: not if both are numbers and differ, or one is 1 and the other has a name."""
    if isinstance(found, int) and isinstance(wanted, int):
        return found == wanted
    return found is None or wanted is None or 1 not in (found, wanted)


def ints(node: ir.Node, name: str) -> tuple[int, ...]:
    attribute = node.attributes.get(name)
    return () if attribute is None else tuple(attribute.as_ints())


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, each once; the graph itself, of which it may be an output, is none."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def only_reader(value: ir.Value, op_type: str) -> ir.Node | None:
    """The one node that reads a value, if it has this type and nothing else does."""
    found = readers(value)
    alone = len(found) == 1 and not value.is_graph_output()
    return found[0] if alone and (found[0].op_type, found[0].domain) == (op_type, "") else None


class Writer:
    """Puts nodes into a graph, in front of one that is there, with names that begin with that node's output's."""

    def __init__(self, at: ir.Node):
        assert isinstance(at.graph, ir.Graph)
        self._graph, self._at = at.graph, at
        self._prefix, self._count = str(at.outputs[0].name), 0

    def constant(self, array: Array) -> ir.Value:
        """An initializer."""
        value = ir.Value(name=self._name("constant"), const_value=ir.tensor(np.ascontiguousarray(array)))
        value.shape, value.dtype = ir.Shape(array.shape), ir.DataType.from_numpy(array.dtype)
        self._graph.register_initializer(value)
        return value

    def node(
        self,
        op_type: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> Sequence[ir.Value]:
        """A node; gives its outputs."""
        made = ir.node(op_type, list(inputs), dict(attributes or {}), domain=domain, num_outputs=outputs)
        for number, value in enumerate(made.outputs):
            value.name = self._name(f"{op_type}_{number}")
        self._put(made)
        return made.outputs

    def _put(self, node: ir.Node) -> None:
        self._graph.insert_before(self._at, node)

    def _name(self, what: str) -> str:
        self._count += 1
        return f"{self._prefix}.{what}_{self._count}"


class Branch(Writer):
    """Puts nodes into a new graph, a branch of an If that will stand in front of a node that is there."""

    def __init__(self, at: ir.Node, name: str):
        self._graph = ir.Graph((), (), nodes=(), name=name)
        self._prefix, self._count = f"{at.outputs[0].name}.{name}", 0

    def graph(self, output: ir.Value) -> ir.Graph:
        """The whole branch, which gives ``output``."""
        self._graph.outputs.append(output)
        return self._graph

    def _put(self, node: ir.Node) -> None:
        self._graph.append(node)


def replace(old: ir.Value, new: ir.Value) -> None:
    """Let everything that read ``old``, the graph's outputs included, read ``new``, which has the same shape."""
    if old.is_graph_output():
        old.name, new.name = f"{old.name}.before", old.name
    new.type, new.shape = old.type, old.shape
    ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)


def remove_unused(model: ir.Model) -> None:
    """Take out, in place, the nodes and initializers that nothing reads."""
    while True:
        branching = [node for node in model.graph if any(_branches(node))]
        RemoveUnusedNodesPass()(model)
        gone = [node for node in branching if node.graph is None]
        for inner in (inner for node in gone for branch in _branches(node) for inner in branch):
            for index in range(len(inner.inputs)):  # the pass counts them as readers still
                inner.replace_input_with(index, None)
        if not gone:
            return


def _branches(node: ir.Node) -> list[ir.Graph]:
    return [attribute.as_graph() for attribute in node.attributes.values() if attribute.type == ir.AttributeType.GRAPH]
