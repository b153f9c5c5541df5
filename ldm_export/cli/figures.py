"""What a bench found, on the console."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.table import Table

from ldm_export.bench.summary import HEADS, parity_lines, summary_rows
from ldm_export.cli.options import console


def print_bench(document: dict[str, Any]) -> None:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    rows = summary_rows(document)
    columns = [column for column in zip(HEADS, *rows, strict=True) if any(column[1:])]
    for head, *_ in columns:
        table.add_column(head, justify="right" if head else "left", no_wrap=bool(head), min_width=None if head else 12)
    for row in zip(*(cells for _, *cells in columns), strict=True):
        table.add_row(*row)
    console.print(table)
    for variant, why in document["left_out"].items():
        console.print(f"{variant} is left out: {why}", soft_wrap=True)
    for line in parity_lines(document):
        console.print(line)


def without_pictures(document: dict[str, Any]) -> dict[str, Any]:
    """The document without what is not for reading."""
    results = document["results"]
    pictures = {
        variant: {key: value for key, value in found.items() if key != "png"}
        for variant, found in results["pictures"].items()
    }
    return {**document, "results": {**results, "pictures": pictures}}
