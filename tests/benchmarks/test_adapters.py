"""What docs/adapters.md says adapters cost is what was measured."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.adapters import RESULTS, table

PAGE = Path(__file__).parents[2] / "docs" / "adapters.md"


def test_the_table_is_that_of_the_results() -> None:
    assert table(json.loads(RESULTS.read_text(encoding="utf-8"))) in PAGE.read_text(encoding="utf-8")
