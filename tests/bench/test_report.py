"""The page of a bench: it has the figures, escapes what people write, needs nothing else, and a browser likes it."""

from __future__ import annotations

import base64
import copy
import io
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from ldm_export.bench import harness
from ldm_export.bench.blocks import likeness, ratio, table
from ldm_export.bench.charts import Axis, Curve, Point, curves, scatter
from ldm_export.bench.formatting import decibels, megabytes, milliseconds, times
from ldm_export.bench.gates import KINDS, judge
from ldm_export.bench.harness import results_by_variant
from ldm_export.bench.report import page
from ldm_export.bench.waterfall import pareto_points, waterfall
from ldm_export.verify.gates import gate_from_text
from tests.browser import CHROMIUM, browser

PROMPTS = ["red apple", 'a <b>blue</b> & "green" square, in words that are longer than a phone is wide ' * 3]


def score(total_ms: float, frechet: float) -> dict[str, Any]:
    latency = {"total_ms": total_ms, "text_ms": 1.0, "denoiser_ms": 2.0, "decode_ms": 3.0, "calls": 4}
    return {
        "bytes": 48_500_000,
        "latency": latency,
        "steps": 4,
        "frechet_distance": frechet,
        "retrieval_at_5": 0.9,
        "psnr_to_teacher_db": None,
    }


PASSES = [
    {"name": "teacher", "kept": True, "score": score(700.0, 148.0)},
    {"name": "distill-steps", "kept": True, "faster": 10.0, "score": score(70.0, 145.0)},
    {"name": "prune-<channels>", "kept": False, "why": "it is <slow>", "score": score(90.0, 170.0)},
    {"name": "half", "kept": False, "why": "it cannot be judged here"},
]


def png() -> str:
    stream = io.BytesIO()
    Image.new("RGB", (64, 64), "orange").save(stream, "PNG")
    return base64.b64encode(stream.getvalue()).decode()


def spent(total_ms: float, faster: float | None) -> dict[str, Any]:
    shares = {"text": 0.01, "denoiser_call": 0.045, "denoiser": 0.9, "loop": 0.02, "decode": 0.07, "total": 1.0}
    stages = {
        stage: {"median_ms": share * total_ms, "p90_ms": share * total_ms * 1.1} for stage, share in shares.items()
    }
    return {"calls": 20, "faster": faster, "stages": stages, "totals_ms": [total_ms]}


def made(variants: int = 3) -> dict[str, Any]:
    """A document as the harness makes them: PyTorch, a bundle, a student from a recipe, as many as are asked for."""
    names = ["PyTorch toy", "plain", "<fast> & small"][:variants]
    drawn = {"sampler": "ddim", "steps": 20, "guidance": 4.0, "guided": True, "height": 64, "width": 64}
    parity = {"graph": "unet", "output": "out_sample", "max_error": 3e-6, "tolerance": 1e-4, "passed": True}
    pictures: dict[str, Any] = {name: {"png": [png()] * 2} for name in names}
    if variants > 1:
        drift = {"median": [1e-7 * (k + 1) for k in range(20)], "worst": [2e-7 * (k + 1) for k in range(20)]}
        pictures["plain"] |= {"psnr_db": [86.0, 999.0], "drift": drift}
        pictures[names[-1]] |= {"psnr_db": [24.5, 23.5], "drift": drift if variants == 2 else None}
    document = {
        "format": 1,
        "command": "ldm-export bench plain --prompt 'a <b>'",
        "machine": {"cpu": "Processor <9000>", "cpus": 2, "system": "Linux x86_64", "gpu": None},
        "versions": {"ldm_export": "0.1.0", "torch": "2.13.0"},
        "options": {"repeats": 9, "warm_up": 2, "batch": 1, "seed": 5, "pictures": 40},
        "conditions": PROMPTS,
        "left_out": {},
        "baseline": names[0] if variants > 1 else None,
        "variants": {
            name: {**drawn, "backend": "toy", "threads": None, "passes": PASSES if k == 2 else []}
            for k, name in enumerate(names)
        },
        "results": {
            "bytes": {
                name: {"bytes": 48_000_000 // (k + 1), "smaller": k + 1.0 if k else None}
                for k, name in enumerate(names)
            },
            "latency": {name: spent(1164.0 / (k * 9 + 1), k * 9 + 1.0 if k else None) for k, name in enumerate(names)},
            "pictures": pictures,
            "process": {
                name: {
                    "cold_start_ms": 900.0,
                    "cold_starts_ms": [880.0, 920.0],
                    "peak_rss_bytes": 122_400_000,
                    "device_bytes": None,
                }
                for name in names
            },
            "parity of plain": [
                {**parity, "same_weights": True},
                {**parity, "graph": "vae_decoder", "passed": False, "max_error": 0.5, "same_weights": True},
                {**parity, "graph": "text_encoder", "max_error": 0.7, "same_weights": False},
            ],
            "quality of plain": {"frechet_distance": {"value": 148.76, "low": 140.0, "high": 157.0}},
        },
    }
    if variants > 1:
        gates = [gate_from_text(text, KINDS) for text in ("psnr=40", "faster=1.5")]
        document["gates"] = judge(gates, results_by_variant(document), names[0])
    return document


def text_of(html: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html))


def test_the_figures_are_on_the_page() -> None:
    words = text_of(page(made()))
    for figure in (
        "10.0 × faster 116 ms, was 1,164 ms",
        "2.00 × smaller 24.0 MB on disk, was 48.0 MB",
        "86.0 dB worst PSNR : no eye can tell",
        "23.5 dB worst PSNR : in other steps, so its own pictures",
        "identical",
        "148.8 140.0–157.0",
        "vae_decoder out_sample 5.0e-01 1e-04 FAIL",
        "text_encoder out_sample 7.0e-01 1e-04 other",
        "0.88–0.92",
        "undone: it is &lt;slow&gt;",
        "undone: it cannot be judged here",
        "70.0 ms · 10.0x",
        "✓ 3 of 4 checks passed",
        "✗ the worst picture of &lt;fast&gt; &amp; small is 23.5 dB from that of PyTorch toy; at least 40 dB",
        "Processor &lt;9000&gt;, 2 CPUs",
        "ldm-export bench plain --prompt",
        "· seed 6",
    ):
        assert figure in words, figure


def test_the_page_stands_alone_and_escapes_everything() -> None:
    html = page(made())
    assert html.count("<img ") == html.count('src="data:image/png;base64,') == 6
    assert not re.search(r"https?:|src=\"//|<script|<link rel=\"style|@import|url\(", re.sub(r'base64,[^"]*', "", html))
    assert "<b>blue" not in html
    assert "<fast>" not in html
    assert "<channels>" not in html
    assert "a &lt;b&gt;blue&lt;/b&gt; &amp; &quot;green&quot;" in html


@pytest.mark.parametrize("missing", ["parity of plain", "quality of plain"])
def test_what_was_not_measured_is_left_out(missing: str) -> None:
    document = made(2)
    del document["results"][missing]
    heads = {"parity of plain": "Each graph against its network", "quality of plain": "Quality of the pictures"}
    html = page(document)
    assert heads[missing] not in html
    assert all(head in html for name, head in heads.items() if name != missing)
    assert "What the passes did" not in html


def test_one_bundle_alone() -> None:
    document = copy.deepcopy(made(1))
    document["results"] = {key: value for key, value in document["results"].items() if " of " not in key}
    words = text_of(page(document))
    assert "1,164 ms a picture" in words
    assert "How like" not in words


def test_what_a_gpu_adds() -> None:
    document = made(2)
    document["machine"]["gpu"] = "GPU <1>"
    document["left_out"] = {"plain <cuda>": "it is <missing>."}
    document["results"]["process"]["plain"]["device_bytes"] = 1_234_000_000
    words = text_of(page(document))
    assert "GPU &lt;1&gt;" in words
    assert "Left out: plain &lt;cuda&gt; it is &lt;missing&gt;." in words
    assert "122.4 1,234 0.90" in words
    assert "on the GPU" in words
    assert "on the GPU" not in text_of(page(made(2)))


def test_pytorch_with_fewer_threads() -> None:
    document = made()
    document["variants"]["PyTorch toy"]["threads"] = 1
    assert "PyTorch was set to use 1 of 2 CPUs; unset OMP_NUM_THREADS" in page(document)


def test_ratios_below_one_are_turned_around() -> None:
    assert text_of(ratio(0.5, ("faster", "slower"), "x")).split() == ["2.00", "×", "slower", "x"]
    assert "warn" in ratio(0.5, ("faster", "slower"), "x")
    assert "good" in ratio(2.0, ("faster", "slower"), "x")
    assert 'class=""' in ratio(1.01, ("faster", "slower"), "x")


def test_numbers_are_right_aligned_and_units_in_heads() -> None:
    html = table([("", ""), ("total", "ms")], [["plain", "12.5"]])
    assert "<th class=n>total<small>ms</small></th>" in html
    assert "<td>plain</td><td class=n>12.5</td>" in html


def test_words() -> None:
    assert [times(value) for value in (0.794, 9.949, 9.96, 29.31, 99.6)] == ["0.79x", "9.95x", "10.0x", "29.3x", "100x"]
    assert [milliseconds(value) for value in (0.123, 12.34, 677.1, 1164.0)] == ["0.12", "12.3", "677", "1,164"]
    assert [megabytes(value) for value in (22_049_634, 3_438_000_000, None)] == ["22.0", "3,438", ""]
    assert decibels(999.0) == "identical"
    assert [likeness(psnr, True) for psnr in (86, 35, 20)] == [
        "no eye can tell",
        "small differences",
        "visible differences",
    ]


# --- charts ---------------------------------------------------------------------------------------------------------


def test_axes() -> None:
    linear, log = Axis(0.0, 10.0, 100.0, 200.0), Axis(1e-6, 1.0, 0.0, 60.0, log=True)
    assert linear(2.5) == 125.0
    assert linear.ticks() == [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    assert log(1e-3) == pytest.approx(30.0)
    assert log.ticks() == pytest.approx([1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
    assert Axis(30.0, 2000.0, 0.0, 1.0, log=True).ticks() == pytest.approx([50, 100, 200, 500, 1000, 2000])


@pytest.mark.parametrize("points", [[(5.0, 3.0)], [(5.0, 3.0), (5.0, 3.0)], [(1.0, -2.0), (900.0, 40.0)]])
def test_points_and_labels_stay_inside(points: list[tuple[float, float]]) -> None:
    svg = scatter([Point(x, y, f"<{k}>", k) for k, (x, y) in enumerate(points)], "ms", "dB")
    assert svg.count("<circle") == len(points)
    assert "&lt;0&gt;" in svg
    numbers = [float(value) for value in re.findall(r'c?[xy][12]?="([\d.-]+)"', svg)]
    assert all(0 <= value <= 400 for value in numbers)


def test_curves_hold_zero_and_one_step() -> None:
    svg = curves([Curve("same", [0.0], [0.0], 1), Curve("far", [0.5, 999.0], [0.6, 999.0], 2)], "step", "error")
    assert svg.count("<polyline") == 2
    assert "10⁻⁹" in svg
    assert "nan" not in svg


def test_waterfall() -> None:
    assert waterfall([], 1) == waterfall(PASSES[:1], 1) == ""
    html = waterfall(PASSES, 3)
    assert html.count('class="track"') == 4
    assert html.count('class="undone"') + html.count("class=undone") == 2
    assert [point.hollow for point in pareto_points(PASSES, 3)] == [False, False, True]
    assert [point.colour for point in pareto_points(PASSES, 3)] == [0, 3, 3]


# --- in a browser ---------------------------------------------------------------------------------------------------


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium on the PATH")
@pytest.mark.parametrize("variants", [1, 2, 3])
def test_a_browser_shows_it_at_any_width(tmp_path: Path, variants: int) -> None:
    document = made(variants)
    if variants == 1:
        document["results"] = {key: value for key, value in document["results"].items() if " of " not in key}
    (tmp_path / "report.html").write_text(page(document), encoding="utf-8")
    with browser() as tab:
        for width, scheme in ((360, "light"), (768, "dark"), (1200, "light")):
            tab.open(tmp_path / "report.html", width, scheme=scheme)
            assert tab.evaluate("innerWidth") == width
            assert tab.evaluate("document.scrollingElement.scrollWidth") <= width
            assert tab.evaluate("[...document.images].every(image => image.naturalWidth == 64)")
            dark = tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(17, 19, 23)"
            assert dark == (scheme == "dark")
        tab.screenshot(tmp_path / "report.png")
        assert tab.complaints == []
    with Image.open(tmp_path / "report.png") as picture:
        assert picture.width == 1200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 50


# --- what another wrote ---------------------------------------------------------------------------------------------

SCRIPT = '"><script>alert(9)</script>'


@pytest.mark.parametrize("value", [SCRIPT, "a'b", "a\x1bb", {"png": [SCRIPT]}, [[SCRIPT]]], ids=ascii)
def test_results_that_no_bench_writes_are_not_taken_up(value: Any) -> None:
    assert not harness._is_plain({"latency": {"a": value}})
    assert harness._is_plain({"png": ["iVBORw0KGgo+/AB=="], "graph": "text_encoder_2", "error": 1e-6, "drift": None})


def leaves(value: Any) -> list[tuple[Any, Any]]:
    """Holder and key of everything in a document that holds nothing itself."""
    if not isinstance(value, (dict, list)):
        return []
    found = []
    for key, child in value.items() if isinstance(value, dict) else enumerate(value):
        found += leaves(child) if isinstance(child, (dict, list)) else [(value, key)]
    return found


def test_no_result_puts_a_script_into_the_page() -> None:
    """Whatever value of a document is text in place of what it was."""
    shown = 0
    for number in range(len(leaves(made()["results"]))):
        document = made()
        holder, key = leaves(document["results"])[number]
        holder[key] = SCRIPT
        try:
            found = page(document)
        except (AttributeError, IndexError, KeyError, TypeError, ValueError):
            continue
        assert "<script" not in found
        shown += "&lt;script" in found
    assert shown > 5
