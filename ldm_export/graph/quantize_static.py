"""Static int8: QuantizeLinear and DequantizeLinear around every Conv and MatMul that is worth it.

    x ~ s (x_q - z), unsigned bytes, one s and z a tensor;  w ~ s_c w_q, 7 bits, one s_c an output channel

Ranges are calibrated over whole sampling trajectories and are aware of the timestep (Q-Diffusion, 2302.04304, section
4.2): every timestep gives equally many samples, and a range is the one with the least mean squared error where each
timestep's error is measured against its own power, so that quiet timesteps count as much as loud ones. A convolution
that reads a concatenation with a skip connection, whose two parts have ranges of their own, becomes a sum of two
(section 4.3, "split quantization").

Each operator is tried alone, on what the graph gives it: one that loses too much, or that is not faster here than in
fp32, stays as it is. Then the whole graph is compared with itself in fp32; where it is off by too much, those that lose
the most are put back, as few as bisection finds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx
import onnxruntime
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
from ldm_export.graph.integers import SAFE_MAX, array, initializers, quantized, remove_unused, tensor
from ldm_export.graph.running import outputs_of, session, watched, worst_error
from ldm_export.reading.options import check_between, check_one_of

CALLS = 64
"""Calibration calls that ranges are taken from."""
SAMPLES = 4096
"""Values of a tensor that are kept of each call."""
SHRINKS = np.linspace(1.0, 0.5, 26)
"""Shares of the whole range that are tried."""
TRIALS = 15
OPERATORS = {"Conv": 0, "MatMul": 1}
"""What can be quantized, with the axis of its weight's output channels."""

Range = tuple[float, int]
"""Scale and zero point."""


@dataclass(frozen=True)
class QuantizeStatic:
    """Options.

    Attributes
    ----------
    operators : Conv, MatMul or both; of MatMul those by a constant, which on a CPU are better off with quantize-dynamic
    layer_error : how far an operator alone may be off, root mean square, as a share of its own output
    graph_error : how far the graph's output may then be off, likewise
    only_faster : leave what is not faster on this machine in fp32
    """

    name: ClassVar[str] = "quantize-static"
    purpose: ClassVar[Purpose] = "speed"
    targets: ClassVar[tuple[str, ...]] = ("cpu", "gpu")
    tolerance: ClassVar[float] = 0.2

    operators: tuple[str, ...] = ("Conv", "MatMul")
    layer_error: float = 0.04
    graph_error: float = 0.1
    only_faster: bool = True
    graphs: tuple[str, ...] = ("denoiser", "vae_decoder")

    def __post_init__(self) -> None:
        check_between("layer_error", self.layer_error, 0.0, 1.0, inclusive=False)
        check_between("graph_error", self.graph_error, 0.0, 1.0, inclusive=False)
        if not self.operators:
            raise InputError(f"operators = [] quantizes nothing; allowed are {', '.join(OPERATORS)}.")
        for operator in self.operators:
            check_one_of("operators", operator, tuple(OPERATORS))

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange:
        check_calibration(model, calibration)
        divided = copied(model)
        parts = split_concatenations(divided)
        constants = initializers(divided)
        nodes = [
            node for node in divided.graph.node if node.op_type in self.operators and _is_by_a_constant(node, constants)
        ]
        ranges = _ranges(divided, nodes, spread(calibration, CALLS))
        beyond = [node for node in nodes if not _bias_fits(node, constants, ranges[node.input[0]][0])]
        nodes = [node for node in nodes if node not in beyond]
        judged = spread(calibration, CALLS_JUDGED)
        references, errors, faster = _tried_alone(divided, nodes, ranges, judged, timed=self.only_faster)
        slower = [node.output[0] for node in nodes if not faster[node.output[0]]]
        coarse = [out for out, error in errors.items() if faster[out] and not error <= self.layer_error]  # or NaN
        fit = sorted(
            (node for node in nodes if node.output[0] not in {*slower, *coarse}),
            key=lambda node: errors[node.output[0]],
        )

        def with_integers(kept: Sequence[onnx.NodeProto]) -> onnx.ModelProto:
            whole = copied(model)
            split_concatenations(whole, only=_worth_it(kept, parts))
            return _with_integers(whole, kept, ranges)

        count, changed, error = self._as_many_as_fit(fit, with_integers, references, judged)
        report = {
            "quantized": count,
            "not_faster": slower,
            "not_accurate": coarse,
            "bias_beyond_32_bits": [node.output[0] for node in beyond],
            "put_back": [node.output[0] for node in fit[count:]],
            "split": len(_worth_it(fit[:count], parts)),
            "error": error,
        }
        return GraphChange(changed, report)

    def _as_many_as_fit(
        self,
        nodes: Sequence[onnx.NodeProto],
        with_integers: Callable[[Sequence[onnx.NodeProto]], onnx.ModelProto],
        references: Sequence[Sequence[Array]],
        calls: Sequence[Inputs],
    ) -> tuple[int, onnx.ModelProto, float]:
        """How many of these, the first first, the whole graph is accurate enough with; that graph, and its error."""
        count, too_many = 0, len(nodes) + 1
        changed, error = with_integers([]), 0.0
        middle = len(nodes)  # most often all of them
        while too_many - count > 1:
            trial = with_integers(nodes[:middle])
            off = worst_error(references, outputs_of(trial, calls))
            if off <= self.graph_error:
                count, changed, error = middle, trial, off
            else:
                too_many = middle
            middle = (count + too_many) // 2
        return count, changed, error


def _is_by_a_constant(node: onnx.NodeProto, constants: Mapping[str, TensorProto]) -> bool:
    """Whether an operator has a weight and perhaps a bias, in fp32; the weight of a MatMul must be a matrix."""
    known = [constants.get(name) for name in node.input[1:]]
    if any(constant is None or constant.data_type != TensorProto.FLOAT for constant in known):
        return False
    return node.op_type != "MatMul" or len(constants[node.input[1]].dims) == 2


def _bias_fits(node: onnx.NodeProto, constants: Mapping[str, TensorProto], scale_x: float) -> bool:
    """Whether the bias is a 32-bit integer in units of the products; not if a channel has next to no weights."""
    if len(node.input) < 3:
        return True
    _, scale = quantized(array(constants[node.input[1]]), OPERATORS[node.op_type], SAFE_MAX)
    whole = np.rint(array(constants[node.input[2]]) / (scale * np.float32(scale_x)).astype(np.float64))
    return bool((np.abs(whole) < 2.0**31).all())


def _worth_it(kept: Sequence[onnx.NodeProto], parts: Mapping[str, Sequence[str]]) -> set[str]:
    """The convolutions of which a part at least is among these."""
    outputs = {node.output[0] for node in kept}
    return {convolution for convolution, of_it in parts.items() if outputs.intersection(of_it)}


def split_concatenations(model: onnx.ModelProto, only: Collection[str] | None = None) -> dict[str, list[str]]:
    """Conv(Concat(a, b), W) = Conv(a, W_a) + Conv(b, W_b), in place, of all or ``only`` those with these outputs.

    Gives the outputs of the parts by the output of their sum.
    """
    constants = initializers(model)
    producers = {name: node for node in model.graph.node for name in node.output}
    inferred = onnx.shape_inference.infer_shapes(model)
    channels = {
        value.name: value.type.tensor_type.shape.dim[1].dim_value
        for value in (*inferred.graph.value_info, *inferred.graph.input)
        if len(value.type.tensor_type.shape.dim) == 4
    }
    nodes, done = [], {}
    for node in model.graph.node:
        source = producers.get(node.input[0]) if node.op_type == "Conv" else None
        weight = constants.get(node.input[1]) if source is not None else None
        attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        parts = list(source.input) if source is not None and source.op_type == "Concat" else []
        sizes = [channels.get(name, 0) for name in parts]
        fits = weight is not None and all(sizes) and attributes.get("group", 1) == 1 and sum(sizes) == weight.dims[1]
        if weight is None or not fits or (only is not None and node.output[0] not in only):
            nodes.append(node)
            continue
        pieces = np.split(array(weight), np.cumsum(sizes)[:-1], axis=1)
        outs = done[node.output[0]] = [f"{node.output[0]}.part_{index}" for index in range(len(parts))]
        for index, (part, piece) in enumerate(zip(parts, pieces, strict=True)):
            name = f"{node.input[1]}.part_{index}"
            model.graph.initializer.append(tensor(piece, name))
            bias = list(node.input[2:]) if index == 0 else []
            nodes.append(helper.make_node("Conv", [part, name, *bias], [outs[index]], outs[index], **attributes))
        nodes.append(helper.make_node("Sum", outs, list(node.output), f"{node.output[0]}.sum"))
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    remove_unused(model)
    return done


def _ranges(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], calibration: Sequence[Inputs]) -> dict[str, Range]:
    """The range of every input and output of these operators."""
    names = [name for node in nodes for name in (node.input[0], node.output[0])]
    samples: dict[str, list[Array]] = {name: [] for name in names}
    generator = np.random.default_rng(0)
    with watched(model, names) as values:
        for call in calibration:
            for name, value in values(call):
                flat = value.reshape(-1)
                some = flat if flat.size <= SAMPLES else flat[generator.integers(flat.size, size=SAMPLES)]
                samples[name].append(np.append(some, [flat.min(), flat.max()]))
    return {name: best_range(parts) for name, parts in samples.items()}


def best_range(parts: Sequence[Array]) -> Range:
    """The range of unsigned bytes with the least error over samples of several timesteps, each against its own power.

    It always holds 0, which padding is made of.
    """
    low, high = min(0.0, *(float(part.min()) for part in parts)), max(0.0, *(float(part.max()) for part in parts))
    if high == low:
        return 1.0, 0
    best, least = (1.0, 0), np.inf
    for shrink in SHRINKS:
        scale = float(np.float32((high - low) * shrink / 255))
        zero = int(np.clip(np.rint(-low * shrink / scale), 0, 255))
        error = 0.0
        for part in parts:
            redone = scale * (np.clip(np.rint(part / scale) + zero, 0, 255) - zero)
            error += float(((redone - part) ** 2).mean() / max(float((part**2).mean()), 1e-12))
        if error < least:
            best, least = (scale, zero), error
    return best


def _with_integers(
    model: onnx.ModelProto, chosen_nodes: Sequence[onnx.NodeProto], ranges: Mapping[str, Range]
) -> onnx.ModelProto:
    """A copy of the graph in which these operators run on integers."""
    changed = copied(model)
    constants, chosen = initializers(changed), {node.output[0] for node in chosen_nodes}
    nodes: list[onnx.NodeProto] = []
    integers: set[str] = set()

    def add(values: Array, name: str) -> str:
        if name not in initializers(changed):  # a weight that several operators read is stored once
            changed.graph.initializer.append(tensor(values, name))
        return name

    def quantize(x: str, range_of: str, to: str) -> None:
        scale, zero = ranges[range_of]
        parts = [add(np.float32(scale), f"{to}.scale"), add(np.uint8(zero), f"{to}.zero_point")]
        nodes.append(helper.make_node("QuantizeLinear", [x, *parts], [f"{to}.quantized"], f"{to}.quantize"))
        nodes.append(
            helper.make_node("DequantizeLinear", [f"{to}.quantized", *parts], [f"{to}.dequantized"], f"{to}.dequantize")
        )

    for node in changed.graph.node:
        if node.output[0] not in chosen:
            nodes.append(node)
            continue
        x, out = node.input[0], node.output[0]
        if x not in integers:
            integers.add(x)
            quantize(x, x, f"{x}.input")
        weight, bias = _integer_constants(add, nodes, node, constants, ranges[x][0])
        integer = onnx.NodeProto()
        integer.CopyFrom(node)
        del integer.input[:]
        integer.input.extend([f"{x}.input.dequantized", weight, *bias])
        integer.output[0] = f"{out}.float"
        nodes.append(integer)
        quantize(f"{out}.float", out, out)
        nodes[-1].output[0] = out
    del changed.graph.node[:]
    changed.graph.node.extend(nodes)
    remove_unused(changed)
    return changed


def _integer_constants(
    add: Any, nodes: list[onnx.NodeProto], node: onnx.NodeProto, constants: Mapping[str, TensorProto], scale_x: float
) -> tuple[str, list[str]]:
    """An operator's weight as 7-bit and its bias as 32-bit integers, with what makes numbers of them again."""
    out, name, axis = node.output[0], node.input[1], OPERATORS[node.op_type]
    whole, scale = quantized(array(constants[name]), axis, SAFE_MAX)
    parts = [add(whole, f"{name}.integer"), add(scale, f"{name}.scale")]
    nodes.append(
        helper.make_node("DequantizeLinear", parts, [f"{out}.weight_float"], f"{out}.dequantize_weight", axis=axis)
    )
    if len(node.input) < 3:
        return f"{out}.weight_float", []
    bias_scale = scale * np.float32(scale_x)
    bias = np.rint(array(constants[node.input[2]]) / bias_scale).astype(np.int32)
    parts = [add(bias, f"{out}.bias"), add(bias_scale, f"{out}.bias_scale")]
    nodes.append(helper.make_node("DequantizeLinear", parts, [f"{out}.bias_float"], f"{out}.dequantize_bias", axis=0))
    return f"{out}.weight_float", [f"{out}.bias_float"]


def _tried_alone(
    model: onnx.ModelProto,
    nodes: Sequence[onnx.NodeProto],
    ranges: Mapping[str, Range],
    calls: Sequence[Inputs],
    *,
    timed: bool,
) -> tuple[list[list[Array]], dict[str, float], dict[str, bool]]:
    """The graph's outputs for each call; and by each operator's output, how far it is off on integers, on what it
    reads in the worst of them, and whether it is then faster, where that is ``timed``."""
    constants, own = initializers(model), [value.name for value in model.graph.output]
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in nodes:
        readers.setdefault(node.input[0], []).append(node)
    references: list[list[Array]] = []
    errors = {node.output[0]: 0.0 for node in nodes}
    kinds: dict[Hashable, bool] = {}
    faster = {node.output[0]: True for node in nodes}
    with watched(model, [*readers, *own]) as values:
        for call in calls:
            results = {}
            for name, x in values(call):
                if name in own:
                    results[name] = x
                for node in readers.get(name, ()):
                    out, given = node.output[0], {name: x}
                    sides = _alone(model, node, constants, ranges, x.shape)
                    results_of = [[side.run(None, given)] for side in sides]
                    errors[out] = float(np.maximum(errors[out], worst_error(*results_of)))  # NaN if one is
                    kind = _kind(node, constants, x.shape)
                    if timed and kind not in kinds:
                        kinds[kind] = _is_faster(*sides, given)
                    faster[out] &= kinds.get(kind, True)
            references.append([results[name] for name in own])
    return references, errors, faster


def _alone(
    model: onnx.ModelProto,
    node: onnx.NodeProto,
    constants: Mapping[str, TensorProto],
    ranges: Mapping[str, Range],
    shape: Sequence[int],
) -> tuple[onnxruntime.InferenceSession, onnxruntime.InferenceSession]:
    """One operator as it is, and on integers with what it takes to get into them and out."""
    given = helper.make_tensor_value_info(node.input[0], TensorProto.FLOAT, shape)
    made = helper.make_empty_tensor_value_info(node.output[0])
    graph = helper.make_graph([node], "one", [given], [made], [constants[name] for name in node.input[1:]])
    plain = helper.make_model(graph, opset_imports=model.opset_import, ir_version=model.ir_version)
    return session(plain), session(_with_integers(plain, [node], ranges))


def _kind(node: onnx.NodeProto, constants: Mapping[str, TensorProto], shape: Sequence[int]) -> Hashable:
    """What an operator's time depends on."""
    attributes = sorted(attribute.SerializeToString(deterministic=True) for attribute in node.attribute)
    sizes = [tuple(constants[name].dims) for name in node.input[1:]]
    return node.op_type, tuple(shape), tuple(sizes), tuple(attributes)


def _is_faster(plain: onnxruntime.InferenceSession, integer: onnxruntime.InferenceSession, call: Inputs) -> bool:
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(TRIALS):
        for spent, side in zip(times, (plain, integer), strict=True):
            started = time.perf_counter()
            side.run(None, dict(call))
            spent.append(time.perf_counter() - started)
    return min(times[1]) < min(times[0])
