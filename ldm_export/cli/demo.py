from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
from rich.table import Table

from ldm_export.bench.demo import BATCH, run_demo
from ldm_export.bench.report import html_report, parity_rows, time_heads, time_rows
from ldm_export.checkpoint import LatentDiffusion
from ldm_export.cli.options import console, folder, json_option, print_json, stages
from ldm_export.cli.pictures import save_grid
from ldm_export.errors import InputError


@click.command()
@click.option("-o", "--output", type=folder, default=Path("demo"), show_default=True, help="Where everything goes.")
@click.option("--checkpoint", default="emoji64", show_default=True, help="A shipped model, or one trained like it.")
@json_option
@click.pass_context
def command(ctx: click.Context, output: Path, checkpoint: str, as_json: bool) -> None:
    """Export the shipped model, draw 16 prompts with PyTorch and with the bundle, and show that they are the same; draw
    them with its student too, which needs a fraction of the calls.

    Writes the bundle, the pictures and report.html; exit code 1 if a picture differs.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{output} cannot be made ({error.strerror}). Name another folder.") from error
    with stages("demo") as progress:
        demo = run_demo(LatentDiffusion.open(checkpoint), output, progress)
    save_grid(demo.torch_images, output / "pytorch.png")
    save_grid(demo.bundle_images, output / "bundle.png")
    gap = np.full_like(demo.torch_images[:, :, :8], 255)
    taught = [] if demo.student is None else [demo.student.images]
    sides = [demo.torch_images, demo.bundle_images, *taught, gap]
    save_grid(np.concatenate(sides, axis=2), output / "side_by_side.png")
    (output / "report.html").write_text(html_report(demo), encoding="utf-8")
    (output / "demo.json").write_text(json.dumps(demo.to_dict(), indent=2) + "\n", encoding="utf-8")
    if as_json:
        print_json(demo.to_dict())
    else:
        parity = Table("graph", "output", "max error", "allowed", "")
        for row in parity_rows(demo):
            parity.add_row(*row)
        console.print(parity)
        times = Table(*time_heads(demo), title=f"ms for {BATCH} pictures")
        for row in time_rows(demo):
            times.add_row(*row)
        console.print(times)
        console.print(f"pictures against PyTorch: PSNR {min(demo.psnr):.1f} dB at worst of {len(demo.psnr)}")
        console.print(f"look at {output / 'side_by_side.png'} and {output / 'report.html'}", markup=False)
    if not demo.passed:
        ctx.exit(1)
