from __future__ import annotations

from pathlib import Path

import click
from rich.table import Table

from ldm_export.bundle import Bundle
from ldm_export.bundle.plans import add_fitted
from ldm_export.checkpoint import shipped_checkpoints
from ldm_export.cli.options import (
    bundle_argument,
    console,
    folder,
    json_option,
    print_json,
    prompts_from,
    status,
    steps_bar,
)
from ldm_export.errors import InputError
from ldm_export.recipe.settings import read_recipe
from ldm_export.tune.fit import FitOptions, fit_plan

SHIPPED_PROMPTS = "cpu-fast"
"""Shipped recipe whose prompts are the shipped models'."""


def _conditions(bundle: Bundle, prompts: tuple[str, ...]) -> tuple[str | int, ...]:
    """What pictures are of: the prompts, or those of the shipped recipes for shipped models; all classes; nothing."""
    model, roles = bundle.manifest.model, bundle.roles
    if not roles.text_encoders:
        if prompts:
            raise InputError("--prompts was given, and this model reads no text. Leave it out.")
        labelled = "class_labels" in roles.sources(bundle.manifest.graphs)
        return tuple(range(model.get("class_count") or 1)) if labelled else ()
    if not prompts and str(bundle.manifest.source.get("checkpoint")) in shipped_checkpoints():
        return read_recipe(SHIPPED_PROMPTS).prompts
    if not prompts:
        raise InputError("This model reads text, and no prompts were given. Give a file with one a line, as --prompts.")
    return prompts


@click.command()
@bundle_argument
@click.option("--calls", type=click.IntRange(1), required=True, help="Network calls of the fitted plan.")
@click.option("--prompts", type=folder, default=None, metavar="FILE", help="One a line; a third of them judge.")
@click.option("--sampler", default=None, help="What is followed, such as ddim; the bundle's own by default.")
@click.option("--teacher-steps", type=click.IntRange(2), default=50, show_default=True, help="And with so many steps.")
@click.option("--guidance", type=float, default=None, help="The scale that is fitted for; the bundle's own by default.")
@click.option("--pictures", type=click.IntRange(8), default=96, show_default=True, help="Pictures that are fitted to.")
@click.option("--held-out", type=click.IntRange(8), default=64, show_default=True, help="Pictures that judge.")
@click.option("--work", type=folder, default=None, help="Where trajectories are kept.  [default: BUNDLE.fit]")
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    calls: int,
    prompts: Path | None,
    sampler: str | None,
    teacher_steps: int,
    guidance: float | None,
    pictures: int,
    held_out: int,
    work: Path | None,
    as_json: bool,
) -> None:
    """Fit a plan of few network calls to what BUNDLE itself generates in many, without training, and add it.

    Timesteps and scalars are fitted to the trajectories of some pictures and judged on others, beside the textbook
    samplers with as many calls. Exit code 1, and nothing is added, if one of those is as good, in the median or in the
    worst picture. What is interrupted goes on where it was when the same is run again.
    """
    opened = Bundle.open(bundle)
    options = FitOptions(
        calls=calls,
        conditions=_conditions(opened, prompts_from(prompts, ())),
        sampler=sampler,
        teacher_steps=teacher_steps,
        guidance=guidance,
        pictures=pictures,
        held_out=held_out,
    )
    kept = work or bundle.with_name(f"{bundle.resolve().name}.fit")
    with steps_bar("fit") as advance:
        fit = fit_plan(opened, options, kept, lambda what, done, of: advance(done, of, what))
    document = {"plan": f"plans/{fit.plan.file_name}", "added": fit.pays, **fit.report}
    if fit.pays:
        add_fitted(opened, fit.plan, fit.report)
    if as_json:
        print_json(document)
    else:
        table = Table(title=f"{calls} calls, {held_out} held-out pictures against {fit.report['teacher']}")
        for column in ("plan", "median PSNR, dB", "worst"):
            table.add_column(column, justify="left" if column == "plan" else "right")
        for name, score in fit.report["psnr_db"].items():
            table.add_row(name, f"{score['median']:.1f}", f"{score['worst']:.1f}")
        console.print(table)
        if fit.pays:
            console.print(f"added; use it with --sampler {fit.plan.sampler} --steps {calls}")
    if not fit.pays:
        status.print(
            f"error: {fit.rivals[0]} is as good as the fitted plan, which was not added. Use more --pictures, "
            "other --calls, or that sampler.",
            style="red",
            soft_wrap=True,
        )
        ctx.exit(1)
