"""A tuning's document as one self-contained HTML page: the front, what is on it with its pictures, and all else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from ldm_export.bench.blocks import figure, interval, ratio, table
from ldm_export.bench.card_page import FIGURES
from ldm_export.bench.charts import Point, scatter
from ldm_export.bench.formatting import megabytes, milliseconds, times
from ldm_export.bench.style import STYLE
from ldm_export.verify.fidelity import KINDS

CHOSEN, FRONT, OTHER = 2, 1, 0
"""Colours of points."""
ABOVE = 0.08
"""Share of the scale by which pictures equal to the truth's are drawn above the best that are not, in decibels."""
IDENTICAL_DB = 100.0
BEYOND = "changes pictures by more than rounding"
"""Why something is not chosen where no pictures are judged."""

Values = Mapping[str, Any]


def fastest_first(point: Values) -> float:
    """Key to sort points by: ratios were timed in turn, milliseconds of two points perhaps not in the same minute."""
    return -float(point["faster"])


class TunePage:
    """The sections of the page."""

    def __init__(self, document: Values):
        self.document = document
        self.points: Sequence[Values] = document["points"]
        self.chosen = next(point for point in self.points if point["chosen"])
        self.front = sorted((point for point in self.points if point["on_front"]), key=fastest_first)
        asked = [KINDS[gate["key"]].figure for gate in document["budgets"]]
        self.names = [name for name in FIGURES if any(name in point["held_out"] for point in self.points)]
        self.charted = [name for name in dict.fromkeys(asked) if name in self.names] or self.names[:1]
        self.numbers = {point["name"]: f"{k}" for k, point in enumerate(self.front, 1)}

    def page(self) -> str:
        title = f"What {self.document['bundle']} can be"
        body = (
            self._head(title),
            self._panel(),
            self._charts(),
            self._front(),
            self._pictures(),
            self._rest(),
            self._made(),
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<title>{escape(title)}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f"<body><main>{''.join(body)}</main></body></html>\n"
        )

    def _head(self, title: str) -> str:
        truth = self.document["truth"]
        asked = " and ".join(f"{gate['key']} {gate['limit']:g}" for gate in self.document["budgets"])
        text = (
            f"The truth is the untouched bundle, {truth['sampler']} in {truth['steps']} steps. Budget: "
            f"{asked or 'no change beyond rounding'}; goal: {self.document['goal']}."
        )
        return f'<div class="eyebrow">ldm-export tune</div><h1>{escape(title)}</h1><p class="lead">{escape(text)}</p>'

    def _panel(self) -> str:
        point, first = self.chosen, self.points[0]
        was = f"than the untouched bundle, timed in turn: {milliseconds(point['ms'])} ms a picture"
        parts = [ratio(point["faster"], ("faster", "slower"), was)]
        parts.append(
            ratio(first["bytes"] / point["bytes"], ("smaller", "larger"), f"{megabytes(point['bytes'])} MB on disk")
        )
        for name in self.charted:
            if name in point["held_out"]:
                head, unit, digits = FIGURES[name]
                value = point["held_out"][name]["value"]
                parts.append(figure(f"{value:.{digits}f}", "", f"<em>{escape(head)}</em>, {escape(unit)}, held out"))
        if point["memory_mb"] is not None:
            parts.append(figure(megabytes(point["memory_mb"] * 1e6), "MB", "<em>peak memory</em> of a process"))
        return (
            f'<div class="panels"><section class="card panel"><header><h3>{escape(point["name"])}</h3>'
            f'<span>chosen</span></header><div class="figures">{"".join(parts)}</div></section></div>'
            f"<pre tabindex='0'>{escape(self.document.get('generate', ''))}</pre>"
        )

    # --- front ------------------------------------------------------------------------------------------------------

    def _charts(self) -> str:
        cards = "".join(f"<div class='card'>{self._chart(name)}</div>" for name in self.charted)
        words = (
            "Figures are of the held-out half where a point was judged on it, of the tuning half else (grey). "
            "The line joins the front; numbers are those of the table. Hollow points break the budget."
        )
        return f"<h2>The front</h2><p class='soft'>{words}</p><div class='two'>{cards}</div>" if cards else ""

    def _chart(self, name: str) -> str:
        head, unit, _ = FIGURES[name]
        judged = [(point, (point["held_out"] or point["tuning"])[name]["value"]) for point in self._judged()]
        if name.endswith("_db"):
            others = [value for _, value in judged if value < IDENTICAL_DB] or [IDENTICAL_DB]
            top = max(others) + ABOVE * (max(others) - min(others))
            judged = [(point, min(value, top)) for point, value in judged]
        drawn = {point["name"]: self._mark(point, value) for point, value in judged}
        line = [drawn[point["name"]] for point in self.front]
        kind = next(kind for kind in KINDS.values() if getattr(kind, "figure", "") == name)
        better = "higher" if kind.at_least else "lower"
        line = self._envelope(line, at_least=kind.at_least)
        return scatter(
            [*drawn.values()], "times as fast as the untouched bundle", f"{head}, {unit}; {better} is better", line
        )

    def _mark(self, point: Values, value: float) -> Point:
        colour = CHOSEN if point["chosen"] else FRONT if point["on_front"] else OTHER
        return Point(
            point["faster"], value, self.numbers.get(point["name"], ""), colour, bool(point["why"]), title=point["name"]
        )

    @staticmethod
    def _envelope(points: Sequence[Point], *, at_least: bool) -> list[Point]:
        """Those that are better in this figure than all that are faster."""
        found: list[Point] = []
        for point in points:
            if not found or (point.y > found[-1].y if at_least else point.y < found[-1].y):
                found.append(point)
        return [Point(each.x, each.y, "", FRONT) for each in found]

    def _judged(self) -> list[Values]:
        return [point for point in self.points if point["tuning"] and point["faster"] and not point["failed"]]

    def _front(self) -> str:
        if not self.front:
            return ""
        heads = [
            ("", ""), ("", ""), ("a picture", "ms"), ("as fast", "times"), ("calls", ""), ("files", "MB"),
            ("memory", "MB"), *(FIGURES[name][:2] for name in self.names), ("", ""),
        ]  # fmt: skip
        rows = [
            [
                self.numbers[point["name"]],
                ("<b>chosen:</b> " if point["chosen"] else "") + escape(point["name"]),
                *self._cost(point),
                "" if point["memory_mb"] is None else megabytes(point["memory_mb"] * 1e6),
                *(self._cell(point, name) for name in self.names),
                "within the budget" if not point["why"] else "breaks it",
            ]
            for point in self.front
        ]
        return (
            "<h2>What is on it</h2><p class='soft'>On prompts and seeds that nothing was chosen by, each with its 95 % "
            "interval; timed in turn with the untouched bundle: the ratio is the one to quote, milliseconds are of "
            "their minute.</p><div class='card'>"
            f"{table(heads, rows, text=(0, 1, len(heads) - 1))}</div>"
        )

    @staticmethod
    def _cost(point: Values) -> list[str]:
        calls = "" if not point["calls"] else f"{point['calls']}"
        return [f"<b>{milliseconds(point['ms'])}</b>", times(point["faster"]), calls, megabytes(point["bytes"])]

    @staticmethod
    def _cell(point: Values, name: str) -> str:
        found = point["held_out"].get(name)
        if found is None:
            return ""
        digits = FIGURES[name][2]
        plain = found["low"] == found["value"] == found["high"]
        return f"{found['value']:.{digits}f}" if plain else interval(found, digits)

    def _pictures(self) -> str:
        if not self.front:
            return ""
        conditions = self.document["pictures"]["held_out"]
        cards = []
        shown = [*self.front, *(each for each in (self.chosen, self.points[0]) if not each["on_front"])]
        for point in {point["name"]: point for point in shown}.values():
            strip = "".join(
                f'<div><img alt="{escape(str(said))}" src="data:image/png;base64,{escape(png)}">'
                f'<i title="{escape(str(said))}">{escape(str(said))}</i></div>'
                for said, png in zip(conditions, point["png"], strict=False)
            )
            columns = f"grid-template-columns:repeat({max(len(point['png']), 1)},minmax(0,1fr))"
            number = self.numbers.get(point["name"], "")
            cards.append(
                f'<figure class="card"><div class="strip" style="{columns}">{strip}</div>'
                f"<figcaption>{number} {escape(point['name'])} <span class='soft'>· "
                f"{milliseconds(point['ms'])} ms</span></figcaption></figure>"
            )
        return (
            "<h2>The same prompts and seeds</h2><p class='soft'>The first of the held-out half, the fastest point "
            'first.</p><div class="pictures" style="grid-template-columns:'
            f'repeat(auto-fill,minmax(min(100%,22rem),1fr))">{"".join(cards)}</div>'
        )

    # --- all else ---------------------------------------------------------------------------------------------------

    def _rest(self) -> str:
        others = [point for point in self.points if not point["on_front"] and not point["chosen"]]
        judged = self.document["judged"]
        rows = [
            [
                escape(point["name"]),
                *(self._cost(point) if point["ms"] else [""] * 4),
                self._words(point["why_not"] if judged or point["failed"] else BEYOND),
            ]
            for point in sorted(others, key=fastest_first)
        ]
        rows += [[escape(name), "", "", "", "", self._words(why)] for name, why in self.document["left_out"].items()]
        heads = [("", ""), ("a picture", "ms"), ("as fast", "times"), ("calls", ""), ("files", "MB"), ("why not", "")]
        return f"<h2>What else was tried</h2><div class='card'>{table(heads, rows, text=(0, 5))}</div>" if rows else ""

    @staticmethod
    def _words(sentence: str) -> str:
        """A cell that may be of several lines."""
        return f'<div style="white-space:normal;min-width:20rem">{escape(sentence)}</div>'

    def _made(self) -> str:
        machine, count = self.document["machine"], self.document["pictures"]
        facts = {
            "Machine": f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}",
            "Versions": ", ".join(f"{name} {version}" for name, version in self.document["versions"].items()),
            "Pictures": f"{len(count['tuning'])} to tune by, {len(count['held_out'])} held out",
            "Took": f"{self.document['seconds']:.0f} s, without what was measured before",
        }
        listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
        notes = "".join(f"<p class='soft'>{escape(note)}</p>" for note in self.document["notes"])
        return f"<h2>Made with</h2>{notes}<dl>{listed}</dl><pre tabindex='0'>{escape(self.document['command'])}</pre>"


def tune_page(document: Values) -> str:
    """The page of a document that :meth:`ldm_export.tune.session.Tuning.run` made."""
    return TunePage(document).page()
