"""Pictures of few network calls against the model's own 50 steps, at shared noise, on conditions that no fit has seen:
textbook samplers, forecast and fitted plans, DeepCache and a distilled student.

few_calls.py BUNDLE DATA HELD_OUT RESULT.json [--student BUNDLE] [--pictures 200] [--latency]

RESULT.json gets a row at a time, and what it holds is not measured again; RESULT.svg shows it, and the tables of
docs/few-calls.md are printed. The truth is BUNDLE with its own sampler, 50 steps. Fits are to prompts that are not
judged, or to other seeds of the classes. --latency times every row in turn with the truth, where the rest is done.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import add_fitted
from ldm_export.runtime.results import Timings
from ldm_export.tune.fit import FITTED, FitOptions, fit_plan
from ldm_export.verify.fidelity import FidelityJudge, real_pictures
from ldm_export.verify.image_generators import BundleImageGenerator, SamplingSettings
from ldm_export.verify.image_text_alignment import open_pictures
from ldm_export.verify.latency import Draw, runs_in_turn, times_as_fast
from ldm_export.verify.quality import Progress, choose_prompts, draw_pictures

STEPS = 50
CALLS = (8, 10, 16, 12, 6)
TEXTBOOK = ("ddim", "euler", "dpmpp-2m", "unipc")
DEEPCACHE = (2, 3, 5)
ROUNDS = 9
FITS = f"plans/{FITTED}*-{{}}.json"
FIGURES = ("psnr_db", "psnr_worst_db", "ssim", "frechet_distance", "frechet_ratio", "retrieval_at_5")

Drawing = tuple[Bundle, SamplingSettings, dict[str, int]]


def variants(bundle: Bundle, sampler: str, student: Bundle | None) -> Iterator[tuple[str, int, Drawing]]:
    """Name, calls, and how it is drawn: the bundle, settings and options."""
    plain = SamplingSettings(sampler=sampler, steps=STEPS)
    yield f"{sampler}, 20 steps", 20, (bundle, replace(plain, steps=20), {})
    for calls in CALLS:
        for name in TEXTBOOK:
            if name != ("ddim" if sampler == "euler" else "euler"):  # the same method, for another kind of noise
                yield name, calls, (bundle, replace(plain, sampler=name, steps=calls), {})
        yield f"{sampler} {STEPS} forecast", calls, (bundle, replace(plain, sampler=f"{sampler}-calls{calls}"), {})
        fitted = next(bundle.path.glob(FITS.format(calls))).stem.rpartition("-")[0]
        yield "fitted", calls, (bundle, replace(plain, sampler=fitted, steps=calls), {})
    for every in DEEPCACHE:
        yield "DeepCache", -(-STEPS // every), (bundle, plain, {"deepcache": every})
    if student is not None:
        model = student.manifest.model
        own = SamplingSettings(sampler=model["default_sampler"], steps=model["default_steps"])
        yield "student", own.steps, (student, own, {})


def draw_of(generator: BundleImageGenerator, conditions: list[Any], settings: SamplingSettings) -> Draw:
    """One picture, condition after condition; texts are new ones, as the cache makes known ones free."""

    def draw(seed: int) -> Timings:
        condition = conditions[seed % len(conditions)]
        for again in ("", " again"):  # the first brings the weights back into the caches
            given = f"{condition} {seed}{again}" if isinstance(condition, str) else condition
            timings = generator.sample([given], [seed], settings).timings
        return timings

    return draw


def with_fits(bundle: Bundle, options: FitOptions, work: Path, progress: Progress) -> Bundle:
    """A copy of the bundle with a fitted plan of each number of calls, however well it does; what is there stays."""
    folder = work / "fitted.bundle"
    if not folder.is_dir():
        shutil.copytree(bundle.path, work / "copied")
        (work / "copied").rename(folder)
    copy = Bundle.open(folder)
    for calls in CALLS:
        if not any(folder.glob(FITS.format(calls))):
            fit = fit_plan(copy, replace(options, calls=calls), work, progress)
            copy = add_fitted(copy, fit.plan, fit.report)
    return copy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("held_out", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--student", type=Path)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--batch", type=int, default=20)
    parser.add_argument("--latency", action="store_true")
    arguments = parser.parse_args()

    bundle = Bundle.open(arguments.bundle)
    generator = BundleImageGenerator(bundle)
    sampler, guidance = generator.defaults.sampler, generator.defaults.guidance
    common = {"prompts": arguments.pictures, "batch": arguments.batch}
    truth = SamplingSettings(sampler=sampler, steps=STEPS, guidance=guidance, **common)
    data = open_pictures(arguments.data, generator.size, generator.channels, generator.condition)
    chosen = choose_prompts(data, truth, generator.condition)
    conditions = [condition for _, condition in chosen]
    others = tuple(sorted({text for _, text in data.conditions} - set(conditions))) or tuple(dict.fromkeys(conditions))
    work = arguments.result.with_suffix(".work")
    rows: list[dict[str, Any]] = []
    if arguments.result.is_file():
        rows = json.loads(arguments.result.read_text())["rows"]

    def progress(what: str, done: int, of: int) -> None:
        print(f"\r{what} {done}/{of}   ", end="", file=sys.stderr)

    work.mkdir(parents=True, exist_ok=True)
    kept = work / "truth.npy"
    if not kept.is_file():
        np.save(kept, draw_pictures(generator, conditions, truth, progress))
    size = generator.pixels
    reference = real_pictures(arguments.data, arguments.held_out, size, generator.channels, generator.condition)
    judge = FidelityJudge(np.load(kept, allow_pickle=False), tuple(conditions), reference, None)

    def keep() -> None:
        document = {"bundle": arguments.bundle.name, "truth": f"{sampler}, {STEPS} steps", "guidance": guidance}
        document |= {"pictures": arguments.pictures, "notes": list(judge.notes), "rows": rows}
        arguments.result.write_text(json.dumps(document, indent=1) + "\n")
        if len(rows) > 2:
            arguments.result.with_suffix(".svg").write_text(chart(rows))

    def add(name: str, calls: int, images: npt.NDArray[Any]) -> None:
        figures = judge.figures(images)
        values = {key: figures[key]._asdict() for key in FIGURES if key in figures}
        rows.append({"name": name, "calls": calls, **values})
        keep()
        print(f"\r{name:24} {calls:3} " + " ".join(f"{key} {value['value']:.4g}" for key, value in values.items()))

    known = {(row["name"], row["calls"]) for row in rows}
    if ("truth", STEPS) not in known:
        add("truth", STEPS, judge.truth)
    fitted = with_fits(bundle, FitOptions(calls=1, conditions=others), work, progress)
    student = None if arguments.student is None else Bundle.open(arguments.student)
    generators: dict[tuple[Any, ...], BundleImageGenerator] = {}
    drawn: dict[tuple[str, int], Draw] = {}
    plain = ("truth", STEPS, (fitted, truth, {}))
    for name, calls, (variant, settings, options) in (plain, *variants(fitted, sampler, student)):
        opened = str(variant.path), *options.items()
        draws = generators[opened] = generators.get(opened) or BundleImageGenerator(variant, **options)
        settings = replace(settings, **common, guidance=draws.defaults.guidance)
        drawn[name, calls] = draw_of(draws, conditions, settings)
        if (name, calls) not in known:
            add(name, calls, draw_pictures(draws, conditions, settings, progress))
    if arguments.latency:
        times = runs_in_turn(drawn, ROUNDS, progress=lambda done: progress("round", done, ROUNDS))
        for row in rows:
            row["times_as_fast"] = {"value": times_as_fast(times["truth", STEPS], times[row["name"], row["calls"]])}
        keep()
    print(f"\r{table(rows)}")


TABLES = (
    ("PSNR: median / worst, dB", {"psnr_db": ".1f", "psnr_worst_db": ".1f"}),
    ("Fréchet distance / R@5", {"frechet_distance": ".1f", "retrieval_at_5": ".3f"}),
    ("Times as fast", {"times_as_fast": ".1f"}),
)


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown: calls down, plans across, a table for each group of figures."""
    cells = {(row["calls"], row["name"].split(",")[0]): row for row in rows if row["name"] != "truth"}
    names = list(dict.fromkeys(name for _, name in cells))
    truth = next(row for row in rows if row["name"] == "truth")

    def figures(row: dict[str, Any] | None, kinds: dict[str, str]) -> str:
        return " / ".join(format(row[key]["value"], kind) for key, kind in kinds.items()) if row else ""

    parts = []
    for title, kinds in TABLES:
        if kinds.keys() <= truth.keys():
            lines = [f"| {title}; calls | " + " | ".join(names) + " |", "|---:" * (1 + len(names)) + "|"]
            for calls in sorted({calls for calls, _ in cells}, reverse=True):
                shown = (figures(cells.get((calls, name)), kinds) for name in names)
                lines.append(f"| {calls} | " + " | ".join(shown) + " |")
            parts.append("\n".join(lines))
    return "\n\n".join(parts) + f"\n\n{STEPS} steps themselves: {figures(truth, TABLES[1][1])}."


PANELS = (
    *(("psnr_db", "PSNR, dB, median"), ("psnr_worst_db", "PSNR, dB, worst")),
    *(("frechet_distance", "Fréchet distance"), ("retrieval_at_5", "R@5")),
)
COLOURS = ("#888", "#b58", "#2a6fbb", "#c90", "#d22", "#7a4", "#444", "#080")
WIDTH, HEIGHT, LEFT, TOP, GAP = 230, 250, 40, 26, 14


def chart(rows: list[dict[str, Any]]) -> str:
    """Panels of figures against calls, a line a sampler, as text of SVG."""
    names = list(dict.fromkeys(row["name"] for row in rows if row["name"] != "truth" and "20 steps" not in row["name"]))
    panels = [figure for figure in PANELS if all(figure[0] in row for row in rows)]
    parts = []
    for number, (figure, title) in enumerate(panels):
        shown = [row for row in rows if row["name"] in names]
        low, high = (edge(row[figure]["value"] for row in shown) for edge in (min, max))
        low, high = low - 0.05 * (high - low or 1), high + 0.05 * (high - low or 1)
        left = number * (WIDTH + GAP) + LEFT
        right, bottom = number * (WIDTH + GAP) + WIDTH, HEIGHT - 30

        def at(row: dict[str, Any], figure: str = figure, left: int = left, right: int = right, low: float = low,
               high: float = high, bottom: int = bottom) -> tuple[float, float]:  # fmt: skip
            share = (row["calls"] - 3) / 24
            return left + (right - left) * share, bottom - (bottom - TOP) * (row[figure]["value"] - low) / (high - low)

        parts.append(f'<text x="{left}" y="16" font-weight="600">{title}</text>')
        parts.append(f'<path d="M{left} {TOP}V{bottom}H{right}" fill="none" stroke="#999"/>')
        for value, y in ((high, TOP + 8), (low, bottom)):
            parts.append(f'<text x="{left - 4}" y="{y}" text-anchor="end">{value:.3g}</text>')
        for calls in (5, 10, 16, 25):
            x = left + (right - left) * (calls - 3) / 24
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{calls}</text>')
        for name, colour in zip(names, COLOURS, strict=False):
            points = [at(row) for row in sorted(shown, key=lambda row: row["calls"]) if row["name"] == name]
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            width = 2.4 if name == "fitted" or "forecast" in name else 1.3
            parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="{max(width, 2.2):.1f}" fill="{colour}"/>' for x, y in points
            ]
    x = LEFT
    for name, colour in zip(names, COLOURS, strict=False):
        parts.append(f'<circle cx="{x}" cy="{HEIGHT + 4}" r="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 8}" y="{HEIGHT + 8}">{name}</text>')
        x += 26 + 7 * len(name)
    width = max(len(panels) * (WIDTH + GAP), x)
    parts.append(f'<text x="{width - GAP}" y="{HEIGHT + 8}" text-anchor="end">network calls</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{HEIGHT + 16}" font-family="sans-serif" '
        f'font-size="11"><rect width="100%" height="100%" fill="#fff"/>{"".join(parts)}</svg>\n'
    )


if __name__ == "__main__":
    main()
