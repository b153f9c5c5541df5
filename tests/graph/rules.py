"""What the tests of rules share: a graph before and after all of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ldm_export.graph.cpu import RULES
from ldm_export.graph.cpu.matching import CONTRIB
from ldm_export.graph.cpu.rule import RuleReport, apply_rules
from tests.graph.graphs import Array, copy_of, off_by, run

CLOSE = 1e-5
"""Root mean square of the difference as a share; 3e-7 is what was seen."""


def inferred(plain: onnx.ModelProto) -> ir.Model:
    """The graph with the types of all values, as the target is made from."""
    model = ir.from_proto(plain)
    ShapeInferencePass()(model)
    return model


def rewritten(plain: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, RuleReport]]:
    """A graph after all rules, which applied again change nothing."""
    model = inferred(plain)
    model.opset_imports.setdefault(CONTRIB, 1)
    reports = {report.name: report for report in apply_rules(model, RULES)}
    once = ir.to_proto(model)
    assert {report.applied for report in apply_rules(model, RULES)} == {0}
    assert ir.to_proto(model) == once
    return once, reports


def kinds_of(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def assert_applied(
    plain: onnx.ModelProto, rule: str, change: Mapping[str, int], calls: Sequence[Mapping[str, Array]]
) -> onnx.ModelProto:
    """The rule fits once, no other does, operators change in number by ``change``, and numbers stay."""
    made, reports = rewritten(plain)
    assert {name: report.applied for name, report in reports.items()} == {
        name: int(name == rule) for name in (each.name for each in RULES)
    }
    assert all(report.refused == () for report in reports.values())
    assert [value.name for value in made.graph.output] == [value.name for value in plain.graph.output]
    counts = kinds_of(made)
    counts.subtract(kinds_of(plain))
    assert {kind: number for kind, number in counts.items() if number} == change
    if CONTRIB not in {each.domain for each in made.graph.node}:
        onnx.checker.check_model(made, full_check=True)
    assert_shapes_are_inferred(made)
    for call in calls:
        assert off_by(run(made, call), run(plain, call)) < CLOSE
    return made


def assert_shapes_are_inferred(made: onnx.ModelProto) -> None:
    """No shape is left over from the plain graph, a contrib operator's apart, of which ONNX knows nothing."""
    contrib = {name for each in made.graph.node if each.domain == CONTRIB for name in each.output}
    weights = {tensor.name for tensor in made.graph.initializer}
    written = [value for value in made.graph.value_info if value.name not in weights]
    bare = copy_of(made)
    del bare.graph.value_info[:]
    bare.graph.value_info.extend(value for value in written if value.name in contrib)
    again = onnx.shape_inference.infer_shapes(bare, check_type=True, strict_mode=True, data_prop=True)
    shapes = {value.name: value.type.tensor_type for value in again.graph.value_info}
    for value in written:
        there, fresh = value.type.tensor_type, shapes[value.name]
        assert there.elem_type == fresh.elem_type
        for side, other in zip(there.shape.dim, fresh.shape.dim, strict=True):
            assert side.dim_value == other.dim_value or not other.dim_value, value.name


def assert_left(plain: onnx.ModelProto, rule: str, refused: tuple[str, ...]) -> None:
    """No rule fits, and this one says ``refused``."""
    made, reports = rewritten(plain)
    assert {report.applied for report in reports.values()} == {0}
    assert {name: report.refused for name, report in reports.items() if report.refused} == (
        {rule: refused} if refused else {}
    )
    assert [each.op_type for each in made.graph.node] == [each.op_type for each in plain.graph.node]
