"""What an ONNX model reads its weights from and how large it is, found without the onnx package or reading weights.

An ``.onnx`` file is a protobuf message: a run of fields, each a varint key ``number << 3 | wire type`` and a payload.
A tensor whose data lie in another file says so in ``TensorProto.external_data``, a list of key-value pairs with
``location`` (a path beside the model) and optionally ``offset`` and ``length`` (bytes). Tensors occur as initializers,
sparse or dense, and inside node attributes, in the main graph, in nested graphs and in functions; ``_INSIDE`` below is
the map of the ways that lead to them. Everything else is skipped, so gigabytes of ``raw_data`` cost nothing.

Refused is whatever two readers may read differently, since another reader runs the model: keys and sizes beyond 32
bits, numbers in more bytes than they need, groups, a field that occurs twice where one is due or has another wire type,
external data that the tensor does not say it has, or has beside others; and ONNX Runtime's own format. Refused is also
what opening would take hours for, functions that make more than `MOST_NODES` nodes, or call themselves; and nodes that
read files on their own.

Sources: protobuf.dev/programming-guides/encoding; onnx.proto and docs/ExternalData.md of the ONNX project.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ldm_export.errors import BundleError
from ldm_export.reading.documents import MalformedError

MOST_NODES = 1 << 17
"""Nodes of a model once its functions are inlined: ONNX Runtime takes about 50 us each."""
_INSIDE: dict[str, dict[int, str]] = {  # message -> field number -> the message in that field
    "model": {7: "graph", 20: "training", 25: "function"},
    "training": {1: "graph", 2: "graph"},
    "function": {7: "node", 11: "attribute"},
    "graph": {1: "node", 5: "tensor", 15: "sparse"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse", 23: "sparse"},
    "sparse": {1: "tensor", 2: "tensor"},
}
_ONCE: dict[str, frozenset[int]] = {  # fields that are read, of which a message has one
    "model": frozenset({7}),
    "training": frozenset({1, 2}),
    "function": frozenset({1, 10, 13}),
    "node": frozenset({4, 7, 8}),
    "attribute": frozenset({5, 6, 22}),
    "sparse": frozenset({1, 2}),
    "tensor": frozenset({8, 9, 14}),
    "entry": frozenset({1, 2}),
}
_TEXTS = {"function": (10, 1, 13), "node": (7, 4, 8)}
"""Domain, name and overload, of a function and of the node that calls it."""
_TENSOR_NAME, _TENSOR_RAW_DATA, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION = 8, 9, 13, 14
_ENTRY_KEY, _ENTRY_VALUE = 1, 2
_ENTRY_KEYS = ("location", "offset", "length", "checksum")
_PREPACKED = "prepacked_"  # ONNX Runtime's own, of weights in its kernels' layout
_EXTERNAL = 1
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_DEEPEST = 100  # protobuf's own limit on nesting
_LONGEST_TEXT = 1 << 16
_ORT_FORMAT = b"ORTM"  # at byte 4: ONNX Runtime would read it as its own format
_READS_FILES = "EPContext"

Data = bytes | mmap.mmap
Field = tuple[int, int, int, int]  # number, wire type, first byte of the payload or a varint's value, byte after it
Call = tuple[str, str, str]  # domain, name, overload


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
            return external_data_from_bytes(data)
    except (OSError, ValueError) as exc:  # ValueError: mmap's word for an empty file, and MalformedError
        raise BundleError(f"{path} is not a readable ONNX model: {exc}. Export the bundle anew.") from exc


def external_data_from_bytes(data: Data) -> tuple[ExternalData, ...]:
    """Return every external-data reference of an ONNX model, in file order.

    Raises
    ------
    MalformedError
        If it is not an ONNX model, or one that the module's docstring says is refused.
    """
    if data[4:8] == _ORT_FORMAT:
        raise MalformedError("it is of ONNX Runtime's own format")
    scan = _Scan(data)
    scan.message("model", 0, len(data), 0)
    if not scan.has_graph:
        raise MalformedError("it has no graph")
    scan.check_size()
    return tuple(scan.found)


def with_nested_data(model: bytes, data_of: Callable[[ExternalData], bytes]) -> bytes:
    """Return an ONNX model in which every tensor has its data but the main graph's own initializers.

    ONNX Runtime takes weights' files from memory for these alone, and looks for others on the disk.

    Parameters
    ----------
    model : bytes
        One that `external_data_from_bytes` does not refuse.
    data_of : callable
        Gives the bytes that a reference means.
    """
    return _Scan(model).embedded("model", 0, len(model), data_of, nested=False) or model


@dataclass
class _Body:
    """The nodes of the main graph or of a function, with those of nested graphs; and which functions they may call."""

    nodes: int = 0
    calls: dict[Call, int] = field(default_factory=dict)


class _Scan:
    """One pass over a model."""

    def __init__(self, data: Data) -> None:
        self._data = data
        self.found: list[ExternalData] = []
        self.has_graph = False
        self._main = self._body = _Body()
        self._functions: dict[Call, _Body] = {}

    def message(self, kind: str, start: int, end: int, depth: int) -> None:
        """Follow the ways from a message that lead to tensors and nodes."""
        if depth > _DEEPEST:
            raise MalformedError(f"its messages are nested deeper than {_DEEPEST}")
        if kind == "tensor":
            self._tensor(start, end)
            return
        inside, once, texts = _INSIDE[kind], _ONCE.get(kind, frozenset()), _TEXTS.get(kind, ())
        if kind == "function":
            self._body = _Body()
        seen: dict[int, str] = {}
        for number, wire_type, first, last in self._fields(start, end):
            if number not in inside and number not in once:
                continue
            if wire_type != _BYTES:
                raise MalformedError(f"its field {number} of a {kind} has another type than in ONNX")
            if number in once:
                _note(seen, number, kind)
            if number in texts:
                seen[number] = self._text(first, last)
            else:
                self.has_graph = self.has_graph or (kind == "model" and number == 7)
                self.message(inside[number], first, last, depth + 1)
        if texts:
            domain, name, overload = (seen.get(number, "") for number in texts)
            self._called(kind, ("" if domain == "ai.onnx" else domain, name, overload))

    def embedded(
        self, kind: str, start: int, end: int, data_of: Callable[[ExternalData], bytes], *, nested: bool
    ) -> bytes | None:
        """The message with the data of its nested tensors in it, or None where that is what it is."""
        if kind == "tensor":
            return self._tensor_with_data(start, end, data_of) if nested else None
        parts, copied, position = [], start, start
        for number, _, first, last in self._fields(start, end):
            begins, position = position, last
            if number in _INSIDE[kind]:
                inner = _INSIDE[kind][number]
                below = nested or inner not in ("graph", "node", "tensor")
                new = self.embedded(inner, first, last, data_of, nested=below)
                if new is not None:
                    parts += [self._data[copied:begins], _field_of(number, new)]
                    copied = last
        return b"".join([*parts, self._data[copied:end]]) if parts else None

    def _tensor_with_data(self, start: int, end: int, data_of: Callable[[ExternalData], bytes]) -> bytes | None:
        self.found.clear()
        self._tensor(start, end)
        if not self.found:
            return None
        parts, position = [], start
        for number, _, _, last in self._fields(start, end):
            begins, position = position, last
            if number not in (_TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION, _TENSOR_RAW_DATA):
                parts.append(self._data[begins:last])
        return b"".join([*parts, _field_of(_TENSOR_RAW_DATA, data_of(self.found[0]))])

    def check_size(self) -> None:
        """Raise MalformedError if functions are called without end, or make more than `MOST_NODES` nodes."""
        sizes: dict[Call, tuple[int, int]] = {}

        def inlined(body: _Body, depth: int) -> tuple[int, int]:
            nodes, deepest = body.nodes, 0
            for call, count in body.calls.items():
                if call not in self._functions:
                    continue
                if call not in sizes and depth < _DEEPEST:  # one that calls itself never gets a size
                    sizes[call] = inlined(self._functions[call], depth + 1)
                if call not in sizes or sizes[call][1] >= _DEEPEST:
                    raise MalformedError(f"its functions call one another more than {_DEEPEST} deep, or without end")
                nodes, deepest = nodes + count * sizes[call][0], max(deepest, sizes[call][1] + 1)
            if nodes > MOST_NODES:
                raise MalformedError(f"it has more than {MOST_NODES:,} nodes, with its functions inlined")
            return nodes, deepest

        for body in (*self._functions.values(), self._main):
            inlined(body, 0)

    def _called(self, kind: str, call: Call) -> None:
        if kind == "function":
            if call in self._functions:
                raise MalformedError(f"it has two functions {call[1]!r}")
            self._functions[call], self._body = self._body, self._main
            return
        if call[1] == _READS_FILES:
            raise MalformedError(f"it has a node {_READS_FILES}, which reads a compiled graph from another file")
        self._body.nodes += 1
        self._body.calls[call] = self._body.calls.get(call, 0) + 1

    def _tensor(self, start: int, end: int) -> None:
        name, location, raw = "", 0, False
        entries: dict[str, str] = {}
        seen: dict[int, str] = {}
        for number, wire_type, first, last in self._fields(start, end):
            if number not in (_TENSOR_NAME, _TENSOR_RAW_DATA, _TENSOR_EXTERNAL_DATA, _TENSOR_DATA_LOCATION):
                continue
            if wire_type != (_VARINT if number == _TENSOR_DATA_LOCATION else _BYTES):
                raise MalformedError(f"its field {number} of a tensor has another type than in ONNX")
            if number == _TENSOR_EXTERNAL_DATA:
                key, value = self._entry(first, last)
                if key in entries or not (key in _ENTRY_KEYS or key.startswith(_PREPACKED)):
                    raise MalformedError(f"tensor {name!r} has the external {key[:40]!r} twice, or it is none")
                entries[key] = value
                continue
            _note(seen, number, "tensor")
            if number == _TENSOR_NAME:
                name = self._text(first, last)
            elif number == _TENSOR_RAW_DATA:
                raw = last > first
            else:
                location = first
        if location == 0 and not entries:
            return
        numbers = {key: _number(name, key, entries[key]) for key in ("offset", "length") if key in entries}
        if "location" not in entries:
            raise MalformedError(f"tensor {name!r} has external data without a location")
        if location != _EXTERNAL or raw:
            raise MalformedError(
                f"tensor {name!r} has external data, and {'raw data' if raw else f'the data location {location}'}"
            )
        self.found.append(ExternalData(name, entries["location"], numbers.get("offset", 0), numbers.get("length")))

    def _entry(self, start: int, end: int) -> tuple[str, str]:
        seen: dict[int, str] = {}
        for number, wire_type, first, last in self._fields(start, end):
            if number in (_ENTRY_KEY, _ENTRY_VALUE):
                if wire_type != _BYTES:
                    raise MalformedError("a key or a value of external data has another type than in ONNX")
                _note(seen, number, "entry of external data")
                seen[number] = self._text(first, last)
        return seen.get(_ENTRY_KEY, ""), seen.get(_ENTRY_VALUE, "")

    def _fields(self, start: int, end: int) -> Iterator[Field]:
        """Yield the fields of a message; of a varint, its value in place of the payload's first byte."""
        data, position = self._data, start
        while position < end:
            key = data[position]
            if key < 0x80:
                position += 1
            else:
                key, position = self._varint(position, end, 5)
            number, wire_type = key >> 3, key & 7
            if number == 0 or key >= 1 << 32:
                raise MalformedError(f"byte {position - 1} ends the key {key}, which no field has")
            if wire_type == _BYTES:
                length, position = self._varint(position, end, 5)
                if length > end - position:
                    raise MalformedError(
                        f"a field at byte {position} runs past its message: it is cut short or altered"
                    )
                yield number, wire_type, position, position + length
                position += length
            elif wire_type == _VARINT:
                value, position = self._varint(position, end, 10)
                yield number, wire_type, value, position
            elif wire_type in (_FIXED32, _FIXED64):
                position += 4 if wire_type == _FIXED32 else 8
                yield number, wire_type, position, position
            else:
                raise MalformedError(f"byte {position - 1} has the wire type {wire_type}, which ONNX does not use")
        if position > end:
            raise MalformedError(f"a field at byte {position} runs past its message: it is cut short or altered")

    def _varint(self, position: int, end: int, most_bytes: int) -> tuple[int, int]:
        """Return the number that starts at a position, written in as few bytes as it needs, and the position after."""
        value = 0
        for number in range(most_bytes):
            if position >= end:
                break
            byte = self._data[position]
            position += 1
            value |= (byte & 0x7F) << 7 * number
            if byte < 0x80:
                if (byte == 0 and number > 0) or value >= 1 << 64:
                    break
                return value, position
        raise MalformedError(f"the number before byte {position} does not end, or is longer than it needs to be")

    def _text(self, start: int, end: int) -> str:
        if end - start > _LONGEST_TEXT:
            raise MalformedError(f"the text at byte {start} is {end - start} bytes long")
        try:
            return self._data[start:end].decode("utf-8")
        except UnicodeDecodeError:
            raise MalformedError(f"the text at byte {start} is not UTF-8") from None


def _field_of(number: int, payload: bytes) -> bytes:
    return _varint_of(number << 3 | _BYTES) + _varint_of(len(payload)) + payload


def _varint_of(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _note(seen: dict[int, str], number: int, kind: str) -> None:
    if number in seen:
        raise MalformedError(f"its field {number} of a {kind} occurs twice")
    seen[number] = ""


def _number(tensor: str, key: str, value: str) -> int:
    if not (value.isascii() and value.isdigit() and len(value) < 19):
        raise MalformedError(f"tensor {tensor!r} has the external {key} {value[:40]!r}")
    return int(value)
