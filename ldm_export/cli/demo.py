from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np

from ldm_export.bench.demo import run_demo
from ldm_export.bench.image_similarity import pictures_of
from ldm_export.bench.report import page
from ldm_export.cli.figures import print_bench, without_pictures
from ldm_export.cli.options import console, folder, json_option, print_json, stages, status, write_output
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.pictures.files import save_grid


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
        document = run_demo(open_checkpoint(checkpoint), output, progress)
    found = document["results"]["pictures"]
    drawn = {variant: pictures_of(found[variant]["png"]) for variant in found}
    reference, bundle, *taught = drawn.values()
    save_grid(reference, output / "pytorch.png")
    save_grid(bundle, output / "bundle.png")
    gap = np.full_like(reference[:, :, :8], 255)
    save_grid(np.concatenate([reference, bundle, *taught, gap], axis=2), output / "side_by_side.png")
    write_output(output / "report.html", page(document))
    write_output(output / "demo.json", json.dumps(without_pictures(document), indent=2) + "\n")
    if as_json:
        print_json(without_pictures(document))
    else:
        print_bench(document)
        console.print(f"look at {output / 'side_by_side.png'} and {output / 'report.html'}")
    fallen = [gate["says"] for gate in document["gates"] if not gate["passed"]]
    if fallen:
        status.print(f"error: {'; '.join(fallen)}.", style="red", soft_wrap=True)
        ctx.exit(1)
