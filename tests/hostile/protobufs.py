"""Bytes of ``.onnx`` files that two readers of protobuf may read differently, and weights in other files."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import onnx

from tests.hostile.base import VOCABULARY, WIDTH, Draft, entry_of, with_outside_weights
from tests.hostile.case import Case

FILE = "text_encoder/model.onnx"
TABLE_BYTES = VOCABULARY * WIDTH * 4
GRAPH, INITIALIZER, EXTERNAL_DATA, DATA_LOCATION, RAW_DATA = 7, 5, 13, 14, 9


def varint(value: int, length: int = 1) -> bytes:
    """A number, in at least so many bytes."""
    out = b""
    while value > 127 or len(out) + 1 < length:
        out += bytes([value & 127 | 128])
        value >>= 7
    return out + bytes([value])


def part(number: int, payload: bytes, tag: bytes | None = None, size: bytes | None = None) -> bytes:
    """A field of bytes, with its tag and its size as given or as they should be."""
    return (tag or varint(number << 3 | 2)) + (size or varint(len(payload))) + payload


def entry(key: str, value: str) -> bytes:
    return part(1, key.encode()) + part(2, value.encode())


def table(*external: bytes, location: bytes = varint(14 << 3) + b"\x01", more: bytes = b"") -> bytes:
    """The tensor ``table`` as bytes, with these fields of external data."""
    head = varint(1 << 3) + varint(VOCABULARY) + varint(1 << 3) + varint(WIDTH) + varint(2 << 3) + b"\x01"
    return head + part(8, b"table") + b"".join(external) + location + more


OUTSIDE = (
    part(EXTERNAL_DATA, entry("location", "model.onnx_data")),
    part(EXTERNAL_DATA, entry("offset", "0")),
    part(EXTERNAL_DATA, entry("length", str(TABLE_BYTES))),
)


def forge(draft: Draft, tensor: bytes, graph: Callable[[bytes], bytes] = lambda graph: part(GRAPH, graph)) -> None:
    """Make the text encoder's table this tensor, its weights lying outside."""
    with_outside_weights(draft)
    model = onnx.load_from_string(draft.files[FILE])
    kept = [one for one in model.graph.initializer if one.name != "table"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    body = model.graph.SerializeToString() + part(INITIALIZER, tensor)
    model.ClearField("graph")
    draft.files[FILE] = model.SerializeToString() + graph(body)


def _forged(tensor: bytes) -> Callable[[Draft], None]:
    return partial(forge, tensor=tensor)


def _wrapped(graph: Callable[[bytes], bytes]) -> Callable[[Draft], None]:
    return partial(forge, tensor=table(*OUTSIDE), graph=graph)


def _outside(**changes: str | None) -> Callable[[Draft], None]:
    """The table outside, with entries of its external data changed, or left out."""
    entries = {"location": "model.onnx_data", "offset": "0", "length": str(TABLE_BYTES), **changes}
    fields = (part(EXTERNAL_DATA, entry(key, value)) for key, value in entries.items() if value is not None)
    return _forged(table(*fields))


def _appended(data: bytes) -> Callable[[Draft], None]:
    return lambda draft: draft.files.update({FILE: draft.files[FILE] + data})


def _disguised(draft: Draft) -> None:
    """A field that nobody knows, whose text puts ``ORTM`` at byte 4."""
    draft.files[FILE] = part(1000, b"xORTM") + draft.files[FILE]


def _unlisted_location(draft: Draft) -> None:
    with_outside_weights(draft)
    draft.unlisted["text_encoder/model.onnx_data"] = draft.files.pop("text_encoder/model.onnx_data")


def _elsewhere(draft: Draft) -> None:
    _outside(location="../vae_decoder/weights")(draft)
    draft.files["vae_decoder/weights"] = draft.files.pop("text_encoder/model.onnx_data")


def _short(draft: Draft) -> None:
    with_outside_weights(draft)
    path = "text_encoder/model.onnx_data"
    draft.files[path] = draft.files[path][:-1]


def _altered(draft: Draft) -> None:
    with_outside_weights(draft)
    path = "text_encoder/model.onnx_data"
    draft.entries[path] = entry_of(draft.files[path])
    draft.files[path] = draft.files[path][:-1] + b"\x7f"


def _in_a_constant(draft: Draft) -> None:
    """A constant's tensor that says it lies in an unlisted file."""
    model = draft.model("unet")
    tensor = onnx.TensorProto(name="t", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="unlisted.bin")
    model.graph.node.append(onnx.helper.make_node("Constant", [], ["more"], value=tensor))
    draft.files["unet/model.onnx"] = model.SerializeToString()
    draft.unlisted["unet/unlisted.bin"] = b"\0\0\0\0"


def _in_a_sparse_tensor(draft: Draft) -> None:
    model = draft.model("unet")
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(onnx.TensorProto(name="s", data_type=1, dims=[1], data_location=onnx.TensorProto.EXTERNAL))
    sparse.values.external_data.add(key="location", value="../../etc/passwd")
    sparse.indices.CopyFrom(onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [0]))
    draft.files["unet/model.onnx"] = model.SerializeToString()


LOCATION = OUTSIDE[0]
OPENED: dict[str, Callable[[Draft], object]] = {
    "weights outside": with_outside_weights,
    "weights outside, forged alike": _forged(table(*OUTSIDE)),
    "weights outside without a length": _outside(length=None),
    "weights outside without an offset": _outside(offset=None),
    "a field that nobody knows": _appended(part(1000, b"x")),
    "a number of ten bytes in a field that nobody knows": _appended(varint(1000 << 3) + b"\xff" * 9 + b"\x01"),
}
REFUSED: dict[str, Callable[[Draft], object]] = {
    "a tag of 33 bits": _forged(table(part(13, entry("location", "unlisted"), tag=b"\xea\x80\x80\x80\x10"))),
    "a tag in more bytes than it needs": _forged(
        table(part(13, entry("location", "model.onnx_data"), tag=b"\xea\x00"))
    ),
    "a tag of five bytes": _appended(part(1000, b"x", tag=varint(1000 << 3 | 2, 5))),
    "a tag of six bytes": _appended(part(1000, b"x", tag=varint(1000 << 3 | 2, 6))),
    "a size in more bytes than it needs": _appended(part(1000, b"x", size=b"\x81\x00")),
    "a size of ten bytes": _appended(part(1000, b"x", size=varint(1, 10))),
    "a size beyond 2**31": _appended(part(1000, b"x", size=varint(2**31 + 1))),
    "a size beyond 2**64": _appended(part(1000, b"x", size=b"\x81" + b"\x80" * 8 + b"\x02")),
    "a number of eleven bytes": _appended(varint(1000 << 3) + b"\xff" * 10 + b"\x01"),
    "a number beyond 64 bits": _appended(varint(1000 << 3) + b"\xff" * 9 + b"\x7f"),
    "a number that does not end": _appended(varint(1000 << 3) + b"\xff"),
    "a group": _appended(varint(1000 << 3 | 3) + varint(1000 << 3 | 4)),
    "the end of a group": _appended(varint(1000 << 3 | 4)),
    "a wire type of 6": _appended(varint(1000 << 3 | 6) + b"\0"),
    "a wire type of 7": _appended(varint(1000 << 3 | 7) + b"\0"),
    "a field numbered 0": _appended(b"\x02\x01x"),
    "a field that makes it ONNX Runtime's own format": _disguised,
    "a zero byte after": _appended(b"\0"),
    "four bytes that are cut short": _appended(varint(1000 << 3 | 5) + b"\0\0"),
    "eight bytes that are cut short": _appended(varint(1000 << 3 | 1) + b"\0\0"),
    "a field that is cut short": _appended(varint(1000 << 3 | 2) + b"\x05x"),
    "two graphs": _wrapped(lambda graph: part(GRAPH, graph) + part(GRAPH, b"")),
    "a graph in two halves": _wrapped(lambda graph: part(GRAPH, graph) + part(GRAPH, part(2, b"more"))),
    "a graph that is a number": _wrapped(lambda graph: part(GRAPH, graph) + varint(GRAPH << 3) + b"\0"),
    "no graph": _wrapped(lambda graph: b""),
    "a graph as a number alone": _wrapped(lambda graph: varint(GRAPH << 3) + b"\0"),
    "an initializer that is a number": _wrapped(lambda graph: part(GRAPH, graph + varint(INITIALIZER << 3) + b"\0")),
    "external data that is not said to be": _forged(table(*OUTSIDE, location=b"")),
    "external data that is said not to be": _forged(table(*OUTSIDE, location=varint(14 << 3) + b"\0")),
    "external data of no known kind": _forged(table(*OUTSIDE, location=varint(14 << 3) + b"\x02")),
    "external data said to be, then not": _forged(table(*OUTSIDE, location=(varint(14 << 3) + b"\x01\x70\x00"))),
    "external data said to be, without any": _forged(table()),
    "external data beside raw data": _forged(table(*OUTSIDE, more=part(RAW_DATA, bytes(TABLE_BYTES)))),
    "external data without a location": _forged(table(*OUTSIDE[1:])),
    "two locations": _forged(table(*OUTSIDE, LOCATION)),
    "two offsets": _forged(table(*OUTSIDE, OUTSIDE[1])),
    "an entry of two keys": _forged(table(part(13, part(1, b"offset") + entry("location", "model.onnx_data")))),
    "an entry of two values": _forged(table(part(13, entry("location", "unlisted") + part(2, b"model.onnx_data")))),
    "an entry of an unknown key": _forged(table(*OUTSIDE, part(13, entry("basepath", "/etc")))),
    "a location that is not listed": _unlisted_location,
    "a location in another folder": _elsewhere,
    "an absolute location": _outside(location="/etc/passwd"),
    "a location with a drive": _outside(location="c:\\model.onnx_data"),
    "a location through this folder": _outside(location="./model.onnx_data"),
    "a location through the folder above": _outside(location="../text_encoder/model.onnx_data"),
    "a location with two slashes": _outside(location=".//model.onnx_data"),
    "a location in memory": _outside(location="*/_ORT_MEM_ADDR_/*"),
    "an empty location": _outside(location=""),
    "a location with a NUL": _outside(location="model.onnx_data\0"),
    "a location that is no UTF-8": _forged(table(part(13, part(1, b"location") + part(2, b"\xff")))),
    "the manifest as weights": _outside(location="../manifest.json"),
    "an offset beyond the file": _outside(offset=str(TABLE_BYTES + 1), length="0"),
    "a length beyond the file": _outside(length=str(TABLE_BYTES + 1)),
    "an offset and a length beyond the file": _outside(offset="8"),
    "an offset of nineteen digits": _outside(offset="9" * 19),
    "a negative offset": _outside(offset="-1"),
    "an offset that is no number": _outside(offset="0x0"),
    "an offset with a space": _outside(offset=" 0"),
    "an offset of full-width digits": _outside(offset="\uff10"),
    "an offset of 5000 digits": _outside(offset="0" * 5000),
    "a length that is too short": _outside(length="4"),
    "weights that are too short": _short,
    "a constant in another file": _in_a_constant,
    "a sparse tensor in another file": _in_a_sparse_tensor,
}


def cases() -> Iterator[Case]:
    """All of this part."""
    for what, change in OPENED.items():
        yield Case(f"onnx: {what}", True, change)
        yield Case(f"onnx: {what}, verified", True, change, verify=True)
    for what, change in REFUSED.items():
        yield Case(f"onnx: {what}", False, change)
    yield Case("onnx: altered weights", True, _altered)
    yield Case("onnx: altered weights, verified", False, _altered, verify=True)
