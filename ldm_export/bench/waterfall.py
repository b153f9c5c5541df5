"""What the passes of a recipe bought and cost, from the records that a bundle's manifest keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ldm_export.bench.charts import Point
from ldm_export.bench.formatting import megabytes, milliseconds, times

Records = Sequence[Mapping[str, Any]]


def waterfall(records: Records, colour: int) -> str:
    """A bar a pass, HTML; empty for bundles that no recipe made. ``records`` are a manifest's, the teacher's first."""
    scored = [record for record in records if record.get("score")]
    if len(scored) < 2:
        return ""
    first = scored[0]["score"]["latency"]["total_ms"]
    longest = max(record["score"]["latency"]["total_ms"] for record in scored)
    rows = []
    for record in records:
        kept = record.get("kept", True)
        score = record.get("score")
        spent = score["latency"]["total_ms"] if score else 0.0
        total = f"{milliseconds(spent)} ms · {times(first / spent)}" if score else ""
        shade = f"var(--c{colour if kept and record is not records[0] else 0})"
        notes = ([_quality(score)] if score else []) + ([] if kept else [f"undone: {record.get('why')}"])
        name = escape(str(record.get("name")))
        rows.append(
            f'<div{"" if kept else " class=undone"}><div class="bar-head"><span>{name}</span>'
            f'<b>{total}</b></div><div class="track">'
            f'<i style="width:{100 * spent / longest:.2f}%;background:{shade}"></i></div>'
            f'<div class="note">{escape(" · ".join(notes))}</div></div>'
        )
    return f'<div class="bars">{"".join(rows)}</div>'


def pareto_points(records: Records, colour: int) -> list[Point]:
    """Fréchet distance against milliseconds of every stage that has a score; the untouched model is of colour 0."""
    return [
        Point(
            record["score"]["latency"]["total_ms"],
            record["score"]["frechet_distance"],
            str(record.get("name")),
            colour if number else 0,
            hollow=not record.get("kept", True),
        )
        for number, record in enumerate(records)
        if record.get("score")
    ]


def _quality(score: Mapping[str, Any]) -> str:
    recalled = score.get("retrieval_at_5")
    parts = [
        f"{score['steps']} steps",
        f"{megabytes(score['bytes'])} MB",
        f"Fréchet {score['frechet_distance']:.1f}",
        *([] if recalled is None else [f"R@5 {recalled:.3f}"]),
    ]
    return " · ".join(parts)
