"""The rules of ``ort-cpu``: applied where they fit and nowhere else, to the same numbers, and what is cut out once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from ldm_export.bundle import Bundle
from ldm_export.export.onnx import random_inputs
from ldm_export.graph.cpu.hoist import hoist_invariants
from ldm_export.graph.cpu.matching import CONTRIB
from ldm_export.graph.quantize_dynamic import QuantizeDynamic
from tests.bundle_fixture import CLASSES
from tests.graph.graphs import Array, graph_of, off_by, random, run
from tests.graph.rules import CLOSE, assert_applied, assert_left, assert_shapes_are_inferred, inferred, rewritten
from tests.graph.small_graph import node

HEADS, WIDTH = 4, 16


def fp16(plain: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with half the bits."""
    copy = onnx.ModelProto()
    copy.CopyFrom(plain)
    for value in (*copy.graph.input, *copy.graph.output):
        value.type.tensor_type.elem_type = TensorProto.FLOAT16
    for tensor in copy.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype("f2"), tensor.name))
    onnx.checker.check_model(copy, full_check=True)
    return copy


# --- attention ------------------------------------------------------------------------------------------------------


def attention(
    *,
    split: Sequence[int] = (0, 0, HEADS, WIDTH // HEADS),
    perm: Sequence[int] = (0, 2, 1, 3),
    perm_k: Sequence[int] = (0, 1, 3, 2),
    back: Sequence[int] = (0, 2, 1, 3),
    merged: Sequence[int] = (0, 0, WIDTH),
    axis: int = -1,
    scaled: bool = True,
    mask: bool = False,
    factor: float = 0.7,
    batch_k: int | str = "B",
    outputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """softmax(s Q K^T) V over heads, the factor on both sides as the export has it."""
    nodes = [
        *(node("Reshape", [x, f"split_{x}"], f"{x}.parts") for x in "qkv"),
        *(node("Transpose", [f"{x}.parts"], f"{x}.heads", perm=list(perm)) for x in "qkv"),
        node("Transpose", ["k.heads"], "k.turned", perm=list(perm_k)),
        *([node("Mul", [x, "factor"], f"{x}.scaled") for x in ("q.heads", "k.turned")] if scaled else []),
        node("MatMul", [f"{x}.scaled" if scaled else x for x in ("q.heads", "k.turned")], "scores"),
        *([node("Add", ["scores", "mask"], "masked")] if mask else []),
        node("Softmax", ["masked" if mask else "scores"], "shares", axis=axis),
        node("MatMul", ["shares", "v.heads"], "mixed"),
        node("Transpose", ["mixed"], "back", perm=list(back)),
        node("Reshape", ["back", "merged"], "y"),
    ]
    weights = {f"split_{x}": np.array(split, np.int64) for x in "qkv"}
    weights |= {"merged": np.array(merged, np.int64)}
    if scaled:
        weights["factor"] = np.array(factor, np.float32)
    if mask:
        weights["mask"] = np.array([0, -1, 0, -2, 0], np.float32)
    inputs = {"q": ["B", "L", WIDTH], "k": [batch_k, 5, WIDTH], "v": ["B", 5, WIDTH]}
    sides: dict[str, Sequence[int | str]] = {"y": [f"y{k}" for k in range(len(merged))]}
    return graph_of(nodes, inputs, sides | {name: list("abcd") for name in outputs}, weights)


def attention_calls() -> list[dict[str, Array]]:
    return [
        {"q": random(1, batch, length, WIDTH), "k": random(2, batch, 5, WIDTH), "v": random(3, batch, 5, WIDTH)}
        for batch, length in ((1, 6), (3, 2))
    ]


@pytest.mark.parametrize("scaled", [True, False])
def test_attention(scaled: bool) -> None:
    change = {"Reshape": -4, "Transpose": -5, "MatMul": -2, "Softmax": -1, "MultiHeadAttention": 1}
    made = assert_applied(
        attention(scaled=scaled), "attention", change | ({"Mul": -2} if scaled else {}), attention_calls()
    )
    (fused,) = made.graph.node
    assert fused.domain == CONTRIB
    values = {attribute.name: helper.get_attribute_value(attribute) for attribute in fused.attribute}
    assert values == {"num_heads": HEADS, "scale": pytest.approx(0.49 if scaled else 1.0)}


@pytest.mark.parametrize("split", [(0, 0, -1, 4), (0, 0, 2, 8), (0, 0, 16, 1), (0, -1, HEADS, 4)])
def test_attention_in_other_heads(split: Sequence[int]) -> None:
    change = {"Reshape": -4, "Transpose": -5, "MatMul": -2, "Softmax": -1, "MultiHeadAttention": 1, "Mul": -2}
    assert_applied(attention(split=split), "attention", change, attention_calls())


NOT_CUT = "shares: its heads are not cut out of and put back into (B, L, C)"
ATTENTION_LEFT: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "heads and numbers exchanged": ({"back": (0, 2, 3, 1)}, (NOT_CUT,)),
    "heads not turned": ({"split": (0, HEADS, -1, 4), "perm": (0, 1, 2, 3)}, (NOT_CUT,)),
    "put back otherwise": ({"back": (0, 1, 2, 3)}, (NOT_CUT,)),
    "put back flat": ({"merged": (-1, WIDTH)}, (NOT_CUT,)),
    "put back as a picture": ({"merged": (0, 0, 4, 4)}, (NOT_CUT,)),
    "heads of fewer channels, and tokens of more": ({"split": (0, -1, HEADS, 2), "merged": (0, -1, WIDTH)}, (NOT_CUT,)),
    "tokens put back in halves": ({"merged": (0, -1, WIDTH // 2)}, (NOT_CUT,)),
    "batches and tokens exchanged": ({"split": (-1, 1, HEADS, 4), "merged": (-1, 1, WIDTH)}, (NOT_CUT,)),
    "keys of all pictures alike": ({"batch_k": 1}, (NOT_CUT,)),
    "a factor of 0": ({"factor": 0.0}, ("shares: its factor is 0, which the kernel takes for none",)),
    "shares of queries": ({"axis": 2}, ()),
    "a mask": ({"mask": True}, ()),
    "shares are an output": ({"outputs": ["shares"]}, ()),
    "the mixed values are an output": ({"outputs": ["mixed"]}, (NOT_CUT,)),
    "the heads put back are an output": ({"outputs": ["back"]}, (NOT_CUT,)),
}


@pytest.mark.parametrize("case", ATTENTION_LEFT)
def test_attention_that_is_left(case: str) -> None:
    options, refused = ATTENTION_LEFT[case]
    assert_left(attention(**options), "attention", refused)


def test_attention_in_half_is_left() -> None:
    assert_left(fp16(attention()), "attention", ("shares: its values are FLOAT16, and the kernel is for FLOAT",))


def test_values_in_other_heads_are_left() -> None:
    plain = attention()
    (split,) = [tensor for tensor in plain.graph.initializer if tensor.name == "split_v"]
    split.CopyFrom(onnx.numpy_helper.from_array(np.array([0, 0, 8, 2]), "split_v"))
    assert_left(plain, "attention", (NOT_CUT,))


# --- pointwise ------------------------------------------------------------------------------------------------------


def way_in(
    *,
    kernel: int = 1,
    bias: str | None = "constant",
    perm: Sequence[int] = (0, 2, 1),
    flat: Sequence[int] = (0, 6, -1),
    outputs: Sequence[str] = (),
    **conv: Any,
) -> onnx.ModelProto:
    """A convolution before the transpose to tokens."""
    group = conv.get("group", 1)
    given = {"constant": ["b"], "computed": ["b.made"], None: []}[bias]
    nodes = [
        *([node("Relu", ["b"], "b.made")] if bias == "computed" else []),
        node("Conv", ["x", "w", *given], "c", **conv),
        node("Reshape", ["c", "flat"], "r"),
        node("Transpose", ["r"], "y", perm=list(perm)),
    ]
    weights = {"w": random(1, 6, 4 // group, kernel, kernel), "flat": np.array(flat)}
    if bias is not None:
        weights["b"] = random(2, 6)
    sides = {name: [f"{name}{k}" for k in range(4 if name == "c" else 3)] for name in ("y", *outputs)}
    return graph_of(nodes, {"x": ["B", 4, "H", "W"]}, sides, weights)


def way_out(
    *, bias: bool = True, perm: Sequence[int] = (0, 2, 1), outputs: Sequence[str] = (), **conv: Any
) -> onnx.ModelProto:
    """A convolution after the transpose back from tokens, to the sides of a picture."""
    nodes = [
        node("Shape", ["x"], "b.ids", start=0, end=1),
        node("Shape", ["x"], "hw.ids", start=2, end=3),
        node("Shape", ["x"], "w.ids", start=3, end=4),
        node("Concat", ["b.ids", "channels", "hw.ids", "w.ids"], "sides", axis=0),
        node("Transpose", ["t"], "turned", perm=list(perm)),
        node("Reshape", ["turned", "sides"], "picture"),
        node("Conv", ["picture", "w", *(["b"] if bias else [])], "y", **conv),
    ]
    weights = {"w": random(1, 6, 4, 1, 1), "channels": np.array([4])} | ({"b": random(2, 6)} if bias else {})
    sides = {name: [f"{name}{k}" for k in range(4)] for name in ("y", *outputs)}
    return graph_of(nodes, {"x": ["B", 1, "H", "W"], "t": ["B", "L", 4]}, sides, weights)


def pictures(channels: int) -> list[dict[str, Array]]:
    return [{"x": random(5, *shape)} for shape in ((1, channels, 3, 5), (2, channels, 4, 4))]


@pytest.mark.parametrize("bias", ["constant", None])
def test_a_pointwise_convolution_on_the_way_in(bias: str | None) -> None:
    change = {"Conv": -1, "MatMul": 1} | ({"Add": 1} if bias else {})
    assert_applied(way_in(bias=bias), "pointwise", change, pictures(4))


@pytest.mark.parametrize("bias", [True, False])
def test_a_pointwise_convolution_on_the_way_out(bias: bool) -> None:
    change = {"Conv": -1, "MatMul": 1} | ({"Add": 1} if bias else {})
    calls = [{**call, "t": random(6, len(call["x"]), call["x"][0].size, 4)} for call in pictures(1)]
    assert_applied(way_out(bias=bias), "pointwise", change, calls)


@pytest.mark.parametrize(
    "plain",
    [
        pytest.param(lambda: way_in(kernel=3, pads=[1, 1, 1, 1]), id="three pixels wide"),
        pytest.param(lambda: way_in(strides=[2, 2]), id="strided"),
        pytest.param(lambda: way_in(pads=[1, 1, 1, 1]), id="padded"),
        pytest.param(lambda: way_in(group=2), id="grouped"),
        pytest.param(lambda: way_in(bias="computed"), id="a computed bias"),
        pytest.param(lambda: way_in(perm=(1, 2, 0)), id="another transpose"),
        pytest.param(lambda: way_in(outputs=["c"]), id="its result is an output"),
        pytest.param(lambda: way_in(outputs=["r"]), id="its result flattened is an output"),
        pytest.param(lambda: way_in(flat=(0, 3, -1)), id="its channels cut in two"),
        pytest.param(lambda: way_in(flat=(1, 6, -1)), id="pictures put together"),
        pytest.param(lambda: way_out(perm=(0, 1, 2)), id="out: another transpose"),
        pytest.param(lambda: way_out(outputs=["picture"]), id="out: what it reads is an output"),
        pytest.param(lambda: way_out(strides=[2, 2]), id="out: strided"),
        pytest.param(lambda: way_out(pads=[0, 0, 1, 1]), id="out: padded"),
    ],
)
def test_a_convolution_that_is_left(plain: Callable[[], onnx.ModelProto]) -> None:
    assert_left(plain(), "pointwise", ())


# --- gated ----------------------------------------------------------------------------------------------------------


def gated(
    *,
    approximate: str = "none",
    halves: Sequence[int] | None = None,
    axis: int = -1,
    swapped: bool = False,
    bias: Sequence[int] = (),
    constant: bool = True,
    width: int = 16,
    sides: Sequence[int | str] = ("B", 2, 4),
    outputs: Sequence[str] = (),
) -> onnx.ModelProto:
    """GEGLU as the export has it."""
    nodes = [
        *([] if constant else [node("Relu", ["weight"], "w")]),
        node("MatMul", ["x", "w"], "p"),
        node("Add", ["p", "b"], "a"),
        node("Split", ["a", *(["halves"] if halves else [])], "s", axis=axis, **({} if halves else {"num_outputs": 2})),
        node("Gelu", ["s.g"], "g", approximate=approximate),
        node("Mul", ["g", "s.v"] if swapped else ["s.v", "g"], "y"),
    ]
    nodes[-3].output[:] = ["s.v", "s.g"]
    weights = {"w" if constant else "weight": random(1, 4, width), "b": random(2, *(bias or (width,)))}
    if halves:
        weights["halves"] = np.array(halves)
    made = {name: [f"{name}{k}" for k in range(len(sides))] for name in ("y", *outputs)}
    return graph_of(nodes, {"x": list(sides)}, made, weights)


def tokens() -> list[dict[str, Array]]:
    return [{"x": random(4, batch, 2, 4)} for batch in (1, 3)]


@pytest.mark.parametrize(
    "options",
    [{}, {"swapped": True}, {"halves": [8, 8]}, {"axis": 2}, {"outputs": ["s.v"]}],
    ids=["exported", "swapped", "two sizes", "axis 2", "the value is an output"],
)
def test_a_gate(options: dict[str, Any]) -> None:
    change = {"Split": -1, "Gelu": -1, "BiasGelu": 1, "MatMul": 1}
    if options.get("outputs"):
        change = {"Gelu": -1, "BiasGelu": 1, "MatMul": 2, "Add": 1}
    assert_applied(gated(**options), "gated", change, tokens())


def of_integers(plain: onnx.ModelProto) -> onnx.ModelProto:
    """The graph after quantize-dynamic."""
    return QuantizeDynamic(smallest=1).apply(plain, []).model


@pytest.mark.parametrize("options", [{}, {"halves": [8, 8]}], ids=["exported", "two sizes"])
def test_a_gate_of_integers(options: dict[str, Any]) -> None:
    """One kernel a half, of the same integers."""
    change = {"Split": -1, "Add": 1, "MatMulInteger": 1, "Cast": 1, "Mul": 2}
    made = assert_applied(of_integers(gated(**options)), "gated", change, tokens())
    quantized = next(each for each in made.graph.node if each.op_type == "DynamicQuantizeLinear")
    products = [each for each in made.graph.node if each.op_type == "MatMulInteger"]
    assert [(each.input[0], each.input[2]) for each in products] == [(quantized.output[0], quantized.output[2])] * 2


def with_zero_points(model: onnx.ModelProto) -> onnx.ModelProto:
    """A product of integers as others write it."""
    for weight in model.graph.initializer:
        if weight.name == "w.zero_point":
            weight.CopyFrom(onnx.numpy_helper.from_array(np.arange(16, dtype=np.int8), weight.name))
    return model


NO_PRODUCT = "s.v: what is split is no product with a constant plus a bias"
NO_HALVES = "s.v: its halves are not equal, or its bias is not one number a channel"


@pytest.mark.parametrize(
    ("plain", "refused"),
    [
        pytest.param(lambda: gated(approximate="tanh"), ("s.v: its Gelu is the approximate one",), id="approximate"),
        pytest.param(lambda: gated(constant=False), (NO_PRODUCT,), id="a computed weight"),
        pytest.param(
            lambda: fp16(gated()), ("s.v: its weights are float16, and the kernel is for float32",), id="half"
        ),
        pytest.param(lambda: with_zero_points(of_integers(gated())), (NO_PRODUCT,), id="zero points of weights"),
        pytest.param(lambda: gated(bias=(1,)), (NO_HALVES,), id="one bias"),
        pytest.param(lambda: gated(bias=(2, 16)), (NO_HALVES,), id="a bias a token"),
        pytest.param(lambda: gated(halves=[15, 1]), (NO_HALVES,), id="unequal"),
        pytest.param(lambda: gated(axis=1), (), id="cut between tokens"),
        pytest.param(lambda: gated(axis=2, sides=["B", 2, 6, 4]), (), id="cut between tokens of rank 4"),
        pytest.param(lambda: gated(width=3), (NO_HALVES,), id="an odd number"),
        pytest.param(lambda: gated(outputs=["s.g"]), (), id="the gate is an output"),
        pytest.param(lambda: gated(outputs=["g"]), (), id="its Gelu is an output"),
    ],
)
def test_a_gate_that_is_left(plain: Callable[[], onnx.ModelProto], refused: tuple[str, ...]) -> None:
    assert_left(plain(), "gated", refused)


# --- hoist_invariants ----------------------------------------------------------------------------------------------


def network(outputs: Sequence[str] = ("y",)) -> onnx.ModelProto:
    """y = x + sin(2 t) + relu(2 c) c: what depends on t alone, on c alone, and c again at the end."""
    nodes = [
        node("Mul", ["t", "two"], "t1"),
        node("Sin", ["t1"], "t2"),
        node("Mul", ["c", "two"], "c1"),
        node("Relu", ["c1"], "c2"),
        node("Add", ["x", "t2"], "xt"),
        node("Mul", ["xt", "c"], "xc"),
        node("Add", ["xc", "c2"], "y"),
    ]
    sides: dict[str, Sequence[int | str]] = {name: [] if name.startswith("t") else ["B", 3] for name in outputs}
    inputs: dict[str, Sequence[int | str]] = {"x": ["B", 3], "t": [], "c": ["B", 3]}
    return graph_of(nodes, inputs, sides, {"two": np.array(2, np.float32)})


def run_all(model: ir.Model, inputs: Mapping[str, Array]) -> dict[str, Array]:
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, {v.name: inputs[v.name] for v in session.get_inputs()}), strict=True))


def test_the_rest_of_what_is_cut_out_is_the_whole() -> None:
    model = inferred(network())
    parts = {name: hoist_invariants(model, [name], f"hoisted.{name}") for name in "tc"}
    assert [value.name for value in model.graph.inputs] == ["x", "c", "hoisted.t.0", "hoisted.c.0"]
    assert [each.op_type for each in model.graph] == ["Add", "Mul", "Add"]
    call = {"x": random(1, 2, 3), "t": np.array(0.4, np.float32), "c": random(2, 2, 3)}
    given = dict(call)
    for name, part in parts.items():
        assert part is not None
        assert [value.name for value in part.graph.inputs] == [name]
        assert [each.op_type for each in part.graph] == ["Mul", {"t": "Sin", "c": "Relu"}[name]]
        given |= run_all(part, call)
    np.testing.assert_allclose(run_all(model, given)["y"], run(network(), call), rtol=1e-6)


@pytest.mark.parametrize("names", [["x"], ["nothing"], []])
def test_nothing_is_cut_where_nothing_depends_on_it_alone(names: list[str]) -> None:
    model = inferred(network())
    before = ir.to_proto(model)
    assert hoist_invariants(model, names, "hoisted") is None
    assert ir.to_proto(model) == before


def test_what_a_branch_reads_from_outside_is_seen() -> None:
    """y = x if t > 0 else -x: the If itself reads t alone."""
    branches = [
        helper.make_graph(
            [node(op, ["x"], name)], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)]
        )
        for op, name in (("Identity", "same"), ("Neg", "other"))
    ]
    nodes = [
        node("Greater", ["t", "zero"], "positive"),
        node("If", ["positive"], "chosen", then_branch=branches[0], else_branch=branches[1]),
        node("Identity", ["chosen"], "y"),
    ]
    plain = graph_of(nodes, {"x": ["B", 3], "t": []}, {"y": ["B", 3]}, {"zero": np.array(0, np.float32)})
    model = inferred(plain)
    part = hoist_invariants(model, ["t"], "hoisted")
    assert part is not None
    assert [each.op_type for each in part.graph] == ["Greater"]
    for timestep in (-1.0, 1.0):
        call = {"x": random(1, 2, 3), "t": np.array(timestep, np.float32)}
        np.testing.assert_array_equal(run_all(model, call | run_all(part, call))["y"], timestep * call["x"])


def test_a_cut_of_two_inputs_together() -> None:
    model = inferred(network())
    part = hoist_invariants(model, ["t", "c"], "hoisted")
    assert part is not None
    assert [value.name for value in part.graph.outputs] == ["hoisted.0", "hoisted.1"]
    assert [value.name for value in model.graph.inputs] == ["x", "c", "hoisted.0", "hoisted.1"]


@pytest.mark.parametrize("also", ["c1", "c2"])
def test_an_output_that_depends_on_one_input_alone_stays_an_output(also: str) -> None:
    plain = network(("y", also))
    model = inferred(plain)
    part = hoist_invariants(model, ["c"], "hoisted")
    call = {"x": random(1, 2, 3), "t": np.array(0.4, np.float32), "c": random(2, 2, 3)}
    given = call if part is None else call | run_all(part, call)
    results = run_all(model, given)
    assert list(results) == ["y", also]
    expected = run_all(inferred(plain), call)
    for name, array in expected.items():
        np.testing.assert_allclose(results[name], array, rtol=1e-6)


# --- real exports ---------------------------------------------------------------------------------------------------

NONE = dict.fromkeys(("attention", "pointwise", "gated", "upsample"), 0)


@pytest.mark.parametrize(
    ("kind", "graph", "applied"),
    [
        ("text", "unet", {"attention": 8, "pointwise": 8, "gated": 4, "upsample": 1}),
        ("text", "vae_decoder", NONE | {"attention": 1, "upsample": 1}),
        ("text", "text_encoder", NONE),
        ("class-conditional", "unet", NONE),
        ("unconditional", "unet", NONE),
    ],
)
def test_an_exported_graph(
    tiny_bundle: Path, kinds: Callable[[str], tuple[Path, Path]], kind: str, graph: str, applied: dict[str, int]
) -> None:
    """Other batches and sizes than the example that was traced."""
    bundle = Bundle.open(tiny_bundle if kind == "text" else kinds(kind)[1])
    spec = bundle.manifest.graphs[graph]
    plain = onnx.load(bundle.file(spec.path))
    made, reports = rewritten(plain)
    assert {name: report.applied for name, report in reports.items()} == applied
    assert all(report.refused == () for report in reports.values()) or graph == "text_encoder"
    assert_shapes_are_inferred(made)
    for batch, height, width in ((1, 6, 10), (3, 4, 4)):
        sizes = {"batch": batch, "height": height, "width": width, "tokens": 16}
        tensors = random_inputs(spec, sizes, 2, CLASSES)
        call = {tensor.name: np.asarray(value) for tensor, value in zip(spec.inputs, tensors, strict=True)}
        assert off_by(run(made, call), run(plain, call)) < CLOSE
