from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ldm_export.checkpoint.training import train_checkpoint
from ldm_export.cli.options import console, folder, steps_bar


@click.command()
@click.option(
    "--data", type=folder, required=True, help="Pictures and their metadata.jsonl: file_name and text, or label."
)
@click.option("-o", "--output", type=folder, required=True, help="The checkpoint's folder.")
@click.option("--config", type=folder, default=None, help="A TOML file; the recipe of emoji64 by default.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in the same folder.")
def command(data: Path, output: Path, config: Path | None, resume: bool) -> None:
    """Train a model: autoencoder, text encoder, UNet. Resumable with --resume.

    On several processes or machines: torchrun --nproc-per-node 2 --no-python ldm-export train ...
    """
    with steps_bar("train") as advance:

        def progress(stage: str, done: int, steps: int, loss: float) -> None:
            advance(done, steps, f"{stage}  loss {loss:.4f}")
            if not sys.stderr.isatty() and (done % 100 == 0 or done == steps):
                click.echo(f"{stage} {done}/{steps} loss {loss:.5f}", err=True)

        train_checkpoint(data, output, config, resume=resume, progress=progress)
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(f"{output}: a checkpoint in diffusers layout. Next: ldm-export export {output} -o BUNDLE")
