from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
from rich import box
from rich.table import Table

from ldm_export.bench.card_page import FIGURES
from ldm_export.bench.formatting import milliseconds, times
from ldm_export.bundle import Bundle
from ldm_export.bundle.bundle import check_output_folder
from ldm_export.checkpoint import LatentDiffusion, shipped_checkpoints
from ldm_export.cli.options import (
    bundle_argument,
    check_output,
    command_line,
    console,
    family_option,
    folder,
    prompts_from,
    status,
    steps_bar,
    write_output,
)
from ldm_export.families import open_checkpoint
from ldm_export.tune.candidates import GOALS
from ldm_export.tune.page import fastest_first, tune_page
from ldm_export.tune.result import write_result
from ldm_export.tune.session import Document, TuneOptions, Tuning
from ldm_export.verify.fidelity import KINDS
from ldm_export.verify.gates import gate_from_text


@click.command()
@bundle_argument
@click.option("-o", "--output", type=folder, required=True, metavar="TUNED.bundle", help="TUNED.recipe.toml beside it.")
@click.option(
    "--budget",
    "asked",
    multiple=True,
    metavar="KEY=NUMBER",
    help="What pictures must keep, on prompts that nothing is chosen by. At least: psnr=35 (dB, median), "
    "psnr_worst=30, ssim=0.98, retrieval=0.85, alignment=0.3. At most: perceptual=0.05, frechet=160, "
    "frechet_ratio=1.05, latency_ms=500, memory_mb=500. Repeatable; all are to be kept.",
)
@click.option("--goal", type=click.Choice(GOALS), default="fastest", show_default=True, help="What is least.")
@click.option("--max-memory", type=float, default=None, metavar="MB", help="Peak of a process that generates.")
@click.option("--latency-only", is_flag=True, help="Judge no pictures; choose what changes them by rounding alone.")
@click.option("--against", metavar="CHECKPOINT", default=None, help="What BUNDLE was exported from: int8 needs it.")
@click.option("--candidate", "candidates", type=folder, multiple=True, metavar="BUNDLE", help="Such as a student.")
@click.option("--fit", "fitted", type=int, multiple=True, metavar="CALLS", help="Also fit a plan of so many calls.")
@click.option("--prompts", type=folder, default=None, metavar="FILE", help="What to draw, one a line.")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="What to draw; repeatable.")
@click.option("--pictures", type=int, default=48, show_default=True, help="To judge by; half of them are held out.")
@click.option("--data", type=folder, default=None, metavar="FOLDER", help="Real pictures to compare sets with.")
@click.option("--held-out", type=folder, default=None, metavar="FOLDER", help="And such that training never saw.")
@click.option("--steps", type=click.IntRange(min=1), default=None, help="Of the truth; 50 by default.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture k has seed + k.")
@click.option("--rounds", type=int, default=5, show_default=True, help="Timed rounds of each pair.")
@click.option("--work", type=folder, default=None, help="Keeps what was measured; OUTPUT.work by default.")
@click.option("--page", type=folder, default=None, metavar="FRONT.html", help="Also write the front as a page.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@family_option
@click.option("--json", "as_json", is_flag=True, help="Print the document, without pictures, as the last line.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    bundle: Path,
    output: Path,
    asked: tuple[str, ...],
    max_memory: float | None,
    against: str | None,
    prompts: Path | None,
    texts: tuple[str, ...],
    work: Path | None,
    page: Path | None,
    force: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Search what can be done to BUNDLE on this machine within a budget of quality, and write the best.

    The truth is the untouched bundle with its own sampler and the most steps, at the same seeds. Tried are plans of
    fewer network calls, DeepCache, int8, the target for this CPU, libraries and threads, alone and together. What falls
    below a budget, on prompts that nothing was chosen by, is never chosen: where nothing keeps it the untouched bundle
    is the result, and exit code 1 says that not even that does. What is interrupted resumes with the same command.
    """
    gates = [gate_from_text(text, KINDS, "--budget") for text in asked]
    if max_memory is not None:
        gates.append(gate_from_text(f"memory_mb={max_memory}", KINDS, "--max-memory"))
    check_output_folder(output, force)
    work = work or output.with_name(f"{output.name}.work")
    for file in (work / "any", *(() if page is None else (page,))):
        check_output(file)
    settings = TuneOptions(budgets=tuple(gates), prompts=prompts_from(prompts, texts), **options)
    with steps_bar("tune") as advance:
        advance(0, 1, "opening")
        tuning = Tuning(bundle, _checkpoint(bundle, against), settings, work)
        try:
            found, variants, document = tuning.run(command_line(ctx), lambda what, done, of: advance(done, of, what))
            advance(0, 1, "writing")
            written = write_result(found, variants, document, output, force=force)
        except KeyboardInterrupt:
            status.print(f"{work} keeps what was measured; the same command resumes there.", soft_wrap=True)
            raise
    document |= {"output": str(output), "recipe": str(written.recipe), "generate": written.command}
    if page is not None:
        write_output(page, tune_page(document))
    _print(document)
    if as_json:
        points = [{key: value for key, value in point.items() if key != "png"} for point in document["points"]]
        click.echo(json.dumps({**document, "points": points}))
    if found.chosen.why:
        short = "; ".join(found.chosen.why)
        status.print(f"error: not even the untouched bundle keeps it: {short}.", style="red", soft_wrap=True)
        ctx.exit(1)


def _checkpoint(bundle: Path, against: str | None) -> LatentDiffusion | None:
    """The checkpoint that was given, or the shipped one that the bundle was exported from."""
    if against is not None:
        return open_checkpoint(against)
    source = Bundle.open(bundle).manifest.source
    name = "" if source.get("adapters") or source.get("embeddings") else str(source.get("checkpoint", ""))
    return open_checkpoint(name) if name in shipped_checkpoints() else None


def _print(document: Document) -> None:
    points = document["points"]
    shown = [point for point in points if point["on_front"] or point["chosen"]] if document["judged"] else points
    shown = sorted((point for point in shown if point["faster"]), key=fastest_first)
    figures = [name for name in FIGURES if any(name in point["held_out"] for point in shown)]
    figures = [name for name in figures if name in {KINDS[gate["key"]].figure for gate in document["budgets"]}]
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    table.add_column("", min_width=20)
    for head in ("ms", "faster", "MB", *(FIGURES[name][0] for name in figures), ""):
        table.add_column(head, justify="right", no_wrap=True)
    for point in shown:
        values = [f"{point['held_out'][name]['value']:.{FIGURES[name][2]}f}" for name in figures]
        mark = "chosen" if point["chosen"] else "breaks it" if point["why"] else ""
        size = f"{point['bytes'] / 1e6:.1f}"
        table.add_row(point["name"], milliseconds(point["ms"]), times(point["faster"]), size, *values, mark)
    console.print(table)
    chosen = next(point for point in points if point["chosen"])
    if chosen is points[0] and not chosen["why"]:
        console.print("Nothing that was tried is cheaper and within the budget: the untouched bundle is the result.")
    for point in points:
        if point["configuration"]["bundle"] and not point["chosen"]:
            console.print(f"{point['name']} is not chosen: {point['why_not']}")
    for name, why in document["left_out"].items():
        console.print(f"{name} is left out: {why}")
    for note in document["notes"]:
        console.print(note)
    console.print(f"{document['output']} and {document['recipe']}; {document['seconds']:.0f} s")
    console.print(document["generate"])
