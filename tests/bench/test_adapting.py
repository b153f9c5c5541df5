"""What docs/adapting.md says adapting and meta-learning bring is what was measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import adapting, meta_learning

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "adapting.md").read_text(encoding="utf-8")


def results(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text(encoding="utf-8"))


def test_the_table_of_adapting_is_that_of_the_results() -> None:
    assert adapting.table(results("adapting")) in PAGE


@pytest.mark.parametrize("kind", ["emoji", "fashion"])
def test_the_tables_of_meta_learning_are_those_of_the_results(kind: str) -> None:
    document = results(f"meta_{kind}")
    assert meta_learning.table(document["summary"]) in PAGE
    again = meta_learning.summarised(document["rows"], kind)
    assert again["rates"] == document["summary"]["rates"]
    assert json.loads(json.dumps(again)) == document["summary"]
