"""A rule: an operator to begin at, a pattern around it, a check that says why not, and what takes its place."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import onnx_ir as ir
from onnx_ir.passes.common import ShapeInferencePass

from ldm_export.graph.cpu.matching import remove_unused


class RefusedError(Exception):
    """Why a pattern that was found is left as it is."""


class Rule(Protocol):
    """A rule.

    Attributes
    ----------
    name : in reports
    op_type : of the nodes that it begins at
    """

    @property
    def name(self) -> str: ...

    @property
    def op_type(self) -> str: ...

    def rewrite(self, node: ir.Node) -> bool:
        """Rewrite what is around a node; False if it is no such pattern.

        Raises
        ------
        RefusedError
            If it is one that cannot be rewritten.
        """
        ...


@dataclass(frozen=True)
class RuleReport:
    """How often a rule was applied, and where it was not, and why."""

    name: str
    applied: int
    refused: tuple[str, ...]


def apply_rules(model: ir.Model, rules: Sequence[Rule]) -> list[RuleReport]:
    """Rewrite a graph whose shapes were inferred, in place, rule after rule; those of what is new are inferred too."""
    reports = []
    for rule in rules:
        applied, refused = 0, []
        for node in [node for node in model.graph if node.op_type == rule.op_type]:
            if node.graph is None:  # a rewrite before has taken it out
                continue
            try:
                applied += rule.rewrite(node)
            except RefusedError as reason:
                refused.append(f"{node.outputs[0].name}: {reason}")
        remove_unused(model)
        reports.append(RuleReport(rule.name, applied, tuple(refused)))
    if any(report.applied for report in reports):
        ShapeInferencePass()(model)
    return reports
