"""Which files an ONNX model reads its weights from, found without the onnx package and without reading the weights.

An ``.onnx`` file is a protobuf message: a run of fields, each a varint key ``number << 3 | wire type`` and a payload.
A tensor whose data lie in another file says so in ``TensorProto.external_data``, a list of key-value pairs with
``location`` (a path beside the model) and optionally ``offset`` and ``length`` (bytes). Tensors occur as initializers,
sparse or dense, and inside node attributes, in the main graph, in nested graphs and in functions; ``_INSIDE`` below is
the map of the ways that lead to them. Everything else is stepped over, so gigabytes of ``raw_data`` cost nothing.

Sources: protobuf.dev/programming-guides/encoding; onnx.proto and docs/ExternalData.md of the ONNX project.
"""

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ldm_export.errors import BundleError

_INSIDE: dict[str, dict[int, str]] = {  # message -> field number -> the message in that field
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_TENSOR_NAME, _TENSOR_EXTERNAL_DATA = 8, 13
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 100  # protobuf's own limit on nesting

Field = tuple[int, int, int]  # number, first byte of the payload, first byte after it


@dataclass(frozen=True)
class ExternalData:
    """Where one tensor's data lie.

    Attributes
    ----------
    tensor : str
        The tensor's name; may be empty.
    location : str
        The file as the model names it, relative to the model's own folder. Not checked here.
    offset : int
        First byte in that file.
    length : int or None
        Number of bytes, or None where the model does not say: to the end of the file.
    """

    tensor: str
    location: str
    offset: int
    length: int | None


def external_data_from_onnx(path: Path) -> tuple[ExternalData, ...]:
    """Return every external-data reference of an ONNX model, in file order.

    Parameters
    ----------
    path : Path
        The ``.onnx`` file. It is memory-mapped; its size is no limit.

    Raises
    ------
    BundleError
        If the file cannot be read or is not an ONNX model.
    """
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if not any(number == 7 for number, _, _ in _fields(data, 0, len(data))):
                raise _MalformedError("it has no graph")
            return tuple(_references(data, "model", 0, len(data), 0))
    except (_MalformedError, OSError, ValueError) as exc:  # ValueError: mmap's word for an empty file
        raise BundleError(f"{path} is not a readable ONNX model: {exc}. Export the bundle anew.") from exc


class _MalformedError(Exception):
    """What is wrong with the bytes."""


def _references(data: mmap.mmap, message: str, start: int, end: int, depth: int) -> Iterator[ExternalData]:
    if depth > _DEEPEST:
        raise _MalformedError(f"its messages are nested deeper than {_DEEPEST}")
    if message == "tensor":
        yield from _tensor_references(data, start, end)
        return
    inside = _INSIDE[message]
    for number, first, last in _fields(data, start, end):
        if number in inside:
            yield from _references(data, inside[number], first, last, depth + 1)


def _tensor_references(data: mmap.mmap, start: int, end: int) -> Iterator[ExternalData]:
    """Yield one reference for each ``location``; readers differ on which of two counts, so each must be allowed."""
    name, entries = "", []
    for number, first, last in _fields(data, start, end):
        if number == _TENSOR_NAME:
            name = _text(data, first, last)
        elif number == _TENSOR_EXTERNAL_DATA:
            entry = {field: _text(data, *span) for field, *span in _fields(data, first, last)}
            entries.append((entry.get(_ENTRY_KEY, ""), entry.get(_ENTRY_VALUE, "")))
    numbers = {}
    for key, value in entries:
        if key in ("offset", "length"):
            if not (value.isascii() and value.isdigit() and len(value) < 20):
                raise _MalformedError(f"tensor {name!r} has the external {key} {value!r}")
            numbers[key] = int(value)
    locations = [value for key, value in entries if key == "location"]
    if entries and not locations:
        raise _MalformedError(f"tensor {name!r} has external data without a location")
    for location in locations:
        yield ExternalData(name, location, numbers.get("offset", 0), numbers.get("length"))


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[Field]:
    """Yield the length-delimited fields of a message and step over the others."""
    position = start
    while position < end:
        key, position = _varint(data, position, end)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise _MalformedError(f"byte {position - 1} begins a field numbered 0")
        if wire_type == _VARINT:
            _, position = _varint(data, position, end)
        elif wire_type == _BYTES:
            length, position = _varint(data, position, end)
            if length > end - position:
                raise _MalformedError(f"a field at byte {position} runs past its message: it is cut short or altered")
            yield number, position, position + length
            position += length
        elif wire_type in (_FIXED32, _FIXED64):
            position += 4 if wire_type == _FIXED32 else 8
        else:
            raise _MalformedError(f"byte {position - 1} has the wire type {wire_type}, which ONNX does not use")
    if position > end:
        raise _MalformedError(f"a field at byte {position} runs past its message: it is cut short or altered")


def _varint(data: mmap.mmap, position: int, end: int) -> tuple[int, int]:
    """Return the number that starts at a position and the position after it."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= end:
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise _MalformedError(f"the number before byte {position} does not end")


def _text(data: mmap.mmap, start: int, end: int) -> str:
    if end - start > 1 << 16:
        raise _MalformedError(f"the text at byte {start} is {end - start} bytes long")
    try:
        return data[start:end].decode("utf-8")
    except UnicodeDecodeError:
        raise _MalformedError(f"the text at byte {start} is not UTF-8") from None
