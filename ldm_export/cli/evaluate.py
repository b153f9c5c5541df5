from __future__ import annotations

import json
from pathlib import Path

import click
from rich.table import Table

from ldm_export.cli.options import (
    check_output,
    console,
    family_option,
    folder,
    json_option,
    print_json,
    steps_bar,
    was_given,
    write_output,
)
from ldm_export.errors import InputError
from ldm_export.pictures.files import check_writable, save_grid
from ldm_export.verify.image_generators import SamplingSettings, open_image_generator
from ldm_export.verify.metrics import Figure
from ldm_export.verify.quality import FEATURES, QualityReport, evaluate, open_judge

ROWS = {
    "reconstruction_psnr_db": ("Reconstruction, PSNR in dB", 1),
    "reconstruction_ssim": ("Reconstruction, SSIM", 3),
    "frechet_distance": ("Fréchet distance", 2),
    "kernel_distance": ("Kernel distance", 4),
    "retrieval_at_1": ("Retrieval R@1", 3),
    "retrieval_at_5": ("Retrieval R@5", 3),
    "alignment": ("Image-text alignment", 3),
    "alignment_with_another_prompt": ("  with another prompt", 3),
    "nearest_training_picture": ("Distance to the nearest training picture", 3),
    "nearer_than_95_percent_of_held_out": ("  share nearer than 95 % of held-out", 3),
}
"""Figure -> what a person reads, and digits after the point."""


@click.command()
@click.argument("target", metavar="CHECKPOINT|BUNDLE")
@click.option("--data", type=folder, required=True, help="The training pictures, with their metadata.jsonl.")
@click.option("--held-out", type=folder, default=None, help="Pictures that training did not see, likewise.")
@click.option("--prompts", type=click.IntRange(min=1), default=200, show_default=True, help="Pictures to draw.")
@click.option("--sampler", default=None, help="The model's own by default, as steps and guidance.")
@click.option("--steps", type=click.IntRange(min=1), default=None)
@click.option("--guidance", type=click.FloatRange(min=1.0), default=None)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture k has seed + k.")
@click.option("--batch", type=click.IntRange(min=1), default=8, show_default=True, help="Pictures drawn at a time.")
@click.option(
    "--judge", metavar="CHECKPOINT", default=None, help="Whose alignment/ judges; by default the target's own."
)
@click.option("-o", "--output", type=folder, default=None, help="Also write the figures to this JSON file.")
@click.option("--pictures", type=folder, default=None, help="Also write what was drawn, a grid, to this file.")
@family_option
@json_option
def command(
    target: str,
    data: Path,
    held_out: Path | None,
    prompts: int,
    sampler: str | None,
    steps: int | None,
    guidance: float | None,
    seed: int,
    batch: int,
    judge: str | None,
    output: Path | None,
    pictures: Path | None,
    as_json: bool,
) -> None:
    """Measure how good a model's pictures are.

    Reconstruction, distances to real pictures, retrieval, alignment and memorisation, each with a 95 % interval.
    """
    if pictures is not None:
        check_writable(pictures)
    if output is not None:
        check_output(output)
    image_generator = open_image_generator(target)
    own = image_generator.defaults
    settings = SamplingSettings(
        prompts, sampler or own.sampler, steps or own.steps, own.guidance if guidance is None else guidance, seed, batch
    )
    if image_generator.condition != "text":
        for name in ("guidance", "judge"):
            if was_given(name):
                raise InputError(f"--{name} is about prompts, and {image_generator.name} reads no text. Leave it out.")
    with steps_bar("evaluate") as advance:
        report = evaluate(
            image_generator,
            data,
            held_out,
            settings,
            open_judge(target, judge),
            lambda what, done, of: advance(done, of, what),
        )
    if pictures is not None:
        save_grid(report.images, pictures)
    if output is not None:
        write_output(output, json.dumps(report.to_dict(), indent=2, ensure_ascii=False) + "\n")
    if as_json:
        print_json(report.to_dict())
    else:
        console.print(_table(report))
        for note in report.notes:
            console.print(note)


def _table(report: QualityReport) -> Table:
    title = (
        f"{report.target}: {report.settings.prompts} prompts, {report.settings.sampler}, {report.settings.steps} steps"
    )
    counts = ", ".join(f"{count} {kind.replace('_', '-')}" for kind, count in report.counts.items())
    judge = f" Alignment is judged by {report.judge}." if report.judge else ""
    table = Table(title=title, caption=f"Pictures: {counts}. Distances are in {FEATURES}, of these sizes.{judge}")
    for column in ("", "value", "95 % interval", "real pictures"):
        table.add_column(column, justify="left" if not column else "right")
    for name, (label, digits) in ROWS.items():
        if name not in report.figures:
            continue
        figure, floor = report.figures[name], report.floors.get(name)
        table.add_row(label, f"{figure.value:.{digits}f}", _interval(figure, digits), _floor(floor, digits))
    return table


def _interval(figure: Figure, digits: int) -> str:
    return f"{figure.low:.{digits}f} to {figure.high:.{digits}f}"


def _floor(figure: Figure | None, digits: int) -> str:
    return "" if figure is None else f"{figure.value:.{digits}f} ({_interval(figure, digits)})"
