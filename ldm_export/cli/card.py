from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from ldm_export.bench.card import Card, Document, value_of
from ldm_export.bench.card_page import card_page
from ldm_export.bench.card_rows import CardOptions
from ldm_export.bench.formatting import milliseconds, times
from ldm_export.cli.options import (
    adapters_from,
    check_output,
    command_line,
    console,
    embedding_option,
    embeddings_from,
    family_option,
    folder,
    lora_option,
    prompts_from,
    size_from_text,
    stages,
    status,
    write_output,
)
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.runtime.backends import BACKENDS
from ldm_export.verify.fidelity import KINDS
from ldm_export.verify.gates import gate_from_text

COLUMNS = {
    "psnr": ("PSNR\ndB", 1),
    "psnr_worst": ("worst\ndB", 1),
    "ssim": ("SSIM", 4),
    "perceptual": ("percep-\ntual", 4),
    "frechet_ratio": ("Fréchet\nratio", 3),
    "retrieval": ("R@5", 3),
}
"""Key of a limit -> head of its column, of as many as fit 80 characters, and digits after the point."""


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=folder, metavar="BUNDLE...")
@click.option("--against", metavar="CHECKPOINT", required=True, help="The truth: this model in PyTorch.")
@click.option("-o", "--output", type=folder, required=True, metavar="CARD.html", help="CARD.json goes beside it.")
@click.option("--prompts", type=folder, default=None, metavar="FILE", help="What to draw, one a line.")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="What to draw; repeatable.")
@click.option("--pictures", type=int, default=32, show_default=True, help="Pictures a row; prompts are used again.")
@click.option("--data", type=folder, default=None, metavar="FOLDER", help="Real pictures to compare sets with.")
@click.option("--held-out", type=folder, default=None, metavar="FOLDER", help="And such that training never saw.")
@click.option("--truth-steps", type=int, default=None, help="Of the truth.  [default: 50, or more if a row has more]")
@click.option("--steps", type=int, multiple=True, help="Of the rows; each bundle's own and the truth's by default.")
@click.option("--calls", type=int, multiple=True, help="Network calls in the truth's number of steps; repeatable.")
@click.option("--size", "sizes", multiple=True, metavar="HxW", help="In pixels; the model's own by default.")
@click.option("--sampler", "samplers", multiple=True, help="Of the bundles; each bundle's own by default.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture k has seed + k.")
@click.option("--backend", type=click.Choice(BACKENDS), default="cpu", show_default=True, help="What runs the bundles.")
@click.option(
    "--fail-under",
    "asked",
    multiple=True,
    metavar="KEY=NUMBER",
    help="Exit with 1 unless every row of a bundle reaches it. At least: psnr=45 (dB, median), psnr_worst=38, "
    "ssim=0.98, retrieval=0.85, alignment=0.3. At most: perceptual=0.05, frechet=160, frechet_ratio=1.05, "
    "latency_ms=500, memory_mb=500. Repeatable.",
)
@lora_option
@embedding_option
@family_option
@click.option("--resume", is_flag=True, help="Measure no row that CARD.json holds, even if it is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the document, without pictures, as the last line.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    bundles: tuple[Path, ...],
    against: str,
    output: Path,
    prompts: Path | None,
    texts: tuple[str, ...],
    sizes: tuple[str, ...],
    asked: tuple[str, ...],
    loras: tuple[str, ...],
    embeddings: tuple[str, ...],
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure how true the first BUNDLE is to its checkpoint, and how fast: CARD.html shows it, CARD.json holds it.

    Every row is drawn of the same prompts and seeds as the truth, the checkpoint in PyTorch with many steps, and
    judged by PSNR, SSIM, a perceptual distance, Fréchet distances, retrieval and alignment; then timed. Further BUNDLEs
    are of the same model at other precisions, or after other passes. What is interrupted resumes when the same is run
    again. Exit code 1 if what --fail-under asks for is not reached.
    """
    gates = [gate_from_text(text, KINDS) for text in asked]
    json_file = output.with_suffix(".json")
    if json_file == output:
        raise InputError(f"{output} is where the figures go; the card is a page. Name a .html.")
    for file in (output, json_file):
        check_output(file)
    settings = CardOptions(prompts=prompts_from(prompts, texts), sizes=tuple(map(size_from_text, sizes)), **options)
    checkpoint = open_checkpoint(against, adapters=adapters_from(loras), embeddings=embeddings_from(embeddings))
    with stages("card") as progress:
        progress("opening")
        card = Card(bundles, checkpoint, settings)
        try:
            document = card.run(json_file, command_line(ctx), gates, resume=resume, progress=progress)
            write_output(output, card_page(document))
            _print(document)
        except KeyboardInterrupt:
            status.print(
                f"{json_file} keeps the rows that were measured; the same command resumes there.",
                soft_wrap=True,
            )
            raise
        except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
            if not card.took_up:
                raise
            raise InputError(
                f"{json_file} lacks figures that a card has, or has other ones. Delete it, and measure anew."
            ) from error
    console.print(f"look at {output}; the figures are in {json_file}")
    if as_json:
        rows = [{key: value for key, value in row.items() if key != "png"} for row in document["rows"]]
        click.echo(json.dumps({**document, "rows": rows}))
    fallen = [gate["says"] for gate in document["gates"] if not gate["passed"]]
    if fallen:
        status.print(f"error: {'; '.join(fallen)}.", style="red", soft_wrap=True)
        ctx.exit(1)


def _print(document: Document) -> None:
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    rows = [row for row in document["rows"] if row["kind"] == "bundle"]
    values = {key: [value_of(document, row, key) for row in rows] for key in COLUMNS}
    shown = [key for key, column in values.items() if any(value is not None for value in column)]
    table.add_column("", min_width=12)
    for head in (*(COLUMNS[key][0] for key in shown), "ms", "faster"):
        table.add_column(head, justify="right", no_wrap=True)
    for k, row in enumerate(rows):
        latency = document["performance"]["latency"][row["name"]]
        found = [(values[key][k], COLUMNS[key][1]) for key in shown]
        table.add_row(
            row["name"],
            *("" if value is None else f"{value:.{digits}f}" for value, digits in found),
            milliseconds(latency["stages"]["total"]["median_ms"]),
            times(latency["faster"]),
        )
    console.print(table)
    for name, why in document["left_out"].items():
        console.print(f"{name} is left out: {why}")
    for note in dict.fromkeys(note for row in document["rows"] for note in row["notes"]):
        console.print(note)
