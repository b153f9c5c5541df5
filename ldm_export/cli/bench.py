from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ldm_export.bench.gates import KINDS, judge
from ldm_export.bench.harness import Bench, BenchOptions, results_by_variant
from ldm_export.bench.report import page
from ldm_export.cli.figures import print_bench, without_pictures
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
    stages,
    status,
    was_given,
    write_output,
)
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint
from ldm_export.runtime.backends import BACKENDS
from ldm_export.verify.gates import Gate, gate_from_text

KEPT = Gate("parity", 1.0)
"""What is asked for of everyone that names a checkpoint: no graph is off by more than its tolerance."""


@click.command()
@click.argument("bundles", nargs=-1, required=True, type=folder, metavar="BUNDLE...")
@click.option("--against", metavar="CHECKPOINT", default=None, help="Compare with this PyTorch model, and draw it too.")
@click.option("-o", "--output", type=folder, required=True, metavar="REPORT.html", help="REPORT.json goes beside it.")
@click.option("--prompts", type=folder, default=None, metavar="FILE", help="What to draw, one a line.")
@click.option("--prompt", "texts", multiple=True, metavar="TEXT", help="What to draw; repeatable.")
@click.option("--sampler", default=None, help="Of the bundles that can be drawn so; each bundle's own by default.")
@click.option("--steps", type=int, default=None, help="Likewise; students keep the few that they were taught.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Picture k has seed + k.")
@click.option("--batch", type=int, default=1, show_default=True, help="Pictures at a time, for latency.")
@click.option("--repeats", type=int, default=9, show_default=True, help="Rounds of all variants in turn.")
@click.option("--warm-up", type=int, default=2, show_default=True, help="Rounds before those, not counted.")
@click.option(
    "--backend",
    "backends",
    type=click.Choice(BACKENDS),
    multiple=True,
    default=("auto",),
    show_default=True,
    help="Of the bundles; repeatable. What does not run here is left out.",
)
@click.option("--data", type=folder, default=None, metavar="FOLDER", help="Judge quality by these training pictures.")
@click.option("--held-out", type=folder, default=None, metavar="FOLDER", help="And by these, which training never saw.")
@click.option("--pictures", type=int, default=200, show_default=True, help="Pictures to draw for --data.")
@click.option(
    "--fail-under",
    "asked",
    multiple=True,
    metavar="KEY=NUMBER",
    help="Exit with 1 unless every bundle reaches it. At least: psnr=40 (dB, the worst picture), faster=1.5, "
    "smaller=2. At most: drift=1e-3, parity=1 (times a graph's tolerance). All against the checkpoint or else the "
    "first bundle. Repeatable.",
)
@lora_option
@embedding_option
@family_option
@click.option("--resume", is_flag=True, help="Measure nothing that REPORT.json holds, even if it is complete.")
@click.option("--json", "as_json", is_flag=True, help="Print the document, without pictures, as the last line.")
@click.pass_context
def command(
    ctx: click.Context,
    /,
    bundles: tuple[Path, ...],
    against: str | None,
    output: Path,
    prompts: Path | None,
    texts: tuple[str, ...],
    asked: tuple[str, ...],
    loras: tuple[str, ...],
    embeddings: tuple[str, ...],
    resume: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Measure each BUNDLE, and PyTorch beside them, in turn; REPORT.html shows it, REPORT.json holds it.

    Latency by stage, how far latents and pictures are from the checkpoint's (or the first bundle's), each graph against
    its network, cold start and memory in processes of their own, bytes, and with --data quality. What is interrupted
    goes on where it was when the same is run again. Exit code 1 if a graph is off by more than its tolerance, or what
    --fail-under asks for is not reached.
    """
    gates = [gate_from_text(text, KINDS) for text in asked]
    if options["data"] is None and was_given("pictures"):
        raise InputError("--pictures is how many are drawn for --data, which was not given. Give both, or neither.")
    if embeddings and against is None:
        raise InputError("--embedding changes the checkpoint of --against, which was not given. Give both, or neither.")
    if loras and against is None:
        raise InputError("--lora changes the checkpoint of --against, which was not given. Give both, or neither.")
    json_file = output.with_suffix(".json")
    if json_file == output:
        raise InputError(f"{output} is where the figures go; the report is a page. Name a .html.")
    for file in (output, json_file):
        check_output(file)
    checkpoint = (
        None
        if against is None
        else open_checkpoint(against, adapters=adapters_from(loras), embeddings=embeddings_from(embeddings))
    )
    settings = BenchOptions(prompts=prompts_from(prompts, texts), **options)
    with stages("bench") as progress:
        progress("opening")
        bench = Bench(bundles, checkpoint, settings)
        bench.check_gates(gates)
        try:
            document = bench.run(json_file, command_line(ctx), resume=resume, progress=progress)
        except KeyboardInterrupt:
            status.print(
                f"{json_file} keeps what was measured; the same command goes on from there.",
                markup=False,
                soft_wrap=True,
            )
            raise
    wanted = gates if against is None or any(gate.key == KEPT.key for gate in gates) else [*gates, KEPT]
    try:
        document["gates"] = judge(wanted, results_by_variant(document), document["baseline"])
        write_output(output, page(document))
        print_bench(document)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if bench.took_up is None:
            raise
        raise InputError(
            f"{bench.took_up} lacks results that a bench writes, or has other ones. Delete it, and measure anew."
        ) from error
    console.print(f"look at {output}; the figures are in {json_file}")
    if as_json:
        click.echo(json.dumps(without_pictures(document)))
    fallen = [gate["says"] for gate in document["gates"] if not gate["passed"]]
    if fallen:
        status.print(f"error: {'; '.join(fallen)}.", style="red", soft_wrap=True)
        ctx.exit(1)
