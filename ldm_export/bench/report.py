"""A bench's document as one self-contained HTML page: no script, no network, light and dark, readable on a phone."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from ldm_export.bench.blocks import checks_list, chip, figure, interval, likeness, ratio, table
from ldm_export.bench.charts import Curve, Point, curves, scatter
from ldm_export.bench.formatting import decibels, megabytes, milliseconds, times
from ldm_export.bench.harness import results_by_variant
from ldm_export.bench.style import STYLE
from ldm_export.bench.waterfall import pareto_points, waterfall

COLOURS = 5
STAGES = {"text": "text", "denoiser": "denoiser, all calls", "loop": "sampling loop outside", "decode": "decoding"}
IDENTICAL_DB = 100.0
"""Where equal pictures are drawn."""
QUALITY = {
    "frechet_distance": ("Fréchet", 1),
    "retrieval_at_1": ("R@1", 3),
    "retrieval_at_5": ("R@5", 3),
    "alignment": ("alignment", 3),
    "reconstruction_psnr_db": ("reconstruction dB", 1),
}

Values = Mapping[str, Any]


class Report:
    """The sections of a page; each is empty where its measurement was not made."""

    def __init__(self, document: Values):
        self.document = document
        self.results = results_by_variant(dict(document))
        self.variants: Values = document["variants"]
        self.baseline: str | None = document["baseline"]
        others = [name for name in self.variants if name != self.baseline]
        self.others = others
        self.colours = {name: 1 + k % COLOURS for k, name in enumerate(others)} | {self.baseline or "": 0}

    def page(self) -> str:
        body = (
            self._head(),
            self._panels(),
            self._pictures(),
            self._latency(),
            self._passes(),
            self._likeness(),
            self._quality(),
            self._needs(),
            self._machine(),
        )
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width,initial-scale=1">'
            f'<title>{escape(self._title())}</title><link rel="icon" href="data:,"><style>{STYLE}</style></head>'
            f"<body><main>{''.join(body)}</main></body></html>\n"
        )

    def _title(self) -> str:
        names = ", ".join(self.others)
        return f"{names} against {self.baseline}" if self.baseline else names

    def _head(self) -> str:
        options, machine = self.document["options"], self.document["machine"]
        text = (
            f"{options['repeats']} rounds of all variants in turn after {options['warm_up']} of warm-up, batches of "
            f"{options['batch']}, on {machine['cpu']}, {machine['cpus']} CPUs.{self._threads()}"
        )
        return (
            f'<div class="eyebrow">ldm-export bench</div><h1>{escape(self._title())}</h1>'
            f'<p class="lead">{escape(text)}</p>{checks_list(self.document.get("gates", []))}'
        )

    # --- headline ---------------------------------------------------------------------------------------------------

    def _panels(self) -> str:
        panels = []
        for variant in self.others:
            panels.append(
                f'<section class="card panel"><header><h3>{self._dot(variant)}{escape(variant)}</h3>'
                f"<span>{escape(self._drawing(variant))}</span></header>"
                f'<div class="figures">{"".join(self._figures(variant))}</div></section>'
            )
        return f'<div class="panels">{"".join(panels)}</div>'

    def _drawing(self, variant: str) -> str:
        drawn, calls = self.variants[variant], self.results["latency"][variant]["calls"]
        calls_of = "two pictures (with and without the prompt)" if drawn["guided"] else "one picture"
        return f"{drawn['sampler']}, {drawn['steps']} steps: {calls} denoiser calls of {calls_of}"

    def _figures(self, variant: str) -> Iterable[str]:
        base, results = self.baseline, self.results
        spent = results["latency"][variant]["stages"]["total"]["median_ms"]
        needs = results["process"][variant]
        peak, start, size = needs["peak_rss_bytes"], needs["cold_start_ms"], results["bytes"][variant]["bytes"]
        if base is None:
            yield figure(milliseconds(spent), "ms", "a picture")
            yield figure(megabytes(size), "MB", "on disk")
            if peak is not None:
                yield figure(megabytes(peak), "MB", "peak memory")
            yield figure(f"{start / 1e3:.2f}", "s", "from process start to first picture")
            return
        their_needs = results["process"][base]
        their_spent = results["latency"][base]["stages"]["total"]["median_ms"]
        their_size, their_peak = results["bytes"][base]["bytes"], their_needs["peak_rss_bytes"]
        yield ratio(
            results["latency"][variant]["faster"],
            ("faster", "slower"),
            f"{milliseconds(spent)} ms, was {milliseconds(their_spent)} ms",
        )
        yield ratio(
            results["bytes"][variant]["smaller"],
            ("smaller", "larger"),
            f"{megabytes(size)} MB on disk, was {megabytes(their_size)} MB",
        )
        psnr, alike = min(results["pictures"][variant]["psnr_db"]), bool(results["pictures"][variant]["drift"])
        value, unit = ("same", "") if decibels(psnr) == "identical" else (f"{psnr:.1f}", "dB")
        yield figure(value, unit, f"<em>worst PSNR</em>: {likeness(psnr, alike)}")
        if peak and their_peak:
            yield ratio(
                their_peak / peak,
                ("less memory", "more memory"),
                f"{megabytes(peak)} MB at most, was {megabytes(their_peak)} MB",
            )
        their_start = their_needs["cold_start_ms"]
        yield ratio(
            their_start / start,
            ("sooner ready", "later ready"),
            f"first picture in {start / 1e3:.2f} s, was {their_start / 1e3:.2f} s",
        )

    # --- pictures ---------------------------------------------------------------------------------------------------

    def _pictures(self) -> str:
        count = len(self.document["conditions"])
        columns = f"grid-template-columns:repeat({len(self.variants)},minmax(0,1fr))"
        figures = []
        for k, condition in enumerate(self.document["conditions"]):
            strip = "".join(self._picture(variant, k, str(condition)) for variant in self.variants)
            seed = self.document["options"]["seed"] + k
            caption = f"{escape(str(condition)) or 'unconditional'} <span class='soft'>· seed {seed}</span>"
            figures.append(
                f'<figure class="card"><div class="strip" style="{columns}">{strip}</div>'
                f"<figcaption>{caption}</figcaption></figure>"
            )
        least = f"repeat(auto-fill,minmax(min(100%,{max(15, 6 * len(self.variants))}rem),1fr))"
        against = f" PSNR is against {escape(self.baseline)}." if self.baseline else ""
        return (
            f"<h2>The same prompts and seeds</h2><p class='soft'>{count} pictures a variant.{against}</p>"
            f'<div class="pictures" style="grid-template-columns:{least}">{"".join(figures)}</div>'
        )

    def _picture(self, variant: str, k: int, condition: str) -> str:
        found = self.results["pictures"][variant]
        psnr = f"<i>{decibels(found['psnr_db'][k])}</i>" if "psnr_db" in found else ""
        alt = escape(f"{condition}, {variant}")
        return (
            f'<div><img alt="{alt}" src="data:image/png;base64,{escape(found["png"][k])}">'
            f'<i title="{escape(variant)}">{self._dot(variant)}{escape(variant)}</i>{psnr}</div>'
        )

    # --- latency ----------------------------------------------------------------------------------------------------

    def _latency(self) -> str:
        latency = self.results["latency"]
        slowest = max(sum(variant["stages"][stage]["median_ms"] for stage in STAGES) for variant in latency.values())
        bars = []
        for variant, found in latency.items():
            spent = {stage: found["stages"][stage]["median_ms"] for stage in STAGES}
            track = "".join(
                f'<i style="width:{100 * value / slowest:.2f}%;background:var(--s{number})" '
                f'title="{STAGES[stage]}: {milliseconds(value)} ms"></i>'
                for number, (stage, value) in enumerate(spent.items(), start=1)
            )
            total = f"{milliseconds(found['stages']['total']['median_ms'])} ms"
            bars.append(
                f'<div><div class="bar-head"><span>{self._dot(variant)}{escape(variant)}</span><b>{total}</b></div>'
                f'<div class="track">{track}</div></div>'
            )
        legend = "".join(
            f'<span><span class="dot" style="background:var(--s{number})"></span>{words}</span>'
            for number, words in enumerate(STAGES.values(), start=1)
        )
        heads = [
            ("", ""), ("calls", ""), ("text", "ms"), ("one denoiser call", "ms"), ("loop outside", "ms"),
            ("decode", "ms"), ("total", "ms"), ("p90", "ms"), ("against baseline", "times as fast"),
        ]  # fmt: skip
        rows = [
            [
                self._dot(variant) + escape(variant),
                escape(str(found["calls"])),
                *(milliseconds(found["stages"][s]["median_ms"]) for s in ("text", "denoiser_call", "loop", "decode")),
                f"<b>{milliseconds(found['stages']['total']['median_ms'])}</b>",
                milliseconds(found["stages"]["total"]["p90_ms"]),
                "" if found["faster"] is None else times(found["faster"]),
            ]
            for variant, found in latency.items()
        ]
        batch = self.document["options"]["batch"]
        what = "one picture" if batch == 1 else f"{batch} pictures"
        return (
            f"<h2>Latency</h2><p class='soft'>Of {what}; medians. The ratio is the median over the rounds, each "
            f"against the same round.</p>"
            f"<div class='card'><div class='bars' style='margin-top:0'>{''.join(bars)}</div>"
            f'<div class="legend">{legend}</div>{table(heads, rows)}</div>'
        )

    def _threads(self) -> str:
        """What makes a comparison unfair: PyTorch may be set to use fewer CPUs than there are, and bundles are not."""
        cpus, threads = self.document["machine"]["cpus"], self.variants.get(self.baseline or "", {}).get("threads")
        if threads is None or threads >= cpus:
            return ""
        return f" PyTorch was set to use {threads} of {cpus} CPUs; unset OMP_NUM_THREADS for a fair comparison."

    # --- passes -----------------------------------------------------------------------------------------------------

    def _passes(self) -> str:
        cards = []
        for variant in self.others:
            drawn = waterfall(self.variants[variant]["passes"], self.colours[variant])
            if drawn:
                cards.append(
                    f"<div class='card'><h3>{self._dot(variant)}{escape(variant)}</h3>"
                    "<p class='soft'>Milliseconds for one picture after each pass, as its recipe measured them.</p>"
                    f"{drawn}</div>"
                )
        points = [
            point
            for variant in self.others
            for point in pareto_points(self.variants[variant]["passes"], self.colours[variant])
        ]
        if len(points) > 1:
            chart = scatter(points, "ms for one picture", "Fréchet distance, lower is better")
            cards.append(
                "<div class='card'><h3>Quality against latency</h3><p class='soft'>Every stage of the recipes, as they "
                f"measured them; lower left is better. Hollow: undone.</p>{chart}</div>"
            )
        return f"<h2>What the passes did</h2><div class='two'>{''.join(cards)}</div>" if cards else ""

    # --- likeness ---------------------------------------------------------------------------------------------------

    def _likeness(self) -> str:
        cards = [self._drift_card(), self._psnr_card(), self._parity_card()]
        found = "".join(card for card in cards if card)
        return f"<h2>How like {escape(self.baseline or '')}</h2><div class='two'>{found}</div>" if found else ""

    def _drift_card(self) -> str:
        drifts = {variant: self.results["pictures"][variant].get("drift") for variant in self.others}
        lines = [
            Curve(variant, found["median"], found["worst"], self.colours[variant])
            for variant, found in drifts.items()
            if found
        ]
        if self.baseline is None or not lines:
            return ""
        without = [variant for variant in self.others if not drifts[variant]]
        note = f" {', '.join(without)}: drawn in other steps, so not compared." if without else ""
        chart = curves(lines, "step", "relative error")
        return (
            "<div class='card'><h3>Drift of the latents</h3><p class='soft'>Relative error after each step: the median "
            f"of the pictures, and the band up to the worst.{escape(note)}</p>{chart}</div>"
        )

    def _psnr_card(self) -> str:
        latency, pictures = self.results["latency"], self.results["pictures"]
        if self.baseline is None or len(self.others) < 2:
            return ""
        points = [
            Point(
                latency[variant]["stages"]["total"]["median_ms"],
                min(statistics.median(pictures[variant]["psnr_db"]), IDENTICAL_DB),
                variant,
                self.colours[variant],
            )
            for variant in self.others
        ]
        chart = scatter(points, "ms for one picture", "median PSNR, dB, higher is better")
        return (
            "<div class='card'><h3>Likeness against latency</h3><p class='soft'>Measured here; upper left is better. A "
            f"student that draws as well, but its own picture, has a low PSNR.</p>{chart}</div>"
        )

    def _parity_card(self) -> str:
        rows = [
            [
                self._dot(variant) + escape(variant),
                escape(record["graph"]),
                escape(record["output"]),
                f"{record['max_error']:.1e}",
                f"{record['tolerance']:.0e}",
                chip(record),
            ]
            for variant, records in self.results.get("parity", {}).items()
            for record in records
        ]
        if not rows:
            return ""
        heads = [("", ""), ("graph", ""), ("output", ""), ("error", "of the largest"), ("allowed", ""), ("", "")]
        other = any(not r["same_weights"] for records in self.results["parity"].values() for r in records)
        note = " Other: the weights are another network's, a student's for instance; not judged." if other else ""
        return (
            "<div class='card whole'><h3>Each graph against its network</h3><p class='soft'>Largest difference, as a "
            f"share of the output's largest value.{note}</p>{table(heads, rows, text=(0, 1, 2, 5))}</div>"
        )

    # --- the rest ---------------------------------------------------------------------------------------------------

    def _quality(self) -> str:
        quality = self.results.get("quality")
        if not quality:
            return ""
        names = [name for name in QUALITY if any(name in figures for figures in quality.values())]
        rows = []
        for variant, figures in quality.items():
            cells = [self._dot(variant) + escape(variant)]
            for name in names:
                digits, found = QUALITY[name][1], figures.get(name)
                cells.append("" if found is None else interval(found, digits))
            rows.append(cells)
        points = [
            Point(
                self.results["latency"][variant]["stages"]["total"]["median_ms"],
                figures["frechet_distance"]["value"],
                variant,
                self.colours[variant],
            )
            for variant, figures in quality.items()
        ]
        chart = scatter(points, "ms for one picture", "Fréchet distance, lower is better") if len(points) > 1 else ""
        heads = [("", ""), *((QUALITY[name][0], "95 % interval") for name in names)]
        count = self.document["options"]["pictures"]
        return (
            f"<h2>Quality of the pictures</h2><p class='soft'>{count} drawn of each variant. Distances are in features "
            f"of EfficientNet-Lite0 and not comparable with an Inception FID.</p><div class='two'>"
            f"<div class='card whole'>{table(heads, rows)}</div>"
            + (f"<div class='card'><h3>Quality against latency</h3>{chart}</div>" if chart else "")
            + "</div>"
        )

    def _needs(self) -> str:
        rows = []
        on_gpu = any(found["device_bytes"] for found in self.results["process"].values())
        for variant, found in self.results["process"].items():
            starts = found["cold_starts_ms"]
            rows.append(
                [
                    self._dot(variant) + escape(variant),
                    megabytes(self.results["bytes"][variant]["bytes"]),
                    megabytes(found["peak_rss_bytes"]),
                    *([megabytes(found["device_bytes"])] if on_gpu else []),
                    f"{found['cold_start_ms'] / 1e3:.2f}",
                    f"{min(starts) / 1e3:.2f}–{max(starts) / 1e3:.2f}",
                ]
            )
        heads = [("", ""), ("on disk", "MB"), ("peak memory", "MB"), *([("on the GPU", "MB")] if on_gpu else [])]
        heads += [("cold start", "s"), ("range", "s")]
        return (
            "<h2>Size, memory, cold start</h2><p class='soft'>Each variant in new processes, in turn: from the start "
            f"of the process to its first picture; memory after two.</p><div class='card'>{table(heads, rows)}</div>"
        )

    def _machine(self) -> str:
        machine = self.document["machine"]
        versions = ", ".join(f"{name} {version}" for name, version in self.document["versions"].items())
        backends = "; ".join(f"{name}: {variant['backend']}" for name, variant in self.variants.items())
        facts = {
            "Machine": f"{machine['cpu']}, {machine['cpus']} CPUs, {machine['system']}",
            **({"GPU": machine["gpu"]} if machine["gpu"] else {}),
            "Versions": versions,
            "Ran by": backends,
            **{f"Left out: {variant}": why for variant, why in self.document["left_out"].items()},
        }
        listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
        return (
            f"<h2>Made on</h2><dl>{listed}</dl><h2>Made by</h2>"
            f"<pre tabindex='0'>{escape(self.document['command'])}</pre>"
        )

    def _dot(self, variant: str) -> str:
        return f'<span class="dot" style="background:var(--c{self.colours[variant]})"></span>'


def page(document: Values) -> str:
    """The page of a document that :meth:`ldm_export.bench.harness.Bench.run` made."""
    return Report(document).page()
