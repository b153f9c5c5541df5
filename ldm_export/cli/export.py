from __future__ import annotations

from pathlib import Path

import click

from ldm_export.checkpoint import LatentDiffusion
from ldm_export.cli.options import console, folder, json_option, print_json, stages
from ldm_export.export.chain import export_bundle


@click.command()
@click.argument("checkpoint")
@click.option("-o", "--output", type=folder, required=True, help="The bundle's folder.")
@click.option("--force", is_flag=True, help="Replace a bundle that is there.")
@json_option
def command(checkpoint: str, output: Path, force: bool, as_json: bool) -> None:
    """Turn CHECKPOINT, a folder in diffusers layout or a shipped name such as emoji64, into a bundle.

    Every graph is held against PyTorch before the bundle is sealed; exit code 1 if one differs.
    """
    with stages("export") as progress:
        bundle = export_bundle(LatentDiffusion.open(checkpoint), output, force=force, progress=progress)
    if as_json:
        print_json({"bundle": str(bundle.path), "parity": list(bundle.manifest.parity)})
        return
    for record in bundle.manifest.parity:
        console.print(
            f"{record['graph']:15} {record['output']:20} differs from PyTorch by {record['max_error']:.1e} "
            f"(allowed {record['tolerance']:.0e})"
        )
    size_mb = sum(entry.size_bytes for entry in bundle.manifest.files.values()) / 1e6
    console.print(f"{bundle.path}: {len(bundle.manifest.files)} files, {size_mb:.1f} MB")
