"""Half precision: weights and activations in fp16 or bf16, except where that would overflow or lose too much.

A shadow of the graph runs beside it on the calibration data: every operator once more, its inputs and its result
rounded to 16 bits. An operator whose values come near the largest number of the format, or whose shadow differs from
it by more than ``loss``, stays in fp32 between two casts; exactly those do. Inputs and outputs of the graph stay
float32. On a CPU this is a format for storage: ONNX Runtime has no fp16 kernels for x86 and casts back and forth.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

from ldm_export.errors import ExportError
from ldm_export.graph.base import CALLS_JUDGED, GraphChange, Inputs, Purpose, check_calibration, copied, spread
from ldm_export.graph.integers import array, initializers, remove_unused, tensor
from ldm_export.graph.running import outputs_of, watched, worst_error
from ldm_export.reading.options import check_between, check_one_of

FORMATS = {"fp16": (TensorProto.FLOAT16, 65504.0), "bf16": (TensorProto.BFLOAT16, 3.39e38)}
"""ONNX's type and the largest number."""
OPSETS = {"fp16": 1, "bf16": 22}
"""The first in which every operator takes the format; convolutions and norms of earlier ones have no bf16."""
HEADROOM = 8.0
"""How far the largest calibrated value must stay below the largest number."""
NUMPY = {"fp16": np.float16, "bf16": ml_dtypes.bfloat16}
GENERATIONS = 8
OWN_TYPE = {"Cast", "Constant", "ConstantOfShape", "Range", "RandomNormal", "EyeLike"}
"""Operators whose result is of a type of their own."""
HALF, EXACT = ".half", ".exact"
PARAMETERS_OF = {"Resize": (1, 2)}
"""Inputs that an operator takes as float32 alone."""

Convert = Callable[[str, str], list[onnx.NodeProto]]
"""Nodes that make one value of another, by their names."""


@dataclass(frozen=True)
class Half:
    """Options.

    Attributes
    ----------
    format : fp16 or bf16
    loss : how far an operator alone may be off, root mean square, as a share of its result
    """

    name: ClassVar[str] = "half"
    purpose: ClassVar[Purpose] = "bytes"
    targets: ClassVar[tuple[str, ...]] = ("gpu", "cpu")
    tolerance: ClassVar[float] = 0.02

    format: str = "fp16"
    loss: float = 0.01
    graphs: tuple[str, ...] = ("text_encoder", "denoiser", "vae_decoder", "vae_encoder")

    def __post_init__(self) -> None:
        check_one_of("format", self.format, tuple(FORMATS))
        check_between("loss", self.loss, 0.0, 1.0, inclusive=False)

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        check_calibration(model, calibration)
        kept = self._sensitive(model, calibration)
        changed = self._converted(model, kept)
        return GraphChange(changed, {"operators": len(model.graph.node), "kept_in_fp32": sorted(kept)})

    def _sensitive(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> set[str]:
        """First outputs of the operators that stay in fp32: those that overflow or lose too much; then, as long as the
        whole graph is off by more than ``loss``, also the operators that these read from, a generation at a time."""
        some = spread(calibration, CALLS_JUDGED)
        floats = float_values(model)
        kept = self._alone_too_lossy(model, floats, some)
        references = outputs_of(model, some)
        producers = {name: node for node in model.graph.node for name in node.output}
        for _ in range(GENERATIONS):
            error = worst_error(references, outputs_of(self._rounded(model, floats, kept), some))
            if error <= self.loss:
                return kept
            parents = [producers[name] for out in kept for name in producers[out].input if name in producers]
            kept |= {node.output[0] for node in parents if node.output[0] in floats}
        raise ExportError(
            f"In {self.format} the graph is off by {error:.2g} of its output even with {len(kept)} operators in fp32; "
            f"{self.loss:g} is allowed. Leave the pass {self.name} out for this model, or use another format."
        )

    def _alone_too_lossy(self, model: onnx.ModelProto, floats: set[str], calibration: Sequence[Inputs]) -> set[str]:
        shadowed = copied(model)
        nodes, rounded, watch = shadowed.graph.node, set[str](), list[str]()
        for node in model.graph.node:
            out = node.output[0]
            if out not in floats or not self._is_converted(node, floats):
                continue
            shadow = onnx.NodeProto()
            shadow.CopyFrom(node)
            for index in _float_inputs(node, floats):
                name = node.input[index]
                if name not in rounded:
                    rounded.add(name)
                    nodes.extend(self._round_trip(name, f"{name}.rounded"))
                shadow.input[index] = f"{name}.rounded"
            shadow.name = f"{node.name}.shadow"
            shadow.output[:] = [name and f"{name}.shadow" for name in node.output]  # "" is an output left out
            nodes.append(shadow)
            nodes.extend(self._round_trip(f"{out}.shadow", f"{out}.shadow_rounded"))
            nodes.append(helper.make_node("Sub", [out, f"{out}.shadow_rounded"], [f"{out}.off"]))
            nodes.append(helper.make_node("Abs", [out], [f"{out}.size"]))
            nodes.append(helper.make_node("ReduceSumSquare", [f"{out}.off"], [f"{out}.off_power"], keepdims=0))
            nodes.append(helper.make_node("ReduceSumSquare", [out], [f"{out}.power"], keepdims=0))
            nodes.append(helper.make_node("ReduceMax", [f"{out}.size"], [f"{out}.largest"], keepdims=0))
            watch.append(out)
        found = set()
        limit = FORMATS[self.format][1] / HEADROOM
        with watched(shadowed, [f"{out}.{part}" for out in watch for part in ("off_power", "power", "largest")]) as run:
            for call in calibration:
                values = dict(run(call))
                for out in watch:
                    off, power, largest = (float(values[f"{out}.{part}"]) for part in ("off_power", "power", "largest"))
                    if not (largest <= limit and off <= self.loss**2 * max(power, 1e-30)):  # true for NaN
                        found.add(out)
        return found

    def _rounded(self, model: onnx.ModelProto, floats: set[str], kept: set[str]) -> onnx.ModelProto:
        """The graph computing in fp32 on values that are rounded as the converted graph's are; for any format."""
        return _rewritten(
            model,
            floats,
            {node.output[0] for node in model.graph.node if not self._is_converted(node, floats)} | kept,
            narrow=self._round_trip,
            widen=lambda name, to: [helper.make_node("Identity", [name], [to])],
            rounds=True,
        )

    def _converted(self, model: onnx.ModelProto, kept: set[str]) -> onnx.ModelProto:
        """The graph in 16 bits; weights that 16-bit operators read are stored so."""
        kind, floats = FORMATS[self.format][0], float_values(model)
        changed = _rewritten(
            model,
            floats,
            {node.output[0] for node in model.graph.node if not self._is_converted(node, floats)} | kept,
            narrow=lambda name, to: [helper.make_node("Cast", [name], [to], f"{to}.narrow", to=kind)],
            widen=lambda name, to: [helper.make_node("Cast", [name], [to], f"{to}.widen", to=TensorProto.FLOAT)],
            rounds=False,
        )
        constants, nodes = initializers(changed), []
        for node in changed.graph.node:
            if node.name.endswith(".narrow") and node.input[0] in constants:
                weight = array(constants[node.input[0]])
                changed.graph.initializer.append(tensor(weight.astype(NUMPY[self.format]), node.output[0]))
            else:
                nodes.append(node)
        del changed.graph.node[:]
        changed.graph.node.extend(nodes)
        remove_unused(changed)
        opset = changed.opset_import[0]
        opset.version = max(opset.version, OPSETS[self.format])
        return changed

    def _is_converted(self, node: onnx.NodeProto, floats: set[str]) -> bool:
        """Whether an operator's type follows that of what it reads, and not an attribute."""
        return node.op_type not in OWN_TYPE and bool(_float_inputs(node, floats))

    def _round_trip(self, name: str, to: str) -> list[onnx.NodeProto]:
        kind = FORMATS[self.format][0]
        return [
            helper.make_node("Cast", [name], [f"{to}.narrow"], to=kind),
            helper.make_node("Cast", [f"{to}.narrow"], [to], to=TensorProto.FLOAT),
        ]


def float_values(model: onnx.ModelProto) -> set[str]:
    """Names of everything that is float32: inputs, weights and what operators give."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    values = (*inferred.value_info, *inferred.input, *inferred.output)
    return {value.name for value in values if value.type.tensor_type.elem_type == TensorProto.FLOAT} | {
        weight.name for weight in model.graph.initializer if weight.data_type == TensorProto.FLOAT
    }


def _float_inputs(node: onnx.NodeProto, floats: set[str]) -> list[int]:
    """Places of the inputs of a node that are float32 and may be narrower."""
    fixed = PARAMETERS_OF.get(node.op_type, ())
    return [index for index, name in enumerate(node.input) if name in floats and index not in fixed]


def _rewritten(
    model: onnx.ModelProto, floats: set[str], wide: set[str], *, narrow: Convert, widen: Convert, rounds: bool
) -> onnx.ModelProto:
    """The graph in which every value exists as ``name``, in fp32, as ``name.half``, or as both where both are read.

    Parameters
    ----------
    wide : first outputs of the operators that compute in fp32
    narrow, widen : make one of the other
    rounds : whether an operator's results are still to be narrowed
    """
    changed = copied(model)
    nodes: list[onnx.NodeProto] = []
    there = {value.name for value in model.graph.input} | {weight.name for weight in model.graph.initializer}

    def need(name: str, half: bool) -> str:
        wanted, other = (name + HALF, name) if half else (name, name + HALF)
        if wanted not in there:
            nodes.extend((narrow if half else widen)(other, wanted))
            there.add(wanted)
        return wanted

    for node in changed.graph.node:
        half = node.output[0] not in wide
        for index in _float_inputs(node, floats):
            node.input[index] = need(node.input[index], half)
        for index, name in enumerate(node.input):  # an input that must be float32, and may have been made narrow
            if name in floats and name not in there and not name.endswith(HALF):
                node.input[index] = need(name, half=False)
        nodes.append(node)
        for index, name in enumerate(node.output):
            if half and name in floats:
                node.output[index] = f"{name}{EXACT}" if rounds else name + HALF
                if rounds:
                    nodes.extend(narrow(node.output[index], name + HALF))
            there.add(name + HALF if half and name in floats else name)
    for value in model.graph.output:
        need(value.name, half=False)
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    del changed.graph.value_info[:]
    return changed
