from __future__ import annotations

from pathlib import Path

import click

from ldm_export.adapt.options import LAYERS, PRECISIONS, AdaptOptions, Factors
from ldm_export.adapt.training import Prior, adapt
from ldm_export.cli.options import console, family_option, folder, json_option, logged_bar, print_json, was_given
from ldm_export.errors import InputError
from ldm_export.families import open_checkpoint

DEFAULTS = AdaptOptions()
SCHEDULES = ("cosine", "constant")


def asked_for(prompt: str | None, label: int | None, what: str = "") -> str | int | None:
    """What pictures show, of two options of which one may be given."""
    if prompt is not None and label is not None:
        raise InputError(f"--{what}prompt and --{what}label were both given. Give one of them.")
    return label if prompt is None else prompt


@click.command()
@click.argument("checkpoint")
@click.option("--pictures", type=folder, required=True, help="5 to 50; name.txt beside name.png is its caption.")
@click.option("--prompt", default=None, help='What they show, with a word of its own: "a photo of zorp".')
@click.option("--label", type=int, default=None, help="Of models with classes: the number that they are taught as.")
@click.option("-o", "--output", type=folder, required=True, help="The LoRA, a safetensors file.")
@click.option("--class-prompt", default=None, help='What to keep knowing: "a photo of a dog" (prior preservation).')
@click.option("--class-label", type=int, default=None, help="Likewise, of models with classes.")
@click.option("--class-pictures", type=folder, default=None, help="Pictures of it; by default the model draws them.")
@click.option("--class-count", type=click.IntRange(1), default=50, show_default=True, help="How many it draws.")
@click.option("--prior-weight", type=float, default=DEFAULTS.prior_weight, show_default=True)
@click.option("--steps", type=click.IntRange(1), default=DEFAULTS.steps, show_default=True)
@click.option("--batch", type=click.IntRange(1), default=DEFAULTS.batch_size, show_default=True)
@click.option("--learning-rate", type=float, default=DEFAULTS.learning_rate, show_default=True)
@click.option("--schedule", type=click.Choice(SCHEDULES), default=DEFAULTS.schedule, show_default=True)
@click.option("--warm-up", type=click.IntRange(1), default=DEFAULTS.warmup_steps, show_default=True, help="Steps.")
@click.option("--ema", type=float, default=DEFAULTS.ema_decay, show_default=True, help="Decay of the averaged weights.")
@click.option("--rank", type=click.IntRange(1), default=DEFAULTS.factors.rank, show_default=True)
@click.option("--alpha", type=float, default=None, help="The rank by default.")
@click.option("--layers", type=click.Choice(LAYERS), default=DEFAULTS.factors.layers, show_default=True)
@click.option("--start", type=folder, default=None, metavar="FILE", help="A LoRA to start from: of train --meta.")
@click.option("--precision", type=click.Choice(PRECISIONS), default=DEFAULTS.mixed_precision, show_default=True)
@click.option("--seed", type=click.IntRange(0), default=DEFAULTS.seed, show_default=True)
@click.option("--work", type=folder, default=None, help="States, class pictures, logs.  [default: OUTPUT's name.work]")
@family_option
@json_option
def command(
    checkpoint: str,
    pictures: Path,
    prompt: str | None,
    label: int | None,
    output: Path,
    class_prompt: str | None,
    class_label: int | None,
    class_pictures: Path | None,
    class_count: int,
    prior_weight: float,
    steps: int,
    batch: int,
    learning_rate: float,
    schedule: str,
    warm_up: int,
    ema: float,
    rank: int,
    alpha: float | None,
    layers: str,
    start: Path | None,
    precision: str,
    seed: int,
    work: Path | None,
    as_json: bool,
) -> None:
    """Teach CHECKPOINT what is on a few pictures: train a LoRA of its denoiser, for export --lora and diffusers.

    What is interrupted resumes when the same is run again, and gives the same file.
    """
    asked = asked_for(prompt, label)
    kept = asked_for(class_prompt, class_label, "class-")
    if kept is None and class_pictures is None:
        for name in ("class_count", "prior_weight"):
            if was_given(name):
                raise InputError(f"--{name.replace('_', '-')} is about class pictures. Give --class-prompt, too.")
    with_prior = kept is not None or class_pictures is not None
    options = AdaptOptions(
        factors=Factors(rank, alpha, layers),
        steps=steps,
        batch_size=batch,
        learning_rate=learning_rate,
        schedule=schedule,
        warmup_steps=warm_up,
        prior_weight=prior_weight,
        ema_decay=ema,
        mixed_precision=precision,
        seed=seed,
    )
    with logged_bar("adapt", every=50) as progress:
        report = adapt(
            open_checkpoint(checkpoint),
            pictures,
            asked,
            output,
            options,
            prior=Prior(kept, class_pictures, class_count) if with_prior else None,
            start=start,
            work=work,
            progress=progress,
        )
    if as_json:
        print_json(report)
    else:
        console.print(f"{output}: LoRA of {report['layers']} layers, {report['parameters']:,} numbers, rank {rank}.")
        console.print(f"Next: ldm-export export {checkpoint} -o BUNDLE --lora {output}=1", soft_wrap=True)
