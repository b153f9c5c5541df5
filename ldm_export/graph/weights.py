"""Weights of a graph that a pass has written, compared one by one with those of the graph that it was made from.

    integers q with the scale s of their channel or block:    |w - s q| <= s / 2
    16 bits h, whose significand has p bits:                  |w - h| <= |w| / 2^p
    everything else, integers that are shapes included:       equal

This takes no data, and no weight is too unimportant for it: one layer lost among a hundred moves a graph's output by
less than rounding all of them does. Weights are compared in the order in which operators read them, which passes keep,
so that a weight in another one's place is found, too.

What rounding costs together, activations included, is judged on calls, as a signal-to-noise ratio of the outputs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx_ir as ir

from ldm_export.errors import ParityError
from ldm_export.graph.base import Array

ROUNDED = {ir.DataType.FLOAT16: (2.0**-11, 2.0**-25), ir.DataType.BFLOAT16: (2.0**-8, 2.0**-134)}
"""How far rounding to 16 bits moves a number: a share of it, and at least half of the smallest subnormal."""
SLACK = 2.0**-22
"""Share of s q by which float32 may round the quotient w / s, in units of s, and the scale itself."""
CODES = {"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Constant"}
"""Operators whose constants are no weights: how other values are coded."""

LEAST_SNR_DB = {"16 bits": 40.0, "weights of 8 bits": 26.0, "weights of 4 bits": 18.0, "dynamic": 24.0, "static": 17.0}
"""Least signal-to-noise ratio of an output whose graph has such numbers; the lowest of all that it has counts.

Measured on emoji64, the worst output of eight calls recorded over its drawings, against PyTorch: 54.2 dB in fp16, 32.5
with weights of 8 bits, 23.9 with those of 4, 30.1 with dynamic activations, 22.6 with static ones as well; 5 to 14 dB
above. One layer without its weights is often no louder than that: those are found one by one.
"""
SCALED = {"QuantizeLinear", "DequantizeLinear"}


@dataclass(frozen=True)
class Weight:
    """A constant that an operator reads, as the graph has it.

    Attributes
    ----------
    name : of the tensor that holds its numbers
    read : gives its values, float64 where they were rounded, and how far each of them may be from what it was rounded
        from, of a shape that broadcasts to theirs
    """

    name: str
    read: Callable[[], tuple[Array, Array]]


def check_weights(before: ir.Model, after: ir.Model, graph: str) -> int:
    """Compare every constant that an operator reads; gives their number.

    Raises
    ------
    ParityError
        If one is off by more than its rounding, or one of the two graphs has a constant more than the other.
    """
    count = 0
    for node in after.graph.all_nodes():
        scale = _tensor(node.inputs[1]) if node.op_type in SCALED else None
        if scale is not None and not (scale.numpy().astype(np.float64) > 0).all():
            raise ParityError(f"{graph}: the scale {scale.name!r} is not positive. Nothing was kept.")
    for source, stored in zip_longest(stored_weights(before), stored_weights(after)):
        if source is None or stored is None:
            raise ParityError(
                f"{graph}: {(source or stored).name!r} is in one alone of the graph and the graph that it was made of, "
                "and cannot be compared. Nothing was kept."
            )
        values, (stored_values, allowed) = source.read()[0], stored.read()
        if not is_rounded_from(values, stored_values, allowed):
            raise ParityError(
                f"{graph}: {stored.name!r} is not {source.name!r} of the graph that it was made of: a value of shape "
                f"{stored_values.shape} is off by more than rounding moves it. Nothing was kept."
            )
        count += 1
    return count


def missing_weights(model: ir.Model, weights: Mapping[str, Array]) -> list[str]:
    """Names of those weights, float32, that a graph has nowhere: neither as they are nor transposed, equal or rounded.

    What the graph has once is the same as one weight only.
    """
    equal: Counter[bytes] = Counter()
    rounded: dict[tuple[int, ...], list[Weight]] = {}
    for stored in stored_weights(model):
        values, allowed = _without_ones(*stored.read())
        if allowed.any():
            rounded.setdefault(values.shape, []).append(stored)
        else:
            equal[_digest(values)] += 1
    missing = []
    for name, weight in weights.items():
        values = weight.squeeze()
        forms = [values, values.T] if values.ndim == 2 else [values]
        digest = next((digest for digest in map(_digest, forms) if equal[digest]), None)
        if digest is not None:
            equal[digest] -= 1
            continue
        candidates = ((form, stored) for form in forms for stored in rounded.get(form.shape, ()))
        found = next(
            (
                (form.shape, stored)
                for form, stored in candidates
                if is_rounded_from(form, *_without_ones(*stored.read()))
            ),
            None,
        )
        if found is None:
            missing.append(name)
        else:
            rounded[found[0]].remove(found[1])
    return missing


def _without_ones(values: Array, allowed: Array) -> tuple[Array, Array]:
    """Without axes of one element, which exporters add, as to a norm's scale."""
    return values.squeeze(), np.broadcast_to(allowed, values.shape).squeeze()


def _digest(values: Array) -> bytes:
    """SHA-256 of dtype, shape and numbers."""
    return hashlib.sha256(f"{values.dtype} {values.shape}".encode() + values.tobytes()).digest()


def least_snr_db(model: ir.Model, *, weights: bool = True) -> float | None:
    """Least signal-to-noise ratio, in dB, that outputs of such a graph may have; None where its numbers are exact.

    Parameters
    ----------
    weights : false for a graph that is compared with another one of the same rounded weights
    """
    types = {value.dtype for value in model.graph.initializers.values()}
    operators = {node.op_type for node in model.graph.all_nodes()}
    has = {
        "16 bits": bool(types & ROUNDED.keys()),
        "weights of 8 bits": weights and ir.DataType.INT8 in types,
        "weights of 4 bits": weights and ir.DataType.INT4 in types,
        "dynamic": "DynamicQuantizeLinear" in operators,
        "static": "QuantizeLinear" in operators,
    }
    return min((LEAST_SNR_DB[name] for name, found in has.items() if found), default=None)


def is_rounded_from(values: Array, stored: Array, allowed: Array) -> bool:
    """Whether every stored value is as near as is ``allowed``; NaN is near to nothing."""
    if values.shape != stored.shape:
        return False
    with np.errstate(invalid="ignore"):  # two infinities, as masks have them, are equal
        distance = np.abs(np.subtract(values, stored, dtype=np.float64))  # of whole numbers, too, which would overflow
        return bool(((values == stored) | (distance <= allowed)).all())


def stored_weights(model: ir.Model) -> Iterator[Weight]:
    """Constants that operators read, in the order in which they do; one that several read is given as often.

    A convolution that was divided along its inputs into a sum (:mod:`ldm_export.graph.quantize_static`) reads one.
    """
    parts = _divided(model)
    for node in model.graph.all_nodes():
        if node.op_type in CODES or _is_cast_constant(node) or _joins_scales(node):
            continue
        for place, value in enumerate(node.inputs):
            weight = _weight(value)
            if weight is None or (node.op_type == "MatMulInteger" and place != 1):  # those are zero points
                continue
            if node.op_type == "MatMulInteger":
                weight = _integers(node.inputs[1], _integer_scale(node), node.inputs[3], axis=1)
            if node in parts and place == 1:
                if parts[node][0] is not node:
                    continue
                weight = _joined([_weight(part.inputs[1]) for part in parts[node]])
            yield weight


def _weight(value: ir.Value | None) -> Weight | None:
    """What a value is, if that is a constant or made of one."""
    if value is None:
        return None
    if (tensor := _tensor(value)) is not None:
        return Weight(str(value.name), partial(_read_plain, tensor))
    node = value.producer()
    if node is not None and node.op_type == "Cast":
        return _weight(node.inputs[0])
    if node is None or node.op_type != "DequantizeLinear" or _weight(node.inputs[0]) is None:
        return None
    axis, block = (node.attributes.get_int(name, default) for name, default in (("axis", 1), ("block_size", 0)))
    return _integers(node.inputs[0], node.inputs[1], node.inputs[2] if len(node.inputs) > 2 else None, axis, block)


def _integers(
    whole: ir.Value | None, scale: ir.Value | None, zero: ir.Value | None, axis: int, block: int = 0
) -> Weight:
    """Integers with their scales and zero points, which are 0 where there are none."""
    tensors = _constant(whole), _constant(scale), None if zero is None else _constant(zero)
    return Weight(str(tensors[0].name), partial(_read_integers, *tensors, axis, block))


def _constant(value: ir.Value | None) -> ir.TensorProtocol:
    """The constant that a value is, rounded or not."""
    while (tensor := _tensor(value)) is None and value is not None:
        node = value.producer()
        value = node.inputs[0] if node is not None and node.op_type == "Cast" else None
    if tensor is None:
        raise ParityError("A weight's integers or scales are no constants and cannot be compared. Nothing was kept.")
    return tensor


def _tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    return None if value is None else ir.convenience.get_const_tensor(value)


def _read_plain(tensor: ir.TensorProtocol) -> tuple[Array, Array]:
    values = tensor.numpy()
    if tensor.dtype not in ROUNDED:
        return values, np.zeros(())
    values = values.astype(np.float64)
    share, least = ROUNDED[tensor.dtype]
    return values, np.abs(values) * share * (1 + 2 * share) + least  # of h, which may be nearer to 0 than w


def _read_integers(
    whole: ir.TensorProtocol, scale: ir.TensorProtocol, zero: ir.TensorProtocol | None, axis: int, block: int
) -> tuple[Array, Array]:
    values = whole.numpy().astype(np.float64)
    scales = _spread(scale.numpy().astype(np.float64), values.shape, axis, block)
    if zero is not None:
        values -= _spread(zero.numpy().astype(np.float64), values.shape, axis, block)
    values *= scales
    share = 2 * ROUNDED.get(scale.dtype, (SLACK, 0.0))[0]
    return values, scales / 2 + np.abs(values) * share


def _spread(array: Array, shape: tuple[int, ...], axis: int, block: int) -> Array:
    """Scales or zero points along the axis that they are of, so that they broadcast to the weight."""
    if array.size == 1:
        return array.reshape(())
    if block:
        return array.repeat(block, axis)
    return array.reshape([-1 if k == axis % len(shape) else 1 for k in range(len(shape))])


def _joined(pieces: Sequence[Weight | None]) -> Weight:
    """The weight that was divided into these along its inputs."""
    whole = [piece for piece in pieces if piece is not None]

    def read() -> tuple[Array, Array]:
        values, allowed = zip(*(piece.read() for piece in whole), strict=True)
        full = [np.broadcast_to(error, array.shape) for error, array in zip(allowed, values, strict=True)]
        return np.concatenate(values, axis=1), np.concatenate(full, axis=1)

    return Weight(whole[0].name, read)


def _divided(model: ir.Model) -> dict[ir.Node, list[ir.Node]]:
    """The convolutions of every sum of nothing else, by each of them."""
    found: dict[ir.Node, list[ir.Node]] = {}
    for node in model.graph.all_nodes():
        if node.op_type == "Sum":
            sources = [_producer(value, {"QuantizeLinear", "DequantizeLinear", "Cast"}) for value in node.inputs]
            parts = [source for source in sources if source is not None and source.op_type == "Conv"]
            if len(parts) == len(sources):
                found |= dict.fromkeys(parts, parts)
    return found


def _producer(value: ir.Value | None, through: set[str]) -> ir.Node | None:
    """The operator that a value comes from, through those that only code it."""
    node = None if value is None else value.producer()
    while node is not None and node.op_type in through:
        source = node.inputs[0]
        node = None if source is None else source.producer()
    return node


def _is_cast_constant(node: ir.Node) -> bool:
    return node.op_type == "Cast" and _weight(node.outputs[0]) is not None


def _joins_scales(node: ir.Node) -> bool:
    """Whether an operator multiplies the scale of dynamic activations by that of a weight."""
    sources = [_producer(value, {"Cast"}) for value in node.inputs] if node.op_type == "Mul" else []
    return any(source is not None and source.op_type == "DynamicQuantizeLinear" for source in sources)


def _integer_scale(node: ir.Node) -> ir.Value:
    """The scale of a MatMulInteger's weight: of Mul(Cast(product), Mul(scale of x, scale of w)), the last."""
    readers = list(node.outputs[0].consumers())
    while len(readers) == 1 and readers[0].op_type == "Cast":
        readers = list(readers[0].outputs[0].consumers())
    sources: list[Any] = [_producer(value, {"Cast"}) for reader in readers for value in reader.inputs]
    scales = [source for source in sources if source is not None and _joins_scales(source)]
    if len(scales) != 1:
        raise ParityError(f"{node.name}: its weight has no scale, and cannot be compared. Nothing was kept.")
    scale: ir.Value = next(value for value in scales[0].inputs if _weight(value) is not None)
    return scale
