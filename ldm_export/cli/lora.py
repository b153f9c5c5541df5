from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

import click

from ldm_export.bundle import Bundle
from ldm_export.cli.options import bundle_argument, console, folder, json_option, print_json, stages


@click.command()
@bundle_argument
@click.argument("adapter", type=folder)
@click.option(
    "-o", "--output", type=folder, default=None, help="The file to write.  [default: ADAPTER's name with .ldma]"
)
@json_option
def command(bundle: Path, adapter: Path, output: Path | None, as_json: bool) -> None:
    """Make an ADAPTER (LoRA, LoHa, LoKr) usable when BUNDLE draws: generate --lora FILE=0.8, without another export.

    Once a bundle and adapter. It writes the adapter's factors for this bundle, and under the bundle's targets/ graphs
    that take them, which take as much space again as those that they change.
    """
    from ldm_export.export.adapters import make_adapter

    file = Path(f"{adapter.stem or adapter.name}.ldma") if output is None else output
    with stages("lora") as progress:
        made = make_adapter(Bundle.open(bundle), adapter, file, progress=progress)
    if as_json:
        print_json({**asdict(made), "path": str(made.path)})
        return
    changed = ", ".join(f"{count} layers of {name}" for name, count in made.layers.items())
    console.print(f"{made.path}: {changed}, of rank up to {made.largest_rank}")
    if made.error is not None:
        console.print(f"{'':4}differs from the same adapter in the weights by {made.error:.1e}")
    console.print(f"{'':4}ldm-export generate {bundle} PROMPT --lora {made.path}=0.8 -o picture.png")
