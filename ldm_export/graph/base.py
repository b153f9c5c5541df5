"""What a pass over the ONNX graphs of a bundle is given and gives back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper

from ldm_export.errors import InputError

Array = npt.NDArray[Any]
Inputs = Mapping[str, Array]
"""The inputs of one call of a graph, by name."""
Purpose = Literal["speed", "bytes"]
CALLS_JUDGED = 4
"""Calibration calls that a pass tries its changes on."""


@dataclass(frozen=True)
class GraphChange:
    """A graph as a pass left it.

    Attributes
    ----------
    report : what was touched, what was left alone and why
    """

    model: onnx.ModelProto
    report: Mapping[str, Any] = field(default_factory=dict)


class GraphPass(Protocol):
    """A technique that changes graphs, whose weights may lie outside (:mod:`ldm_export.graph.files`).

    Attributes
    ----------
    graphs : the graphs that it is applied to, of those that a bundle has
    targets : the kinds of machine that can run what it makes
    tolerance : how far an output may then be from the PyTorch network's, as a share of its largest value
    """

    name: ClassVar[str]
    purpose: ClassVar[Purpose]
    targets: ClassVar[tuple[str, ...]]
    tolerance: ClassVar[float]

    @property
    def graphs(self) -> tuple[str, ...]: ...

    def apply(self, model: onnx.ModelProto, calibration: Sequence[Inputs]) -> GraphChange: ...


def copied(model: onnx.ModelProto) -> onnx.ModelProto:
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    return copy


def spread(calls: Sequence[Inputs], count: int) -> list[Inputs]:
    """Choose at most so many calls, evenly from the first to the last, and so of pictures of more than one step at
    several timesteps."""
    chosen = np.linspace(0, len(calls) - 1, min(count, len(calls))).round().astype(int)
    return [calls[number] for number in chosen]


def check_calibration(model: onnx.ModelProto, calibration: Sequence[Inputs]) -> None:
    """Raise InputError unless every call has the graph's inputs, of its dtypes and fixed sizes, and only numbers."""
    inputs = {value.name: value.type.tensor_type.shape.dim for value in model.graph.input}
    dtypes = {
        value.name: helper.tensor_dtype_to_np_dtype(value.type.tensor_type.elem_type) for value in model.graph.input
    }
    if not calibration:
        raise InputError("There is no calibration data; draw at least one picture for it.")
    for call in calibration:
        if call.keys() != inputs.keys():
            raise InputError(f"Calibration data has the inputs {sorted(call)}; the graph takes {sorted(inputs)}.")
        for name, array in call.items():
            if array.dtype != dtypes[name]:
                raise InputError(f"Calibration data for {name!r} is {array.dtype}; the graph takes {dtypes[name]}.")
            sizes = [dim.dim_value or None for dim in inputs[name]]
            fits = len(sizes) == array.ndim and all(
                size in (None, given) for size, given in zip(sizes, array.shape, strict=True)
            )
            if not fits:
                allowed = ", ".join("any" if size is None else str(size) for size in sizes)
                raise InputError(f"Calibration data for {name!r} has shape {array.shape}; the graph takes ({allowed}).")
            if not np.isfinite(array).all():
                raise InputError(f"Calibration data for {name!r} holds values that are no numbers. Draw it anew.")
