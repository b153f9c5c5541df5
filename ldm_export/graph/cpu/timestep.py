"""A timestep that is the same for the whole batch has one row, not B.

    Expand(timestep, (B,))  =  Reshape(timestep, (1,)), where all that follows works row by row and then broadcasts

It makes what depends on the timestep alone depend on nothing else, and B times smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ldm_export.graph.cpu.matching import Writer, replace, sides
from ldm_export.graph.cpu.rule import RefusedError

_ELEMENTS = (
    "Add",
    "Cast",
    "Cos",
    "Div",
    "Gelu",
    "Identity",
    "Mul",
    "Neg",
    "Pow",
    "Relu",
    "Sigmoid",
    "Sin",
    "Sub",
    "Tanh",
)
_ROWS = ("Concat", "Gemm", "LayerNormalization", "MatMul", "Pad", "Slice", "Split", "Squeeze", "Unsqueeze")
ROW_BY_ROW = frozenset((*_ELEMENTS, *_ROWS))
"""Operators that make of one row what they make of each of B, their other inputs being the same for all rows."""
BROADCAST = frozenset(("Add", "Div", "Mul", "Sub"))


@dataclass(frozen=True)
class OneTimestep:
    name = "timestep"
    op_type = "Expand"

    def rewrite(self, expand: ir.Node) -> bool:
        timestep = expand.inputs[0]
        if timestep is None or not timestep.is_graph_input() or timestep.name != "timestep":
            return False
        if sides(timestep) != () or len(sides(expand.outputs[0]) or ()) != 1:
            return False
        rows = rows_of(expand)
        writer = Writer(expand)
        (row,) = writer.node("Reshape", [timestep, writer.constant(np.array([1], np.int64))])
        replace(expand.outputs[0], row)
        for value in (row, *rows):
            value.shape = ir.Shape([1, *(sides(value) or ())[1:]])
        return True


def rows_of(expand: ir.Node) -> list[ir.Value]:
    """What is made of the timestep's rows alone, row by row: (B, ...) each.

    Raises
    ------
    RefusedError
        If one of them is an output, or is read by what may tell one row from B.
    """
    first = expand.outputs[0]
    batch = (sides(first) or (None,))[0]
    if not isinstance(batch, str):
        raise RefusedError("its number of rows has no name")
    rows: dict[ir.Value, None] = {first: None}
    assert expand.graph is not None
    fixed: set[ir.Value] = set()  # such as weights that are integers in the file
    for node in expand.graph:
        unlike = [one for one in node.inputs if one is not None and one.const_value is None and one not in fixed]
        if not unlike:
            fixed.update(node.outputs)
        others = [one for one in unlike if one not in rows]
        if len(others) == len(unlike):
            continue
        allowed = BROADCAST if others else ROW_BY_ROW
        of_batch = [*others, *node.outputs]  # where there are others, broadcasting must give what it gave
        ranks = {len(sides(value) or ()) for value in of_batch}
        if (
            node.op_type not in allowed
            or len(ranks) > 1
            or any((sides(one) or (None,))[0] != batch for one in of_batch)
        ):
            raise RefusedError(f"{node.op_type} may tell its one row from many")
        if not others:
            rows.update(dict.fromkeys(node.outputs))
    if outputs := [value.name for value in rows if value.is_graph_output()]:
        raise RefusedError(f"its rows are the output {outputs[0]}")
    return list(rows)[1:]
