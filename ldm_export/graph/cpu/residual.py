"""A residual, its bias and the LayerNorm behind it, in one pass over memory.

y = LayerNorm(x + (h + b)),  x + (h + b) being read again   =   SkipLayerNormalization(x, h; gamma, beta, b)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from ldm_export.graph.cpu.matching import CONTRIB, Writer, constant, made_by, readers, replace


@dataclass(frozen=True)
class FuseResidual:
    name = "residual"
    op_type = "LayerNormalization"

    def rewrite(self, norm: ir.Node) -> bool:
        add = made_by(norm.inputs[0], "Add")
        axis = norm.attributes.get("axis")
        last = axis is None or axis.as_int() == -1
        gamma, beta = (constant(value) for value in (*norm.inputs[1:3], None, None)[:2])
        if add is None or not last or gamma is None or beta is None or constant(add.inputs[1]) is not None:
            return False
        skip, hidden = add.inputs
        bias = None
        for one, other in ((add.inputs[1], add.inputs[0]), (add.inputs[0], add.inputs[1])):
            inner = made_by(one, "Add")
            found = None if inner is None else constant(inner.inputs[1])
            if inner is not None and found is not None and found.ndim == 1 and one is not None and len(readers(one)) == 1:
                skip, hidden, bias = other, inner.inputs[0], inner.inputs[1]
                break
        writer = Writer(add)
        zeros = writer.constant(np.zeros(gamma.shape, np.float32)) if bias is None else bias
        epsilon = norm.attributes["epsilon"].as_float() if "epsilon" in norm.attributes else 1e-5
        made = writer.node(
            "SkipLayerNormalization",
            [hidden, skip, norm.inputs[1], norm.inputs[2], zeros],
            {"epsilon": epsilon},
            domain=CONTRIB,
            outputs=4,
        )
        made[1].name = made[2].name = ""
        replace(norm.outputs[0], made[0])
        replace(add.outputs[0], made[3])
        return True
