"""The wire-format scanner against the onnx package, and against garbage."""

import random

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from ldm_export.bundle.onnx_wire import ExternalData, external_data_from_onnx, with_nested_data
from ldm_export.errors import BundleError


def external(name: str, location: str, offset: int | None = None, length: int | None = None) -> TensorProto:
    tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[2], data_location=TensorProto.EXTERNAL)
    for key, value in (("location", location), ("offset", offset), ("length", length)):
        if value is not None:
            tensor.external_data.add(key=key, value=str(value))
    return tensor


def inner(name: str) -> TensorProto:
    return numpy_helper.from_array(np.arange(3, dtype=np.float32), name)


def sparse(values: TensorProto, indices: TensorProto) -> onnx.SparseTensorProto:
    made = onnx.SparseTensorProto(dims=[10])
    made.values.CopyFrom(values)
    made.indices.CopyFrom(indices)
    return made


def graph(name: str, *initializers: TensorProto, nodes=()) -> onnx.GraphProto:
    return helper.make_graph(list(nodes), name, [], [], initializer=list(initializers))


def nested_model() -> onnx.ModelProto:
    """External data wherever the format allows them, among tensors that hold their own."""
    constant = helper.make_node("Constant", [], ["c"], value=external("constant", "deep/constant.bin", 0, 8))
    loop = helper.make_node(
        "Loop", ["", ""], ["l"], body=graph("body", external("in_loop", "loop.bin"), nodes=[constant])
    )
    branches = helper.make_node(
        "If",
        ["condition"],
        ["y"],
        then_branch=graph("then", external("then", "then.bin", 4096), nodes=[loop]),
        else_branch=graph("else", inner("own")),
    )
    odd = helper.make_node("Odd", [], ["o"], domain="test")
    odd.attribute.append(helper.make_attribute("tensors", [inner("t0"), external("t1", "list.bin", 0, 8)]))
    odd.attribute.append(helper.make_attribute("graphs", [graph("g0"), graph("g1", external("g1w", "graphs.bin"))]))
    odd.attribute.append(helper.make_attribute("s", sparse(external("sv", "sparse_attribute.bin"), inner("si"))))
    many = onnx.AttributeProto(name="many", type=onnx.AttributeProto.SPARSE_TENSORS)
    many.sparse_tensors.append(sparse(inner("mv"), external("mi", "indices.bin")))
    odd.attribute.append(many)
    main = graph("main", inner("weight"), external("big", "model.onnx_data", 65536, 2**33), nodes=[branches, odd])
    main.sparse_initializer.append(sparse(external("main_sv", "sparse.bin"), inner("main_si")))
    function = helper.make_function("test", "F", [], ["o"], [constant, loop], [helper.make_opsetid("", 20)])
    default = onnx.AttributeProto(name="d", type=onnx.AttributeProto.TENSOR)
    default.t.CopyFrom(external("default", "default.bin"))
    function.attribute_proto.append(default)
    model = helper.make_model(main, functions=[function])
    model.training_info.add().algorithm.CopyFrom(graph("training", external("tw", "training.bin")))
    model.training_info.add().initialization.CopyFrom(graph("first", external("ti", "first.bin")))
    return model


def expected_from(message, found: list) -> list:
    """What the onnx package sees, by walking every field of every message."""
    if isinstance(message, TensorProto) and message.external_data:
        entries = {entry.key: entry.value for entry in message.external_data}
        length = int(entries["length"]) if "length" in entries else None
        found.append(ExternalData(message.name, entries["location"], int(entries.get("offset", 0)), length))
    for field, value in message.ListFields():
        if field.message_type is not None:
            for child in value if not hasattr(value, "ListFields") else [value]:
                expected_from(child, found)
    return found


def as_set(found) -> set:
    return {(data.tensor, data.location, data.offset, data.length) for data in found}


def test_agrees_with_onnx_on_every_nesting(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(nested_model(), path)
    found = external_data_from_onnx(path)
    expected = expected_from(onnx.load(path, load_external_data=False), [])
    assert len(found) == len(expected) == 15
    assert as_set(found) == as_set(expected)
    assert ("big", "model.onnx_data", 65536, 2**33) in as_set(found)


def test_agrees_with_onnx_on_a_model_saved_by_it(tmp_path):
    weights = [numpy_helper.from_array(np.ones((64, number + 1), np.float32), f"w{number}") for number in range(5)]
    path = tmp_path / "model.onnx"
    onnx.save(
        helper.make_model(graph("g", *weights)), path, save_as_external_data=True, location="w.bin", size_threshold=0
    )
    found = external_data_from_onnx(path)
    assert [data.tensor for data in found] == [f"w{number}" for number in range(5)]
    assert {data.location for data in found} == {"w.bin"}
    assert sum(data.length for data in found) == (tmp_path / "w.bin").stat().st_size


def test_no_external_data(tmp_path):
    path = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph("g", inner("w"))), path)
    assert external_data_from_onnx(path) == ()


def test_weights_are_stepped_over(tmp_path):
    """A sparse file with 3 GiB of raw_data is scanned at once."""
    path = tmp_path / "huge.onnx"
    size = 3 << 30
    raw = b"\x4a" + varint(size)
    tensor = b"\x2a" + varint(len(raw) + size) + raw
    with path.open("wb") as file:
        file.write(b"\x3a" + varint(len(tensor) + size) + tensor)
        file.truncate(file.tell() + size)
    assert external_data_from_onnx(path) == ()


def varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    return bytes([*out, number])


def field(number: int, payload: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def tensor_with(*entries: bytes) -> bytes:
    return field(7, field(5, b"".join(field(13, entry) for entry in entries) + varint(14 << 3) + b"\x01"))


def deep(levels: int) -> bytes:
    graph_bytes = b""
    for _ in range(levels):
        graph_bytes = field(1, field(5, field(6, graph_bytes)))
    return field(7, graph_bytes)


WHERE = field(1, b"location") + field(2, b"w")
GARBAGE = {
    "empty": (b"", "empty"),
    "no graph": (field(2, b"pytorch"), "no graph"),
    "text": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0123", "not a readable ONNX model"),
    "field 0": (field(7, b"") + b"\x02\x00", "which no field has"),
    "cut short": (field(7, b"abc" * 100)[:50], "runs past"),
    "nested field runs past its message": (field(7, b"\x2a\x7f\x00") + bytes(200), "runs past"),
    "fixed 64 runs past": (field(7, b"") + b"\x09\x00", "runs past"),
    "number without end": (field(7, b"") + b"\xff" * 20, "does not end"),
    "group": (field(7, b"") + b"\x0b\x0c", "wire type 3"),
    "too deep": (deep(60), "nested deeper"),
    "offset of words": (tensor_with(WHERE, field(1, b"offset") + field(2, b"-1")), "'-1'"),
    "offset of foreign digits": (
        tensor_with(WHERE, field(1, b"length") + field(2, "٣".encode())),
        "external length",
    ),
    "no location": (tensor_with(field(1, b"offset") + field(2, b"0")), "without a location"),
    "location not UTF-8": (tensor_with(field(1, b"location") + field(2, b"\xff")), "not UTF-8"),
    "location too long": (tensor_with(field(1, b"location") + field(2, b"x" * 70000)), "70000 bytes long"),
}  # fmt: skip


@pytest.mark.parametrize("case", GARBAGE)
def test_garbage_is_refused(tmp_path, case):
    content, message = GARBAGE[case]
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(BundleError, match=message) as caught:
        external_data_from_onnx(path)
    assert "model.onnx" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(BundleError, match=r"absent\.onnx"):
        external_data_from_onnx(tmp_path / "absent.onnx")


def test_two_locations_are_refused(tmp_path):
    """Readers differ on which of two equal keys counts."""
    path = tmp_path / "model.onnx"
    entries = (field(1, b"location") + field(2, name) for name in (b"good", b"../evil"))
    path.write_bytes(tensor_with(*entries))
    with pytest.raises(BundleError, match="'location' twice"):
        external_data_from_onnx(path)


def test_nested_tensors_get_their_data():
    """All but the main graph's initializers, which ONNX Runtime takes from memory itself."""
    model = nested_model()
    data = {data.location: np.float32([number, 7.0]).tobytes() for number, data in enumerate(expected_from(model, []))}
    made = onnx.load_from_string(with_nested_data(model.SerializeToString(), lambda found: data[found.location]))
    assert [found.tensor for found in expected_from(made, [])] == ["big"]
    then = next(each.g for each in made.graph.node[0].attribute if each.name == "then_branch")
    body = then.node[0].attribute[0].g
    assert numpy_helper.to_array(body.initializer[0]).tobytes() == data["loop.bin"]
    assert numpy_helper.to_array(made.functions[0].attribute_proto[0].t).tobytes() == data["default.bin"]
    assert made.graph.initializer == model.graph.initializer
    assert with_nested_data(b"\x3a\x00", lambda found: b"") == b"\x3a\x00"


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch") / "model.onnx"


def scan_anything(path, content: bytes) -> None:
    path.write_bytes(content)
    try:
        found = external_data_from_onnx(path)
    except BundleError:
        return
    assert isinstance(found, tuple)


@settings(max_examples=500, deadline=None)
@given(content=st.binary(max_size=300))
def test_random_bytes_raise_nothing_else(scratch, content):
    scan_anything(scratch, content)


@settings(max_examples=500, deadline=None)
@given(content=st.binary(max_size=60))
def test_random_graphs_raise_nothing_else(scratch, content):
    scan_anything(scratch, field(7, field(1, field(5, field(6, content))) + field(5, content)))


def test_altered_models_raise_nothing_else(scratch):
    whole = nested_model().SerializeToString()
    rng = random.Random(0)
    for _ in range(600):
        altered = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        for _ in range(rng.randrange(1, 4)):
            if altered:
                altered[rng.randrange(len(altered))] = rng.randrange(256)
        scan_anything(scratch, bytes(altered))
