"""What docs/few-calls.md says fewer calls cost is what was measured."""

from __future__ import annotations

import json
import re
from pathlib import Path

from benchmarks.few_calls import table

ROOT = Path(__file__).parents[2]


def test_the_tables_are_those_of_the_results() -> None:
    page = (ROOT / "docs" / "few-calls.md").read_text(encoding="utf-8")
    results = re.findall(r"\.\./(benchmarks/results/few_calls_\w+\.json)", page)
    assert len(results) == 3
    for name in results:
        assert table(json.loads((ROOT / name).read_text(encoding="utf-8"))["rows"]) in page, name
