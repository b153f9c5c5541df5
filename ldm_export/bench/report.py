"""The demo as one self-contained HTML page: no script, no network, readable on a phone."""

from __future__ import annotations

import base64
import html
import io
import math
from collections.abc import Iterable, Sequence

from PIL import Image

from ldm_export.bench.demo import BATCH, GUIDANCE, PROMPTS, SAME_PICTURE_DB, STAGES, STEPS, Demo

STYLE = """
body{font:16px/1.5 system-ui,sans-serif;color:#1c1e21;background:#fff;max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.5rem;margin:.5rem 0}h2{font-size:1.1rem;margin:1.6rem 0 .4rem}
.verdict{padding:.7rem 1rem;border-radius:.4rem;background:#e7f5ec;border-left:.3rem solid #1f8a4c}
.verdict.bad{background:#fdecea;border-color:#c0392b}
.pairs{display:grid;grid-template-columns:repeat(auto-fill,minmax(11rem,1fr));gap:.6rem}
figure{margin:0;border:1px solid #e2e5e9;border-radius:.4rem;padding:.4rem}
figure div{display:flex}figure img{flex:1;min-width:0;image-rendering:auto}
figcaption{font-size:.8rem;line-height:1.3;margin-top:.3rem}figcaption span{color:#666}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem}
th,td{padding:.25rem .7rem;border-bottom:1px solid #e2e5e9;text-align:left}
td.number,th.number{text-align:right;font-variant-numeric:tabular-nums}
code{background:#f3f4f6;padding:.1rem .3rem;border-radius:.2rem}
"""


def _picture(pixels: object, alt: str) -> str:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")  # type: ignore[arg-type]
    return f'<img alt="{html.escape(alt)}" src="data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}">'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], text_columns: int) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "".join(
            f"<{tag}{' class=number' if i >= text_columns else ''}>{html.escape(cell)}</{tag}>"
            for i, cell in enumerate(cells)
        )

    body = "".join(f"<tr>{line(row, 'td')}</tr>" for row in rows)
    return f'<div class="scroll"><table><tr>{line(head, "th")}</tr>{body}</table></div>'


def decibels(psnr_db: float) -> str:
    return "identical" if math.isinf(psnr_db) else f"{psnr_db:.1f} dB"


def time_heads(demo: Demo) -> list[str]:
    """What stands above :func:`time_rows`."""
    heads = ["stage", f"PyTorch eager, {STEPS} steps", f"bundle, {STEPS} steps", "ratio"]
    return heads if demo.student is None else [*heads, f"student, {demo.student.steps} steps", "ratio"]


def time_rows(demo: Demo) -> list[list[str]]:
    """Milliseconds for one batch by stage: stage, PyTorch, bundle, ratio; of the student also, with its ratio."""
    totals = {side: {**stages, "all": sum(stages.values())} for side, stages in demo.milliseconds.items()}
    eager, others = totals["PyTorch"], [totals[side] for side in ("bundle", "student") if side in totals]
    rows = []
    for stage in (*STAGES, "all"):
        cells = [(f"{side[stage]:.1f}", f"{eager[stage] / side[stage]:.2f}x") for side in others]
        rows.append([stage, f"{eager[stage]:.1f}", *(cell for pair in cells for cell in pair)])
    return rows


def parity_rows(demo: Demo) -> list[list[str]]:
    """Graph, output, error, tolerance, verdict."""
    return [
        [
            record["graph"],
            record["output"],
            f"{record['max_error']:.1e}",
            f"{record['tolerance']:.0e}",
            "ok" if record["passed"] else "FAIL",
        ]
        for record in demo.parity
    ]


def html_report(demo: Demo) -> str:
    """The page."""
    student = demo.student
    taught = [""] * len(PROMPTS)
    if student is not None:
        taught = [_picture(image, f"{text}, student") for text, image in zip(PROMPTS, student.images, strict=True)]
    figures = "".join(
        f"<figure><div>{_picture(theirs, f'{prompt}, PyTorch')}{_picture(ours, f'{prompt}, bundle')}{third}</div>"
        f"<figcaption>{html.escape(prompt)}<br><span>seed {seed} &middot; {decibels(value)}</span></figcaption>"
        "</figure>"
        for seed, (prompt, theirs, ours, third, value) in enumerate(
            zip(PROMPTS, demo.torch_images, demo.bundle_images, taught, demo.psnr, strict=True)
        )
    )
    verdict = (
        f"The bundle draws what PyTorch draws: {decibels(min(demo.psnr))} at worst, of {len(PROMPTS)} pictures."
        if demo.passed
        else f"The bundle does not draw what PyTorch draws: {min(demo.psnr):.1f} dB at worst, "
        f"{SAME_PICTURE_DB:.0f} needed."
    )
    told = (
        ""
        if student is None
        else f" The student, {student.name}, draws in {student.steps} calls what its teacher draws in {2 * STEPS}."
    )
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width,initial-scale=1">
<title>ldm_export demo</title><style>{STYLE}</style></head><body>
<h1>One model, with and without PyTorch</h1>
<p class="verdict{"" if demo.passed else " bad"}">{verdict}</p>
<h2>Pictures: PyTorch, bundle{"" if student is None else ", student"}</h2>
<p>DDIM, {STEPS} steps, guidance {GUIDANCE:g}; the same prompt and seed on every side.{told}</p>
<div class="pairs">{figures}</div>
<h2>Each graph against its network</h2>
<p>Largest difference, as a share of the output's largest value, on sizes that the export did not see.</p>
{_table(("graph", "output", "max error", "allowed", ""), parity_rows(demo), 2)}
<h2>Milliseconds for {BATCH} pictures, by stage</h2>
<p>Median of {len(PROMPTS) // BATCH} batches, the sides in turn; {html.escape(demo.backend)}.</p>
{_table(time_heads(demo), time_rows(demo), 1)}
<p>Made by <code>ldm-export demo</code>; the bundle is in <code>bundle/</code>.</p>
</body></html>
"""
