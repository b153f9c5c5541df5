from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import numpy as np

from ldm_export.cli.options import bundle_argument, console, folder, json_option, print_json, steps_bar
from ldm_export.cli.pictures import check_writable, read_picture, save_grid
from ldm_export.errors import InputError
from ldm_export.runtime import Pipeline
from ldm_export.runtime.backends import BACKENDS
from ldm_export.runtime.request import picture_channels


def _size(text: str | None) -> tuple[int | None, int | None]:
    if text is None:
        return None, None
    height, _, width = text.lower().partition("x")
    if not (height.isdecimal() and width.isdecimal()):
        raise InputError(f"--size {text} is not a size; it is HEIGHTxWIDTH in pixels, such as 64x64.")
    return int(height), int(width)


@click.command()
@bundle_argument
@click.argument("prompts", nargs=-1, metavar="PROMPT...")
@click.option("-o", "--output", type=folder, required=True, help="The PNG; several pictures become a grid.")
@click.option("--sampler", default=None, help="A sampler that the bundle has plans for; its own (ddim) by default.")
@click.option("--steps", type=int, default=None, help="Denoising steps; the bundle's own number (20) by default.")
@click.option("--guidance", type=float, default=None, help="Guidance scale, 1 is off; the bundle's own (4) by default.")
@click.option("--negative", default=None, metavar="TEXT", help="What to steer away from.")
@click.option("--seed", default=0, show_default=True, help="Picture k uses seed + k.")
@click.option("--image", type=folder, default=None, help="A picture to start from.")
@click.option("--strength", default=0.6, show_default=True, help="Share of the steps that is redone on --image.")
@click.option("--size", default=None, metavar="HxW", help="In pixels; the model's own by default.")
@click.option(
    "--class-label", "class_labels", type=int, multiple=True, help="For class-conditional models; repeatable."
)
@click.option("--count", default=1, show_default=True, help="Pictures, for models that take neither text nor class.")
@click.option("--deepcache", default=1, metavar="N", help="The whole UNet in every N-th step only: faster, rougher.")
@click.option("--whole", is_flag=True, help="All in one call, by the plan's loop graph or engine.")
@click.option("--backend", type=click.Choice(BACKENDS), default="auto", show_default=True)
@click.option(
    "--threads", type=click.IntRange(min=1), default=None, help="CPU threads; one a physical core by default."
)
@click.option("--latents", type=folder, default=None, help="Also write the final latents as .npy.")
@json_option
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    output: Path,
    sampler: str | None,
    steps: int | None,
    guidance: float | None,
    negative: str | None,
    seed: int,
    image: Path | None,
    strength: float,
    size: str | None,
    class_labels: tuple[int, ...],
    count: int,
    deepcache: int,
    whole: bool,
    backend: str,
    threads: int | None,
    latents: Path | None,
    as_json: bool,
) -> None:
    """Draw one picture a PROMPT from BUNDLE, without PyTorch."""
    height, width = _size(size)
    check_writable(output)
    if latents is not None and not latents.parent.is_dir():
        raise InputError(f"{latents} cannot be written: {latents.parent} is no folder. Make it, or name another file.")
    pipeline = Pipeline.open(bundle, backend=backend, threads=threads)
    options: dict[str, Any] = {"seed": seed if prompts or class_labels else [seed + k for k in range(count)]}
    with steps_bar("drawing") as advance:
        result = pipeline.generate(
            prompts or None,
            sampler=sampler,
            steps=steps,
            guidance=guidance,
            negative_prompt=negative,
            height=height,
            width=width,
            image=None if image is None else read_picture(image, picture_channels(pipeline.bundle)),
            strength=strength,
            class_labels=class_labels or None,
            deepcache=deepcache,
            whole=whole,
            callback=lambda step: advance(step.index + 1, step.count),
            **options,
        )
    save_grid(result.images, output)
    if latents is not None:
        _save_array(result.latents, latents)
    if as_json:
        timings = asdict(result.timings) | {"total_ms": result.timings.total_ms}
        print_json(
            {
                "output": str(output),
                "seeds": list(result.seeds),
                "requested_backend": pipeline.requested_backend,
                "backend": result.backend,
                "timings": timings,
            }
        )
        return
    console.print(
        f"{output}: {len(result.images)} of {result.images.shape[2]}x{result.images.shape[1]} in "
        f"{result.timings.total_ms / 1000:.2f} s on {result.backend} (asked for: {pipeline.requested_backend})"
    )


def _save_array(array: np.ndarray[Any, Any], path: Path) -> None:
    try:
        np.save(path, array, allow_pickle=False)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}). Name another file.") from error
