"""The parts that a report is built from, as HTML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from ldm_export.bench.formatting import times, verdict

SAME_PICTURE_DB, LIKE_PICTURE_DB = 45.0, 30.0
"""Beyond what an eye can tell; and what it sees at once."""

Values = Mapping[str, Any]


def figure(value: str, unit: str, words: str, kind: str = "") -> str:
    """``words`` are HTML."""
    return f'<div class="figure"><b class="{kind}">{value}<small>{unit}</small></b><span>{words}</span></div>'


def interval(figure: Values, digits: int) -> str:
    value, low, high = (f"{figure[key]:.{digits}f}" for key in ("value", "low", "high"))
    return f"{value} <small>{low}–{high}</small>"


def ratio(ratio: float, words: tuple[str, str], detail: str) -> str:
    """How many times better, or worse."""
    better = ratio >= 1
    value = times(ratio if better else 1 / ratio).removesuffix("x")
    kind = "good" if ratio >= 1.02 else "warn" if ratio <= 0.98 else ""
    return figure(value, "×", f"<em>{words[not better]}</em><br>{escape(detail)}", kind)


def likeness(psnr_db: float, alike: bool) -> str:
    """What a PSNR means, of a variant that is drawn step by step ``alike`` or of a student."""
    if psnr_db >= SAME_PICTURE_DB:
        return "no eye can tell"
    if psnr_db >= LIKE_PICTURE_DB:
        return "small differences"
    return "visible differences" if alike else "in other steps, so its own pictures"


def chip(record: Values) -> str:
    result = verdict(record)
    return f'<span class="chip {({"ok": "good", "FAIL": "bad"}).get(result, "")}">{result}</span>'


def checks_list(gates: Sequence[Values]) -> str:
    """List judged gates: those that failed and, behind a click, those that did not."""
    short, well = ([gate["says"] for gate in gates if gate["passed"] is passed] for passed in (False, True))
    lists = [
        f'<ul class="checks">{"".join(f"<li{kind}>{mark} {escape(says)}</li>" for says in sentences)}</ul>'
        if sentences
        else ""
        for sentences, kind, mark in ((short, " class=bad", "✗"), (well, "", "✓"))
    ]
    if well:
        count = f"{len(well)} of {len(gates)}" if short else "All" if len(well) > 1 else "The"
        words = "checks" if len(gates) > 1 else "check"
        lists[1] = f'<details class="checks"><summary>✓ {count} {words} passed</summary>{lists[1]}</details>'
    return "".join(lists)


def table(heads: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]], text: Sequence[int] = (0,)) -> str:
    """Cells are HTML; all but the ``text`` columns are right-aligned. Heads have their unit beneath."""

    def cells(values: Iterable[str], tag: str) -> str:
        return "".join(f"<{tag}{'' if k in text else ' class=n'}>{value}</{tag}>" for k, value in enumerate(values))

    head = cells(
        (f"{escape(name)}<small>{escape(unit)}</small>" if unit else escape(name) for name, unit in heads), "th"
    )
    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll" tabindex="0"><table><tr>{head}</tr>{body}</table></div>'
