"""A timestep that is the same for the whole batch has one row, not B.

    Expand(timestep, (B,))  =  Reshape(timestep, (1,)), since all that follows broadcasts over rows

It makes what depends on the timestep alone depend on nothing else, and B times smaller.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ldm_export.graph.cpu.matching import Writer, replace


@dataclass(frozen=True)
class OneTimestep:
    name = "timestep"
    op_type = "Expand"

    def rewrite(self, expand: ir.Node) -> bool:
        timestep = expand.inputs[0]
        if timestep is None or not timestep.is_graph_input() or timestep.name != "timestep":
            return False
        if expand.outputs[0].is_graph_output():
            return False
        writer = Writer(expand)
        (row,) = writer.node("Reshape", [timestep, writer.constant(np.array([1], np.int64))])
        replace(expand.outputs[0], row)
        return True
