"""Docstrings read alone: their first word is a noun or a verb, not what goes on from the name above."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted([*(ROOT / "ldm_export").rglob("*.py"), *(ROOT / "reference").rglob("*.py")])
GOES_ON = {"And", "As", "At", "By", "For", "From", "In", "Into", "Of", "On", "Or", "To", "Which", "With"}
"""First words that go on from something."""


def docstrings(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and text of every docstring, those of attributes included."""
    for node in ast.walk(tree):
        for statement in getattr(node, "body", ()) if not isinstance(node, (ast.Lambda, ast.IfExp)) else ():
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_begin_with_a_noun_or_a_verb(file: Path) -> None:
    found = docstrings(ast.parse(file.read_text(encoding="utf-8")))
    assert [f"{line}: {text[:60]}" for line, text in found if {text.split()[0]} & GOES_ON] == []


def test_what_goes_on_is_seen() -> None:
    tree = ast.parse('A = 1\n"""Of B."""\ndef f():\n    """By name."""\n')
    assert [text for _, text in docstrings(tree)] == ["Of B.", "By name."]
