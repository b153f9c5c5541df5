from __future__ import annotations

from pathlib import Path

import click

from ldm_export.bundle import Bundle
from ldm_export.cli.options import bundle_argument, console, json_option, print_json, stages


@click.command()
@bundle_argument
@click.option("--target", "kind", required=True, help="The engines, such as rtx-sm89-fp16, as build called them.")
@click.option(
    "--engines-of",
    "base",
    type=click.Path(path_type=Path),
    help="A bundle of the same networks, built with --refit.  [default: BUNDLE, built with --strip]",
)
@json_option
def command(bundle: Path, kind: str, base: Path | None, as_json: bool) -> None:
    """Put a BUNDLE's weights into TensorRT engines, its own stripped ones or another bundle's, and keep them in BUNDLE.

    Takes seconds where a build takes minutes: one build serves all fine-tunes of a network. Needs the GPU.
    """
    from ldm_export.runtime.backends.cuda import gpus
    from ldm_export.verify.engines.refit import refit_engines

    opened, of = Bundle.open(bundle), Bundle.open(base) if base else None
    with stages("refit") as progress:
        made = refit_engines(opened, kind, lambda: gpus()[0].compute_capability, of, progress=progress)
    seconds = {name: engine.seconds for name, engine in made.engines.items()}
    if as_json:
        print_json({"target": str(made.folder), "engines": made.report, "seconds": seconds, "version": made.version})
        return
    for name, took in seconds.items():
        console.print(f"{name:15} {made.report[name]['engine_bytes'] / 1e6:8.1f} MB, refitted in {took:.1f} s")
    console.print(f"{made.folder}: {made.flavour} {made.version} with the weights of {opened.path}")
