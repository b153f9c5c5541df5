"""Weight-only integers: weights are stored in 8 or 4 bits and become numbers again before they are used.

    w = scale * q     8 bits: a scale an output channel;  4 bits: a scale for every block of inputs (opset 21)

Bytes fall to a quarter or, with a scale for every 32, to a sixth; time does not (ONNX Runtime on a CPU undoes it when
it loads, for MatMul when it runs, where it rounds activations too). With 4 bits each weight is tried alone: one that
moves the graph's output by too much gets 8 bits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
from onnx import TensorProto, helper

from ldm_export.errors import InputError
from ldm_export.graph.base import (
    CALLS_JUDGED,
    Array,
    GraphChange,
    Inputs,
    Purpose,
    check_calibration,
    copied,
    spread,
)
from ldm_export.graph.integers import (
    INT4_MAX,
    INT8_MAX,
    array,
    initializers,
    quantized,
    quantized_in_blocks,
    remove_unused,
    tensor,
    tensor_of_4_bits,
)
from ldm_export.graph.running import outputs_of, worst_error
from ldm_export.reading.options import check_between, check_least

BLOCKED_OPSET = 21
OUTPUT_AXIS = {"Conv": 0, "MatMul": 1, "Gemm": 0, "Gather": 0}
"""Axis of a weight's outputs, by the operator that reads it; of Gemm as the export writes it, the second factor being
transposed."""


@dataclass(frozen=True)
class QuantizeWeights:
    """Options.

    Attributes
    ----------
    bits : 8, or 4 where that is accurate enough
    layer_error : how far one weight in 4 bits may move the graph's output, root mean square, as a share of it
    block : weights that share a scale, with 4 bits
    smallest : weights with fewer elements stay as they are
    """

    name: ClassVar[str] = "quantize-weights"
    purpose: ClassVar[Purpose] = "bytes"
    targets: ClassVar[tuple[str, ...]] = ("cpu", "gpu")
    tolerance: ClassVar[float] = 0.3

    bits: int = 8
    layer_error: float = 0.02
    block: int = 32
    smallest: int = 1024
    graphs: tuple[str, ...] = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise InputError(f"bits = {self.bits} is not supported; allowed are 4 and 8.")
        check_between("layer_error", self.layer_error, 0.0, 1.0, inclusive=False)
        check_least("block", self.block, 2)
        check_least("smallest", self.smallest, 1)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        axes = {
            node.input[0 if node.op_type == "Gather" else 1]: OUTPUT_AXIS[node.op_type]
            for node in model.graph.node
            if node.op_type in OUTPUT_AXIS
        }
        chosen = {
            name: axes[name]
            for name, weight in initializers(model).items()
            if name in axes
            and weight.data_type == TensorProto.FLOAT
            and len(weight.dims) > 1  # a vector has no other axis to share a scale
            and np.prod(weight.dims) >= self.smallest
        }
        fine = set(chosen)
        if self.bits == 4:
            check_calibration(model, calibration)
            fine -= self._coarse_enough(model, chosen, calibration)
        changed = self._with_integers(model, chosen, fine)
        return GraphChange(changed, {"weights_of_8_bits": len(fine), "weights_of_4_bits": len(chosen) - len(fine)})

    def _coarse_enough(self, model: onnx.ModelProto, chosen: dict[str, int], calibration: Sequence[Inputs]) -> set[str]:
        """The weights that 4 bits are enough for, each tried with all others in fp32."""
        some = spread(calibration, CALLS_JUDGED)
        references = outputs_of(model, some)
        found = set()
        trial = copied(model)
        constants = initializers(trial)
        for name, axis in chosen.items():
            weight = array(constants[name])
            if self._blocked_axis(weight, axis) is None:
                continue
            kept = onnx.TensorProto()
            kept.CopyFrom(constants[name])
            constants[name].CopyFrom(tensor(self._coarse(weight, axis), name))
            if worst_error(references, outputs_of(trial, some)) <= self.layer_error:
                found.add(name)
            constants[name].CopyFrom(kept)
        return found

    def _blocked_axis(self, weight: Array, axis: int) -> int | None:
        """The axis of inputs, if whole blocks fit into it."""
        other = 1 if axis == 0 else 0
        return other if weight.shape[other] % self.block == 0 else None

    def _coarse(self, weight: Array, axis: int) -> Array:
        """The weight as 4 bits leave it."""
        other = self._blocked_axis(weight, axis)
        assert other is not None
        whole, scale = quantized_in_blocks(weight, other, self.block, INT4_MAX)
        return (whole * scale.repeat(self.block, axis=other)).astype(np.float32)

    def _with_integers(self, model: onnx.ModelProto, chosen: dict[str, int], fine: set[str]) -> onnx.ModelProto:
        changed = copied(model)
        constants = initializers(changed)
        nodes = []
        for name, axis in chosen.items():
            weight = array(constants[name])
            stored = [f"{name}.integer", f"{name}.scale"]
            if name in fine:
                whole, scale = quantized(weight, axis, INT8_MAX)
                attributes: dict[str, Any] = {"axis": axis}
                changed.graph.initializer.append(tensor(whole, stored[0]))
            else:
                other = self._blocked_axis(weight, axis)
                assert other is not None
                whole, scale = quantized_in_blocks(weight, other, self.block, INT4_MAX)
                attributes = {"axis": other, "block_size": self.block}
                changed.graph.initializer.append(tensor_of_4_bits(whole, stored[0]))
            changed.graph.initializer.append(tensor(scale, stored[1]))
            nodes.append(
                helper.make_node("DequantizeLinear", stored, [f"{name}.float"], f"{name}.dequantize", **attributes)
            )
        for node in changed.graph.node:
            for index, name in enumerate(node.input):
                if name in chosen:
                    node.input[index] = f"{name}.float"
        nodes += changed.graph.node
        del changed.graph.node[:]
        changed.graph.node.extend(nodes)
        remove_unused(changed)
        if len(fine) < len(chosen):
            changed.opset_import[0].version = max(BLOCKED_OPSET, changed.opset_import[0].version)
        return changed
