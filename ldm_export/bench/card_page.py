"""A fidelity card's document as one self-contained HTML page, in the manner of the bench's report."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from ldm_export.bench.blocks import checks_list, figure, ratio, table
from ldm_export.bench.card import value_of
from ldm_export.bench.charts import Point, scatter
from ldm_export.bench.formatting import megabytes, milliseconds, times
from ldm_export.bench.report import COLOURS
from ldm_export.bench.style import STYLE

IDENTICAL_DB = 100.0
"""What equal pictures have."""
FIGURES = {
    "psnr_db": ("PSNR", "median, dB", 1),
    "psnr_worst_db": ("worst", "dB", 1),
    "ssim": ("SSIM", "median", 4),
    "perceptual_distance": ("perceptual", "median", 4),
    "frechet_distance": ("Fréchet", "distance", 1),
    "frechet_ratio": ("Fréchet", "ratio to truth", 3),
    "retrieval_at_5": ("R@5", "share", 3),
    "alignment": ("alignment", "cosine", 3),
}
"""Figure -> its head, what stands beneath it, and digits after the point."""
OF_TRUTH = ("frechet_distance", "retrieval_at_5", "alignment")
"""Figures that say something of the truth itself, too."""

Values = Mapping[str, Any]


class CardPage:
    """The sections of the page."""

    def __init__(self, document: Values):
        self.document = document
        self.truths = [row for row in document["rows"] if row["kind"] == "checkpoint"]
        self.rows = [row for row in document["rows"] if row["kind"] == "bundle"]
        self.colours = {row["name"]: 1 + k % COLOURS for k, row in enumerate(self.rows)}
        self.colours |= {row["name"]: 0 for row in self.truths}
        self.names = [name for name in FIGURES if any(name in row["figures"] for row in self.rows)]

    def page(self) -> str:
        body = (
            self._head(),
            self._panel(self.rows[0]),
            self._quality(),
            self._charts(),
            self._pictures(),
            self._performance(),
            self._commands(),
            self._made(),
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<title>{escape(self._title())}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f"<body><main>{''.join(body)}</main></body></html>\n"
        )

    def _title(self) -> str:
        return f"Fidelity of {self.document['bundle']}"

    def _head(self) -> str:
        count, truth = len(self.document["conditions"]), self.truths[0]
        text = (
            f"{count} pictures a row, of the same prompts and seeds, so from the same noise, against the truth: "
            f"{self.document['checkpoint']} in PyTorch with {truth['sampler']} in {truth['steps']} steps."
        )
        return (
            f'<div class="eyebrow">ldm-export card</div><h1>{escape(self._title())}</h1>'
            f'<p class="lead">{escape(text)}</p>{checks_list(self.document.get("gates", []))}'
        )

    def _panel(self, row: Values) -> str:
        found = row["figures"]
        latency = self.document["performance"]["latency"][row["name"]]
        parts = [figure(*self._decibels(found["psnr_db"]["value"]), "<em>median PSNR</em> to the truth")]
        parts.append(figure(*self._decibels(found["psnr_worst_db"]["value"]), "<em>worst picture</em>"))
        if "ssim" in found:
            parts.append(figure(f"{found['ssim']['value']:.4f}", "", "<em>median SSIM</em>"))
        if "frechet_ratio" in found:
            words = "<em>Fréchet distance</em>, times the truth's own"
            parts.append(figure(f"{found['frechet_ratio']['value']:.3f}", "×", words))
        spent = milliseconds(latency["stages"]["total"]["median_ms"])
        parts.append(ratio(latency["faster"], ("faster", "slower"), f"than PyTorch's truth: {spent} ms a picture"))
        memory = value_of(self.document, row, "memory_mb")
        if memory is not None:
            parts.append(figure(megabytes(memory * 1e6), "MB", "<em>peak memory</em> of a process"))
        return (
            f'<div class="panels"><section class="card panel"><header><h3>{self._name(row)}</h3>'
            f"<span>{escape(self._passes(row))}</span></header>"
            f'<div class="figures">{"".join(parts)}</div></section></div>'
        )

    @staticmethod
    def _decibels(value: float) -> tuple[str, str]:
        return ("same", "") if value >= IDENTICAL_DB else (f"{value:.1f}", "dB")

    # --- quality ----------------------------------------------------------------------------------------------------

    def _quality(self) -> str:
        heads = [("", ""), *(FIGURES[name][:2] for name in self.names)]
        rows = [
            [
                self._name(row) + (f"<br><small>{escape(self._passes(row))}</small>" if row in self.rows else ""),
                *(self._cell(row, name) for name in self.names),
            ]
            for row in (*self.truths, *self.rows)
        ]
        notes = dict.fromkeys(note for row in self.document["rows"] for note in row["notes"])
        listed = "".join(f"<p class='soft'>{escape(note)}</p>" for note in notes)
        return (
            "<h2>How true</h2><p class='soft'>Each with its 95 % interval. PSNR, SSIM and the perceptual distance are "
            "of each picture to the truth's; perceptual and Fréchet distances are in "
            f"{escape(self.document['features'])}, so comparable with no published LPIPS or FID. "
            "A rerun gives the same figures to the last digit.</p>"
            f"<div class='card'>{table(heads, rows)}</div>{listed}"
        )

    def _cell(self, row: Values, name: str) -> str:
        found = row["figures"].get(name)
        if found is None or (row["kind"] == "checkpoint" and name not in OF_TRUTH):
            return ""
        digits = FIGURES[name][2]
        plain = found["low"] == found["value"] == found["high"]
        value, low, high = (f"{found[key]:.{digits}f}" for key in ("value", "low", "high"))
        return value if plain else f"{value}<br><small>{low}–{high}</small>"

    def _charts(self) -> str:
        if len(self.rows) < 2:
            return ""
        cards = []
        for name, words, title in (
            ("psnr_db", "median PSNR, dB, higher is better", "Likeness against latency"),
            ("frechet_distance", "Fréchet distance, lower is better", "Quality against latency"),
        ):
            rows = self.rows if name == "psnr_db" else [*self.truths, *self.rows]
            points = [
                Point(self._latency(row), row["figures"][name]["value"], row["name"], self.colours[row["name"]])
                for row in rows
                if name in row["figures"]
            ]
            if points:
                chart = scatter(points, "ms for one picture", words)
                cards.append(f"<div class='card'><h3>{title}</h3>{chart}</div>")
        return f"<h2>What speed costs</h2><div class='two'>{''.join(cards)}</div>"

    def _latency(self, row: Values) -> float:
        value: float = self.document["performance"]["latency"][row["name"]]["stages"]["total"]["median_ms"]
        return value

    # --- pictures ---------------------------------------------------------------------------------------------------

    def _pictures(self) -> str:
        parts = []
        for truth in self.truths:
            rows = [truth, *(row for row in self.rows if self._size(row) == self._size(truth))]
            columns = f"grid-template-columns:repeat({len(rows)},minmax(0,1fr))"
            for k in range(len(truth["png"])):
                condition = str(self.document["conditions"][k])
                strip = "".join(self._picture(row, k, condition) for row in rows)
                seed = self.document["options"]["seed"] + k
                caption = f"{escape(condition) or 'unconditional'} <span class='soft'>· seed {seed}</span>"
                parts.append(
                    f'<figure class="card"><div class="strip" style="{columns}">{strip}</div>'
                    f"<figcaption>{caption}</figcaption></figure>"
                )
        widest = max(15, 6 * (1 + len(self.rows) // len(self.truths)))
        return (
            f"<h2>The same prompts and seeds</h2><p class='soft'>The first of each row.</p>"
            f'<div class="pictures" style="grid-template-columns:repeat(auto-fill,minmax(min(100%,{widest}rem),1fr))">'
            f"{''.join(parts)}</div>"
        )

    def _picture(self, row: Values, k: int, condition: str) -> str:
        alt, name = escape(f"{condition}, {row['name']}"), escape(row["name"])
        return (
            f'<div><img alt="{alt}" src="data:image/png;base64,{escape(row["png"][k])}">'
            f'<i title="{name}">{self._name(row)}</i></div>'
        )

    @staticmethod
    def _size(row: Values) -> tuple[int, int]:
        return row["height"], row["width"]

    # --- machine ----------------------------------------------------------------------------------------------------

    def _performance(self) -> str:
        performance = self.document["performance"]
        on_gpu = any(found["device_bytes"] for found in performance["memory"].values())
        rows = []
        for row in (*self.truths, *self.rows):
            name = row["name"]
            latency, memory = performance["latency"][name], performance["memory"][name]
            total = latency["stages"]["total"]
            rows.append(
                [
                    f"{self._name(row)}<br><small>{escape(self._ran(row))}</small>",
                    escape(str(latency["calls"])),
                    f"<b>{milliseconds(total['median_ms'])}</b>",
                    milliseconds(total["p90_ms"]),
                    times(latency["faster"]) if row in self.rows else "",
                    megabytes(memory["peak_rss_bytes"]),
                    *([megabytes(memory["device_bytes"])] if on_gpu else []),
                    f"{memory['cold_start_ms'] / 1e3:.2f}",
                ]
            )
        heads = [
            ("", ""), ("calls", ""), ("a picture", "ms"), ("p90", "ms"),
            ("against the truth", "times as fast"), ("peak memory", "MB"),
            *([("on the GPU", "MB")] if on_gpu else []), ("cold start", "s"),
        ]  # fmt: skip
        machine = performance["machine"]
        where = f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}"
        return (
            f"<h2>How fast, on this machine</h2><p class='soft'>{escape(where)}. All rows are timed in turn, one "
            "picture at a time; the ratio is the median over the rounds, each against the truth of the same round. "
            "Memory is of a process of its own that draws two pictures. These figures are the machine's: a rerun "
            f"elsewhere gives others.</p><div class='card'>{table(heads, rows)}</div>"
        )

    @staticmethod
    def _ran(row: Values) -> str:
        return str(row["backend"]) + ("" if row["threads"] is None else f", threads: {row['threads']}")

    def _commands(self) -> str:
        listed = "".join(
            f"<h3 style='margin-top:1rem'>{self._name(row)}</h3><pre tabindex='0'>{escape(row['command'])}</pre>"
            for row in self.rows
        )
        return (
            "<h2>Run it again</h2><p class='soft'>All of this card:</p>"
            f"<pre tabindex='0'>{escape(self.document['command'])}</pre>"
            f"<p class='soft' style='margin-top:1rem'>The pictures above, row by row:</p>{listed}"
        )

    def _made(self) -> str:
        facts = {
            "Versions": ", ".join(f"{name} {version}" for name, version in self.document["versions"].items()),
            **({"GPU": self.document["machine"]["gpu"]} if self.document["machine"]["gpu"] else {}),
            **({"Alignment judged by": judge} if (judge := self.document["alignment_judge"]) else {}),
            **{f"Left out: {name}": why for name, why in self.document["left_out"].items()},
        }
        listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
        return f"<h2>Made with</h2><dl>{listed}</dl>"

    def _name(self, row: Values) -> str:
        dot = f'<span class="dot" style="background:var(--c{self.colours[row["name"]]})"></span>'
        return dot + escape(row["name"])

    @staticmethod
    def _passes(row: Values) -> str:
        """Passes that made the bundle what it is; the first record is of the untouched model."""
        kept = [str(record.get("name")) for record in row["passes"][1:] if record.get("kept", True)]
        return ", ".join(kept) or "as exported"


def card_page(document: Values) -> str:
    """The page of a document that :meth:`ldm_export.bench.card.Card.run` made."""
    return CardPage(document).page()
