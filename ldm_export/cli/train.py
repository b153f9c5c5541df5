from __future__ import annotations

import os
import sys
from pathlib import Path

import click

from ldm_export.checkpoint.training import train_checkpoint
from ldm_export.cli.options import console, folder, logged_bar, steps_bar, was_given
from ldm_export.errors import InputError


@click.command()
@click.option(
    "--data", type=folder, required=True, help="Pictures and their metadata.jsonl: file_name and text, or label."
)
@click.option("-o", "--output", type=folder, required=True, help="The checkpoint's folder; with --meta a LoRA's file.")
@click.option("--config", type=folder, default=None, help="A TOML file; the recipe of emoji64 by default.")
@click.option("--resume", is_flag=True, help="Go on with an interrupted run in the same folder.")
@click.option("--meta", type=click.Choice(["reptile"]), default=None, help="Learn a start for adapt --start.")
@click.option("--checkpoint", default=None, help="With --meta: the model that is to be adapted.")
@click.option("--prompt", default=None, help='With --meta: what pictures show, such as "a photo of {task}".')
@click.option("--label", type=int, default=None, help="Likewise, of models with classes: a number.")
def command(
    data: Path,
    output: Path,
    config: Path | None,
    resume: bool,
    meta: str | None,
    checkpoint: str | None,
    prompt: str | None,
    label: int | None,
) -> None:
    """Train a model: autoencoder, text encoder, UNet. Resumable with --resume.

    On several processes or machines: torchrun --nproc-per-node 2 --no-python ldm-export train ...

    With --meta, DATA holds folders of pictures, each a task, and what is trained is a LoRA from which adapt needs fewer
    steps. What is interrupted resumes when the same is run again.
    """
    if meta is not None:
        _meta_train(data, output, config, checkpoint, prompt, label)
        return
    for name in ("checkpoint", "prompt", "label"):
        if was_given(name):
            raise InputError(f"--{name} is an option of meta-learning. Give --meta reptile, too, or leave it out.")
    with steps_bar("train") as advance:

        def progress(stage: str, done: int, steps: int, loss: float) -> None:
            advance(done, steps, f"{stage}  loss {loss:.4f}")
            if not sys.stderr.isatty() and (done % 100 == 0 or done == steps):
                click.echo(f"{stage} {done}/{steps} loss {loss:.5f}", err=True)

        train_checkpoint(data, output, config, resume=resume, progress=progress)
    if int(os.environ.get("RANK", "0")) == 0:
        console.print(f"{output}: a checkpoint in diffusers layout. Next: ldm-export export {output} -o BUNDLE")


def _meta_train(
    data: Path, output: Path, config: Path | None, checkpoint: str | None, prompt: str | None, label: int | None
) -> None:
    from ldm_export.adapt.meta import MetaOptions, meta_train, read_options  # torch, which --help does not need
    from ldm_export.families import open_checkpoint

    if checkpoint is None:
        raise InputError("--meta was given without --checkpoint. Name the model whose adaptation is to be learnt.")
    if was_given("resume"):
        raise InputError("--resume was given with --meta, which resumes by itself. Leave it out.")
    options = MetaOptions() if config is None else read_options(config)
    asked = label if prompt is None else prompt
    with logged_bar("train", every=10) as progress:
        report = meta_train(open_checkpoint(checkpoint), data, asked, output, options, progress=progress)
    console.print(f"{output}: a start, learnt over {len(report['tasks'])} tasks.")
    factors = f"--rank {options.rank} --layers {options.layers}"
    console.print(f"Next: ldm-export adapt {checkpoint} --start {output} {factors} ...", soft_wrap=True)
