"""The passes of a recipe as a table: what each bought and cost, and why some were undone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table

from ldm_export.cli.options import console
from ldm_export.verify.latency import Latency

COLUMNS = ("pass", "", "steps", "call\nms", "picture\nms", "faster", "MB", "Fréchet", "R@5", "PSNR")


def print_passes(records: Sequence[Mapping[str, Any]]) -> None:
    """``records`` as a bundle's manifest has them, the teacher's first. *Faster* is against the stage before, in turn;
    PSNR against the teacher's pictures, in dB."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)  # fits 80 columns
    for column in COLUMNS:
        table.add_column(column, justify="left" if column in COLUMNS[:2] else "right", no_wrap=True)
    for record in records:
        table.add_row(str(record.get("name")), "kept" if record.get("kept", True) else "undone", *_figures(record))
    console.print(table)
    for record in records:
        if not record.get("kept", True):
            console.print(f"{record.get('name')} was undone: {record.get('why')}")


def _figures(record: Mapping[str, Any]) -> list[str]:
    score = record.get("score")
    if score is None:
        return [""] * (len(COLUMNS) - 2)
    latency, faster = Latency.from_dict(score["latency"]), record.get("faster")
    recalled, psnr_db = score["retrieval_at_5"], score["psnr_to_teacher_db"]
    return [
        str(latency.calls),
        f"{latency.denoiser_ms:.2f}",
        f"{latency.total_ms:.1f}",
        "" if faster is None else f"{faster:.2f}x",
        f"{score['bytes'] / 1e6:.1f}",
        f"{score['frechet_distance']:.1f}",
        "" if recalled is None else f"{recalled:.3f}",
        "" if psnr_db is None else f"{psnr_db:.1f}",
    ]
